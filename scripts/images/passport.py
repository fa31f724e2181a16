"""The image's passport: what it is made of, from the weights' hashes to the git revision,
and short labels with the same facts.

Reads   the manifests of the rooms and of the rooms they were made from; the weights, to hash them
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Mapping, Sequence

from scripts import reports, room
from scripts.nvidia import contracts
from scripts.weights import files

VERSION = 1
LABEL = "trtllm-bake"
# the files of a weights folder that a journey may read; other files are not hashed
WEIGHT_FILES = (
    *(f"*{ending}" for ending in files.WEIGHTS),
    "*.json",
    "tokenizer.model",
    "*.jinja",
    files.CHECKLISTS[0],
)


def chain(rooms: Sequence[Path], places: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Every room that these were made from, themselves included: name -> {'manifest_sha256', 'manifest'}.

    places: folders to search for the rooms before them. A room that changed since it was read is a Problem.
    """
    found: dict[str, dict[str, Any]] = {}
    queue = list(rooms)
    while queue:
        folder = queue.pop(0)
        manifest, digest = room.read_manifest(folder), room.manifest_sha256(folder)
        found[manifest["room"]] = {"manifest_sha256": digest, "manifest": manifest}
        for name, read in manifest["reads"].items():
            before = [place / name for place in places if (place / name / room.MANIFEST).is_file()]
            same = [place for place in before if room.manifest_sha256(place) == read]
            if not same:
                seen = room.manifest_sha256(before[0])[:12] if before else "nothing"
                raise reports.rooms.room_damaged(folder, room.MANIFEST, f"{name} {read[:12]}", seen)
            if name not in found:
                queue.append(same[0])
    return dict(sorted(found.items()))


def weights_of(folder: Path, rooms: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Size and sha256 of the weights' files: from a room that noted them when it read them, else read now."""
    for described in rooms.values():
        noted = described["manifest"]["facts"].get("weights")
        if isinstance(noted, dict) and noted:
            return {
                name: dict(record) if isinstance(record, dict) else {"sha256": record}
                for name, record in sorted(noted.items())
            }
    files = sorted({path for pattern in WEIGHT_FILES for path in folder.glob(pattern) if path.is_file()})
    return {path.name: room.sha256_of(path).as_json() for path in files}


def passport(
    model: str, rooms: Mapping[str, Mapping[str, Any]], weights: Mapping[str, Any],
    report: Mapping[str, Any], engine_config: Mapping[str, Any], revision: str | None, licence: str,
) -> dict[str, Any]:  # fmt: skip
    """The passport. revision: of git, with '+changes' if the tree had any; None outside of a repository."""
    engines = rooms["engines"]["manifest"]
    facts = engines["facts"]
    row = contracts.toolchain(facts["trtllm_version"])
    mapping = engine_config["pretrained_config"]["mapping"]
    tensorrt = facts["engine"] == "tensorrt"
    return {
        "passport": VERSION,
        "model": model,
        "licence": licence or None,
        "revision": revision,
        "engine": {
            "kind": facts["engine"],
            "rehearsal": bool(facts.get("rehearsal")),
            "tp_size": mapping["tp_size"],
            "pp_size": mapping.get("pp_size", 1),
            "world_size": facts["world_size"],
            "dtype": engine_config["pretrained_config"]["dtype"],
            "flags": engines["arguments"],
            "gpu": facts.get("gpu"),
        },
        "toolchain": {
            "trtllm": facts["trtllm_reported"],
            "image": row["image"] if tensorrt else None,
            "digest": row["digest"] if tensorrt else None,
            "tensorrt": row["tensorrt"] if tensorrt else None,
            "cuda": row["cuda"] if tensorrt else None,
        },
        "base": rooms["base"]["manifest"]["facts"],
        "weights": dict(weights),
        "accuracy": dict(report),
        "rooms": {name: dict(described) for name, described in rooms.items()},
    }


def as_bytes(value: Mapping[str, Any]) -> bytes:
    """Its bytes in the image. Keys keep their order,
    so a manifest in it gives the bytes of its file again (manifest_bytes)."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


# room.py writes manifests the same way
manifest_bytes = as_bytes


def labels(passport: Mapping[str, Any], digest: str) -> dict[str, str]:
    """OCI's labels and ours. digest: sha256 of the passport's bytes."""
    engine, toolchain, base = passport["engine"], passport["toolchain"], passport["base"]
    found: dict[str, str | None] = {
        "org.opencontainers.image.title": passport["model"],
        "org.opencontainers.image.description": f"{passport['model']} on Triton Inference Server, "
        f"{engine['kind']} engines, TP={engine['tp_size']}",
        "org.opencontainers.image.licenses": passport["licence"],
        "org.opencontainers.image.revision": passport["revision"],
        "org.opencontainers.image.base.name": base.get("image") or base.get("made_from"),
        "org.opencontainers.image.base.digest": base.get("digest"),
        f"{LABEL}.engine": engine["kind"],
        f"{LABEL}.rehearsal": "yes" if engine["rehearsal"] else None,
        f"{LABEL}.tp_size": str(engine["tp_size"]),
        f"{LABEL}.world_size": str(engine["world_size"]),
        f"{LABEL}.dtype": engine["dtype"],
        f"{LABEL}.trtllm": toolchain["trtllm"],
        f"{LABEL}.tensorrt": toolchain["tensorrt"],
        f"{LABEL}.gpu": (engine["gpu"] or {}).get("name"),
        f"{LABEL}.compute_capability": (engine["gpu"] or {}).get("compute_capability"),
        f"{LABEL}.passport.sha256": digest,
    }
    return {name: value for name, value in sorted(found.items()) if value}


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def files_of(passport: Mapping[str, Any]) -> dict[str, room.FileRecord]:
    """The files of the rooms that are in the image: path in the image -> record."""
    found = {}
    for name in ("engines", "model_repo"):
        files: list[str] = passport["rooms"][name]["manifest"]["files"]
        for file in files:
            record = room.record_of(passport["rooms"][name]["manifest"], file)
            found[f"srv/{name}/{file}"] = room.FileRecord(record.size_bytes, record.sha256)
    return found
