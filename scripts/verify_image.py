"""Is an image what its passport says? Recomputes everything that can be recomputed:
`make verify-image IMAGE=name` or a file of dist/.

Reads   IMAGE from the environment: an image of docker or buildah, or an archive; git, if it has the revision
Needs   the standard library

An image cannot prove that the weights are Meta's, or that the accuracy report is true. The last line says so.
"""

from __future__ import annotations

import argparse
import email.parser
import hashlib
import json
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, Iterator, List, Mapping, Tuple

from scripts import reports, room
from scripts.images import archive as image_archive
from scripts.images import builders, passport
from scripts.images.archive import Archive

PROJECT = Path(__file__).parent.parent
ENV_SITE = re.compile(r"opt/venv/lib/python3\.\d+/site-packages/([^/]+)\.dist-info/METADATA")
LAUNCHER = "opt/trtllm-bake/"
METADATA_MAX_BYTES = 1 << 20


class Content:
    """The image's files as its user sees them, from one walk over its layers: sizes and hashes,
    and the content of a few."""

    def __init__(self, archive: Archive, base_layers: int) -> None:
        self.files: dict[str, room.FileRecord] = {}
        self.texts: dict[str, bytes] = {}
        self.digests: list[str] = []
        for number in range(len(archive.diff_ids)):
            self.digests.append(_digest_of(archive, number))
            if number < base_layers:
                continue
            for tar, member in archive.entries(number):
                name = image_archive.clean(member.name)
                if member.isreg():
                    self.files[name], text = _record_of(tar, member)
                    if text is not None:
                        self.texts[name] = text


def _digest_of(archive: Archive, number: int) -> str:
    digest, file = hashlib.sha256(), archive.layer(number)
    while block := file.read(1 << 20):
        digest.update(block)
    return f"sha256:{digest.hexdigest()}"


def _record_of(tar: Any, member: Any) -> tuple[room.FileRecord, bytes | None]:
    digest, file, kept = hashlib.sha256(), tar.extractfile(member), []
    keep = member.size <= image_archive.JSON_MAX_BYTES and not image_archive.clean(member.name).endswith(".py")
    while block := file.read(1 << 20):
        digest.update(block)
        if keep:
            kept.append(block)
    return room.FileRecord(member.size, digest.hexdigest()), b"".join(kept) if keep else None


Finding = Tuple[str, List[str]]


def findings(archive: Archive) -> Iterator[Finding]:
    """(what was recomputed, what differs), one after the other; an empty list means that nothing differs."""
    base_layers = len(archive.diff_ids) - sum(
        1
        for entry in archive.config.get("history", [])
        if str(entry.get("created_by", "")).startswith("COPY ") and entry.get("created") == image_archive.EPOCH
    )
    content = Content(archive, base_layers)
    differ = [
        f"layer {n}: {says[:19]} in the configuration, {is_[:19]} recomputed"
        for n, (says, is_) in enumerate(zip(archive.diff_ids, content.digests))
        if says != is_
    ]
    yield f"{len(archive.diff_ids)} layers are what the configuration says", differ
    try:
        about = json.loads(content.texts["srv/passport.json"])
        labels = archive.config["config"]["Labels"]
    except (KeyError, ValueError, TypeError) as error:
        yield "there is a passport", [f"srv/passport.json or the labels: {type(error).__name__}: {error}"]
        return
    expected = passport.labels(about, content.files["srv/passport.json"].sha256)
    differ = [
        f"label {name}: {labels.get(name)!r}, the passport gives {value!r}"
        for name, value in expected.items()
        if labels.get(name) != value
    ]
    yield "the labels are the passport's, its sha256 included", differ
    yield "each room's manifest was made from the ones before it", list(_chain(about["rooms"]))
    differ = []
    expected_files = passport.files_of(about)
    for name in ("engines", "model_repo"):
        manifest = passport.manifest_bytes(about["rooms"][name]["manifest"])
        expected_files[f"srv/{name}/{room.MANIFEST}"] = room.FileRecord(len(manifest), passport.sha256(manifest))
    for name, record in expected_files.items():
        actual = content.files.get(name)
        if actual != record:
            differ.append(
                f"{name}: sha256 {record.sha256[:12]} in the passport, "
                f"{actual.sha256[:12] if actual else 'no such file'} in the image"
            )
    extra = {name for name in content.files if name.startswith("srv/")} - {*expected_files, "srv/passport.json"}
    yield (
        f"{len(expected_files)} files of engines and model repository are the rooms'",
        [*differ, *(f"{name}: in no manifest" for name in sorted(extra))],
    )
    wheels = {wheel_name(name) for name in about["rooms"]["wheels"]["manifest"]["files"] if not name.startswith("pip-")}
    found = {package(text) for name, text in content.texts.items() if ENV_SITE.fullmatch(name)}
    yield (
        f"{len(wheels)} Python packages are the wheels of the passport",
        [f"{' '.join(each)}: in one of them only" for each in sorted(wheels ^ found)],
    )
    revision = about.get("revision") or ""
    if re.fullmatch(r"[0-9a-f]{40}", revision) and _git("cat-file", "-e", revision) is not None:
        differ = [
            f"{name}: differs from revision {revision[:12]}"
            for name, record in sorted(content.files.items())
            if name.startswith(LAUNCHER)
            and passport.sha256(_git("show", f"{revision}:{name[len(LAUNCHER) :]}") or b"") != record.sha256
        ]
        yield f"the launcher is git revision {revision[:12]}'s", differ


