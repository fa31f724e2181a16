"""Writes dist/<model>-<version>/: the image as an OCI archive, and what a company asks of it. `make release VERSION=x.y.z [KEY=file]`.

Reads   the room image and the rooms before it; docker/base.txt; the image from docker or buildah; git
Writes  image.oci.tar, passport.json, sbom.cdx.json, provenance.intoto.json, RELEASE.md, SHA256SUMS; with KEY their signatures
Needs   cyclonedx-python-lib; openssl, to sign

Nothing in it has the time of its making: the same commit and rooms give the same files (signatures apart: ECDSA's are new each time).
Formats: OCI image layout; CycloneDX 1.6; in-toto Statement v1 with SLSA provenance v1; cosign's (specs/SIGNATURE_SPEC.md, sign-blob, DSSE).
"""

import argparse
import base64
import json
import os
import shutil
import subprocess
import uuid
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

from scripts import release, reports, room, show_image, verify_image
from scripts.images import archive as image_archive
from scripts.images import builders, passport

PROJECT = Path(__file__).parents[2]
BASE_LOCK = PROJECT / "docker" / "base.txt"
ARCHIVE = "image.oci.tar"
SUMS = "SHA256SUMS"
STATEMENT = "https://in-toto.io/Statement/v1"
PROVENANCE = "https://slsa.dev/provenance/v1"
# ours: what the fields of externalParameters mean is in docker/README.md
BUILD_TYPE = "trtllm-bake/make-image/v1"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
DPKG_STATUS = "var/lib/dpkg/status"


@dataclass(frozen=True)
class Settings:
    """What to release. key: an EC P-256 private key in PEM form, or None: nothing is signed."""

    image_room: Path
    base: Path
    version: str
    builder: str
    key: Optional[Path]
    timing_cache: Path

    @property
    def root(self) -> Path:
        return self.image_room.parent

    @property
    def folder(self) -> Path:
        return PROJECT / "dist" / f"{self.root.parent.name}-{self.version}"


# --- core ---


def packages_in(archive: image_archive.Archive) -> Iterator[Tuple[str, str, str]]:
    """(type of package URL, name, version) of every Debian and Python package that the image has."""
    texts: Dict[str, bytes] = {}
    for number in range(len(archive.diff_ids)):
        for tar, member in archive.entries(number):
            name = image_archive.clean(member.name)
            wanted = name == DPKG_STATUS or name.endswith(".dist-info/METADATA")
            if wanted and member.isreg() and member.size <= image_archive.JSON_MAX_BYTES:
                file = tar.extractfile(member)
                assert file is not None
                texts[name] = file.read()
    from scripts.build_base import packages_of

    for line in packages_of(texts.pop(DPKG_STATUS, b"").decode()):
        name, version, architecture = line.split()
        yield "deb", f"{name}:{architecture}", version
    for name, version in sorted(verify_image.package(text) for text in texts.values()):
        yield "pypi", name, version


