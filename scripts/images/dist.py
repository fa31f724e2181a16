"""Writes dist/<model>-<version>/: the image as an OCI archive, and the documents that companies ask for.
`make release`.

Reads   the room image and the rooms before it; docker/base.txt; the image from docker or buildah; git
Writes  image.oci.tar, passport.json, sbom.cdx.json, provenance.intoto.json, RELEASE.md, SHA256SUMS; with KEY their
        signatures
Needs   cyclonedx-python-lib; openssl, to sign

No file holds the time of its making: the same commit and rooms give the same files (except signatures: ECDSA's are new
each time).
Formats: OCI image layout; CycloneDX 1.6; in-toto Statement v1 with SLSA provenance v1; cosign's
(specs/SIGNATURE_SPEC.md, sign-blob, DSSE).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Mapping

from scripts import release, reports, room, show_image, verify_image
from scripts.images import archive as image_archive
from scripts.images import builders, passport
from scripts.images.archive import ARCHIVE
from scripts.images.provenance import provenance
from scripts.images.sbom import bill_of_materials, packages_in
from scripts.images.signing import sign

PROJECT = Path(__file__).parents[2]
SUMS = "SHA256SUMS"


@dataclass(frozen=True)
class Settings:
    """What to release. key: an EC P-256 private key in PEM form, or None: nothing is signed."""

    image_room: Path
    base: Path
    version: str
    builder: str
    key: Path | None
    timing_cache: Path

    @property
    def root(self) -> Path:
        return self.image_room.parent

    @property
    def folder(self) -> Path:
        return PROJECT / "dist" / f"{self.root.parent.name}-{self.version}"


def notes(about: Mapping[str, Any], image: image_archive.Image, version: str, name: str, signed: bool) -> str:
    """RELEASE.md; all its facts come from the passport."""
    engine, toolchain, base = about["engine"], about["toolchain"], about["base"]
    report = about["accuracy"]
    checks = "\n".join(
        f"| {check['name']} | {check.get('value')} | {check.get('limit')} | "
        f"{'passed' if check['passed'] else 'FAILED'} |"
        for check in report["checks"]
    )
    run = show_image.run_command(name, dict(about))
    gpu = (
        f"{engine['gpu']['name']}, compute capability {engine['gpu']['compute_capability']}"
        if engine["gpu"]
        else "none is needed"
    )
    identical = (
        "The engines are not bit-identical when they are built again: TensorRT chooses kernels by timing them. "
        "`timing-cache` is the cache they were built with; building with it makes the choices the same on the same "
        "GPU, driver and TensorRT, which upstream does not promise. The image from these engines is bit-identical."
        if engine["kind"] == "tensorrt"
        else "The same commit, weights and base give the same image, bit for bit."
    )
    formats = "" if engine["kind"] == "tensorrt" else " (its formats and tensors; this image has the torch engine)"
    verify = (
        "openssl dgst -sha256 -verify cosign.pub -signature <(base64 -d image.oci.tar.sig) image.oci.tar   # or "
        "cosign verify-blob"
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


def check_base(base: Path, about: Mapping[str, Any]) -> None:
    """A Problem unless the base can be made again: an image by digest, or Debian packages that docker/base.txt pins."""
    facts = about["base"]
    if facts.get("image"):
        if not facts.get("digest") and "@sha256:" not in facts["image"]:
            raise reports.images.base_not_pinned([f"{facts['image']}: a name without a digest"])
        return
    pinned = release.BASE_LOCK.read_text().splitlines() if release.BASE_LOCK.is_file() else []
    differ = release.unpinned((base / "packages.txt").read_text().splitlines(), pinned)
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
        f"-> {reports.shown(dist)}: {len(sums) + 1} files, "
        f"{room.human_bytes(size_bytes)}{'' if settings.key else ', not signed (KEY=)'}",
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