def _chain(rooms: Mapping[str, Any]) -> Iterator[str]:
    for name, described in rooms.items():
        if passport.sha256(passport.manifest_bytes(described["manifest"])) != described["manifest_sha256"]:
            yield f"{name}: its manifest does not have the sha256 that the passport says"
        for before, read in described["manifest"]["reads"].items():
            if before not in rooms or rooms[before]["manifest_sha256"] != read:
                yield f"{name}: made from another {before}, {read[:12]}"


def wheel_name(file: str) -> tuple[str, str]:
    """'torch-2.13.0+cpu-cp311-....whl' -> ('torch', '2.13.0+cpu'), the name as PEP 503 writes it."""
    name, version = file.split("-")[:2]
    return re.sub(r"[-_.]+", "-", name).lower(), version


def package(metadata: bytes) -> tuple[str, str]:
    message = email.parser.BytesParser().parsebytes(metadata[:METADATA_MAX_BYTES], headersonly=True)
    return re.sub(r"[-_.]+", "-", message["Name"]).lower(), message["Version"]


def _git(*words: str) -> bytes | None:
    try:
        done = subprocess.run(["git", *words], cwd=PROJECT, capture_output=True, timeout=60, check=False)
    except OSError:
        return None
    return done.stdout if done.returncode == 0 else None


def verify(archive: Archive, image: str) -> None:
    print(f"{image}\n{archive.iid}\n", flush=True)
    failed: list[str] = []
    for text, differ in findings(archive):
        print(f"[{'✗' if differ else '✓'}] {text}", flush=True)
        failed += differ
    print(
        "[!] cannot be recomputed: that the weights are their publisher's, and what the accuracy report measured",
        flush=True,
    )
    if failed:
        raise reports.images.image_not_what_it_says(image, failed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--builder", default="")
    args = parser.parse_args()
    image = os.environ.get("IMAGE", "").strip()
    if not image:
        raise reports.images.which_image()
    if Path(image).is_file():
        with Archive(Path(image)) as archive:
            verify(archive, image)
        return
    builder = builders.find_builder(args.builder)
    if not builder.has(image):
        raise reports.images.no_such_image(image, builder.name)
    with tempfile.TemporaryDirectory(
        dir=PROJECT / "build" if (PROJECT / "build").is_dir() else None, prefix="verify-"
    ) as folder:
        saved = Path(folder) / "saved.tar"
        builder.save(image, saved)
        with Archive(saved) as archive:
            verify(archive, image)


if __name__ == "__main__":
    reports.run(main)