def bill_of_materials(
    packages: Sequence[Tuple[str, str, str]], about: Mapping[str, Any], image: image_archive.Image, when: datetime
) -> str:
    """CycloneDX 1.6 as JSON: Debian and Python packages, the launcher, the model with its weights' hashes."""
    from cyclonedx.model import HashAlgorithm, HashType, Property
    from cyclonedx.model.bom import Bom
    from cyclonedx.model.component import Component, ComponentType
    from cyclonedx.output.json import JsonV1Dot6
    from packageurl import PackageURL

    def sha256(value: str) -> HashType:
        return HashType(alg=HashAlgorithm.SHA_256, content=value)

    wheels = {
        verify_image.wheel_name(name): record["sha256"]
        for name, record in about["rooms"]["wheels"]["manifest"]["files"].items()
    }
    bom = Bom(serial_number=uuid.uuid5(uuid.NAMESPACE_URL, image.iid))
    bom.metadata.timestamp = when
    bom.metadata.component = Component(
        type=ComponentType.CONTAINER,
        name=about["model"],
        version=image.iid,
        bom_ref="image",
        hashes=[sha256(image.iid.partition(":")[2])],
    )
    for kind, name, version in packages:
        name, _, architecture = name.partition(":")
        qualifiers = {"arch": architecture} if architecture else None
        url = PackageURL(kind, "debian" if kind == "deb" else None, name, version, qualifiers)
        hashes = [sha256(wheels[name, version])] if kind == "pypi" and (name, version) in wheels else []
        bom.components.add(
            Component(
                type=ComponentType.LIBRARY, name=name, version=version, purl=url, bom_ref=url.to_string(), hashes=hashes
            )
        )
    bom.components.add(
        Component(
            type=ComponentType.APPLICATION, name="trtllm-bake", version=about["revision"] or "", bom_ref="launcher"
        )
    )
    weights = [
        Component(type=ComponentType.FILE, name=name, bom_ref=f"weights/{name}", hashes=[sha256(record["sha256"])])
        for name, record in about["weights"].items()
    ]
    facts = {
        "engine": about["engine"]["kind"],
        "tp_size": str(about["engine"]["tp_size"]),
        "dtype": about["engine"]["dtype"],
        "licence": about["licence"],
    }
    bom.components.add(
        Component(
            type=ComponentType.MACHINE_LEARNING_MODEL,
            name=about["model"],
            bom_ref="model",
            components=weights,
            properties=[Property(name=f"trtllm-bake:{name}", value=value) for name, value in facts.items() if value],
        )  # fmt: skip
    )
    return str(JsonV1Dot6(bom).output_as_string(indent=2)) + "\n"


def provenance(
    about: Mapping[str, Any], image: image_archive.Image, archive_sha256: str, version: str
) -> Dict[str, Any]:
    """in-toto's statement of what the archive was made from (SLSA provenance v1)."""
    base = about["base"]
    dependencies: List[Dict[str, Any]] = [{"name": "git", "digest": {"gitCommit": about["revision"]}}]
    if base.get("digest"):
        dependencies.append(
            {"name": "base", "uri": base["image"], "digest": {"sha256": base["digest"].partition(":")[2]}}
        )
    else:
        tar = about["rooms"]["base"]["manifest"]["files"]["base.tar"]
        dependencies.append({"name": "base", "uri": base["made_from"], "digest": {"sha256": tar["sha256"]}})
    for name, record in about["weights"].items():
        dependencies.append({"name": f"weights/{name}", "digest": {"sha256": record["sha256"]}})
    for name, record in about["rooms"]["wheels"]["manifest"]["files"].items():
        dependencies.append({"name": f"wheels/{name}", "digest": {"sha256": record["sha256"]}})
    return {
        "_type": STATEMENT,
        "subject": [
            {"name": ARCHIVE, "digest": {"sha256": archive_sha256}},
            {"name": f"{about['model']}:{version}", "digest": {"sha256": image.manifest_digest.partition(":")[2]}},
        ],
        "predicateType": PROVENANCE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {
                    "model": about["model"],
                    "version": version,
                    "rooms": {name: described["manifest"]["arguments"] for name, described in about["rooms"].items()},
                },
                "internalParameters": {"toolchain": about["toolchain"]},
                "resolvedDependencies": dependencies,
            },
            "runDetails": {
                "builder": {"id": "trtllm-bake", "version": {"trtllm-bake": about["revision"]}},
                "byproducts": [
                    {"name": f"rooms/{name}", "digest": {"sha256": described["manifest_sha256"]}}
                    for name, described in about["rooms"].items()
                ],
            },
        },
    }


def notes(about: Mapping[str, Any], image: image_archive.Image, version: str, name: str, signed: bool) -> str:
    """RELEASE.md: everything in it is the passport's."""
    engine, toolchain, base = about["engine"], about["toolchain"], about["base"]
    report = about["accuracy"]
    checks = "\n".join(
        f"| {check['name']} | {check.get('value')} | {check.get('limit')} | {'passed' if check['passed'] else 'FAILED'} |"
        for check in report["checks"]
    )
    run = show_image.run_command(name, dict(about))
    gpu = (
        f"{engine['gpu']['name']}, compute capability {engine['gpu']['compute_capability']}"
        if engine["gpu"]
        else "none is needed"
    )
    identical = (
        "The engines are not bit-identical when they are built again: TensorRT chooses kernels by timing them. `timing-cache` is the "
        "cache they were built with; building with it makes the choices the same on the same GPU, driver and TensorRT, which upstream "
        "does not promise. The image from these engines is bit-identical."
        if engine["kind"] == "tensorrt"
        else "The same commit, weights and base give the same image, bit for bit."
    )
    formats = "" if engine["kind"] == "tensorrt" else " (its formats and tensors; this image has the torch engine)"
    verify = (
        "openssl dgst -sha256 -verify cosign.pub -signature <(base64 -d image.oci.tar.sig) image.oci.tar   # or cosign verify-blob"
        if signed
        else "it was not signed"
    )
    return f"""# {about["model"]} {version}

| | |
|---|---|
| image | `{image.iid}` (config), `{image.manifest_digest}` (manifest of {ARCHIVE}) |
| engines | {engine["kind"]}, TP={engine["tp_size"]}, PP={engine["pp_size"]}, {engine["dtype"]} |
| GPU | {gpu} |
| TensorRT-LLM | {toolchain["trtllm"]}{formats} |
| base | {base.get("image") or base["made_from"]} {base.get("digest") or ""} |
| git | {about["revision"]} |
| licence of the model | {about["licence"]} |

    docker load --input {ARCHIVE}
    {run}

## Accuracy

The engines against Hugging Face's model, over {report["asked"]["prompts"]} prompts:

| check | value | limit | |
|---|---|---|---|
{checks}

## Reproducible

{identical}

## Check it

    sha256sum --check {SUMS}
    make verify-image IMAGE={ARCHIVE}
    {verify}
"""


def pre_authentication(payload: bytes) -> bytes:
    """What a DSSE envelope's signature is over (github.com/secure-systems-lab/dsse, protocol.md)."""
    kind = PAYLOAD_TYPE.encode()
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)


# --- shell ---


def openssl(key: Path, *words: str, data: Optional[bytes] = None) -> bytes:
    """openssl with a private key; its password comes from COSIGN_PASSWORD, never from a command line."""
    password = ["-passin", "env:COSIGN_PASSWORD"] if "COSIGN_PASSWORD" in os.environ else []
    try:
        done = subprocess.run(["openssl", *words, *password], input=data, capture_output=True, timeout=600, check=False)
    except FileNotFoundError:
        raise reports.serving.program_missing("openssl") from None
    if done.returncode:
        raise reports.images.not_signed(
            key, (done.stderr.decode(errors="replace").strip().splitlines() or ["nothing"])[0]
        )
    return done.stdout


def sign(key: Path, folder: Path, statement: bytes, image: image_archive.Image, name: str) -> None:
    """cosign's: a signature of the archive (sign-blob), of the image (simple signing), and of the provenance (DSSE)."""
    (folder / "cosign.pub").write_bytes(openssl(key, "pkey", "-in", str(key), "-pubout"))

    def signature(*data: str, of: Optional[bytes] = None) -> str:
        return base64.b64encode(openssl(key, "dgst", "-sha256", "-sign", str(key), *data, data=of)).decode()

    (folder / f"{ARCHIVE}.sig").write_text(signature(str(folder / ARCHIVE)))
    payload = {
        "critical": {
            "identity": {"docker-reference": name.rpartition(":")[0]},
            "image": {"docker-manifest-digest": image.manifest_digest},
            "type": "cosign container image signature",
        },
        "optional": None,
    }
    simple = json.dumps(payload, separators=(",", ":")).encode()
    (folder / "image.payload.json").write_bytes(simple)
    (folder / "image.payload.json.sig").write_text(signature(of=simple))
    envelope = {
        "payloadType": PAYLOAD_TYPE,
        "payload": base64.b64encode(statement).decode(),
        "signatures": [{"keyid": "", "sig": signature(of=pre_authentication(statement))}],
    }
    (folder / "provenance.dsse.json").write_text(json.dumps(envelope) + "\n")


def check_base(base: Path, about: Mapping[str, Any]) -> None:
    """The base can be had again: an image by digest, or Debian packages that docker/base.txt pins."""
    facts = about["base"]
    if facts.get("image"):
        if not facts.get("digest") and "@sha256:" not in facts["image"]:
            raise reports.images.base_not_pinned([f"{facts['image']}: a name without a digest"])
        return
    here = (base / "packages.txt").read_text().splitlines()
    pinned = BASE_LOCK.read_text().splitlines() if BASE_LOCK.is_file() else []
    differ = [f"+ {line}" for line in here if line not in pinned] + [f"- {line}" for line in pinned if line not in here]
    if differ:
        raise reports.images.base_not_pinned(differ[:12])


def commit_time() -> datetime:
    done = subprocess.run(
        ["git", "show", "-s", "--format=%ct", "HEAD"],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return datetime.fromtimestamp(int(done.stdout), timezone.utc)


def write_release(settings: Settings) -> None:
    release.check_rooms(settings.root)
    room.read_manifest(settings.image_room)
    described = json.loads((settings.image_room / "layers.json").read_bytes())
    about = json.loads((settings.image_room / "passport.json").read_bytes())
    check_base(settings.base, about)
    dist = settings.folder
    name = f"{described['tag'].partition(':')[0]}:{settings.version}"
    if (dist / "passport.json").is_file():
        if (dist / "passport.json").read_bytes() == (settings.image_room / "passport.json").read_bytes():
            raise reports.Finished(f"{'release':<11} {reports.shown(dist)} is this image already")
        raise reports.images.release_exists(dist)
    builder = builders.find_builder(settings.builder)
    kept = builders.kept(builder, described)
    partial = dist.with_name(dist.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    saved = partial / "saved.tar"
    builder.save(kept, saved)
    dockerfile = (settings.image_room / "Dockerfile").read_text()
    added = image_archive.layers_of(dockerfile)
    labels = passport.labels(about, room.record_of(room.read_manifest(settings.image_room), "passport.json").sha256)
    with image_archive.Archive(saved) as source, open(partial / ARCHIVE, "wb") as out:
        image = image_archive.write_canonical(
            source, image_archive.Base(len(source.diff_ids) - len(added)), added, out, [name], labels
        )
        image_archive.synced(out)
    saved.unlink()
    if image.iid != described["iid"]:
        raise reports.rooms.room_damaged(
            settings.image_room, "image.iid", described["iid"][:19], f"{image.iid[:19]} in {builder.name}"
        )
    with image_archive.Archive(partial / ARCHIVE) as archive:
        packages = list(packages_in(archive))
        verify_image.verify(archive, name)
    archive_sha256 = room.sha256_of(partial / ARCHIVE).sha256
    statement = (json.dumps(provenance(about, image, archive_sha256, settings.version), indent=2) + "\n").encode()
    shutil.copyfile(settings.image_room / "passport.json", partial / "passport.json")
    (partial / "sbom.cdx.json").write_text(bill_of_materials(packages, about, image, commit_time()))
    (partial / "provenance.intoto.json").write_bytes(statement)
    (partial / "RELEASE.md").write_text(notes(about, image, settings.version, name, settings.key is not None))
    if about["engine"]["kind"] == "tensorrt" and settings.timing_cache.is_file():
        shutil.copyfile(settings.timing_cache, partial / "timing-cache")
    if settings.key:
        sign(settings.key, partial, statement, image, name)
    sums = [f"{room.sha256_of(path).sha256}  {path.name}\n" for path in sorted(partial.iterdir())]
    room.write_synced(partial / SUMS, "".join(sums).encode())
    os.rename(partial, dist)
    size_bytes = sum(path.stat().st_size for path in dist.iterdir())
    room.say(
        "release",
        f"-> {reports.shown(dist)}: {len(sums) + 1} files, {room.human_bytes(size_bytes)}{'' if settings.key else ', not signed (KEY=)'}",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag in ("--image-room", "--base"):
        parser.add_argument(flag, type=Path, required=True)
    parser.add_argument("--version", required=True)
    parser.add_argument("--builder", default="")
    parser.add_argument("--timing-cache", type=Path, default=Path("build/timing-cache"))
    args = parser.parse_args()
    key = os.environ.get("KEY", "").strip()
    write_release(
        Settings(args.image_room, args.base, args.version, args.builder, Path(key) if key else None, args.timing_cache)
    )


if __name__ == "__main__":
    reports.run(main)
