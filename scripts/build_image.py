"""Room `image`: the serving image, from verified rooms, in canonical form: the same rooms give the same digest.

Reads   the rooms engines, model_repo, verified, base, wheels and what they were made from; docker/Dockerfile; the
        weights' licences
Writes  image.iid (the config's digest), passport.json, layers.json, the Dockerfile as it was built; the image itself
        into docker or buildah
Needs   docker or buildah, and the standard library

The build's context is a temporary folder of links to the files in the rooms' manifests,
so it cannot hold weights or anything else.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Mapping, Sequence

from scripts import build_base, release, reports, room
from scripts.images import archive, builders, launcher, passport
from scripts.making import ingredients
from scripts.serving import launch

PROJECT = Path(__file__).parent.parent
DOCKERFILE = PROJECT / "docker" / "Dockerfile"
LICENCE_FILES = ("LICENSE*", "LICENCE*", "USE_POLICY*", "NOTICE*")
# For a moment the disk holds the builder's archive and the canonical one. 1.5 GB: the packages of a CPU image.
COPIES, PACKAGES_BYTES = 2, 1_500_000_000


@dataclass(frozen=True)
class Settings:
    """What to bake. revision: of git; licence: SPDX name or 'llama2' (models/*.mk)."""

    output: Path
    root: Path
    base: Path
    wheels: Path
    weights: Path
    model: str
    licence: str
    revision: str
    builder: str
    no_cache: bool

    @property
    def tag(self) -> str:
        """docker's name for the image: the model and the variant, in characters that a name may have."""
        name, variant = (
            re.sub(r"[^a-z0-9._-]+", "-", word.lower()).strip("-._") for word in (self.model, self.root.name)
        )
        return f"trtllm-bake/{name or 'model'}:{variant}"


# --- core ---


def dockerfile_for(world_size: int) -> str:
    ingredients.note_path(DOCKERFILE)
    return archive.for_ranks(DOCKERFILE.read_text(), world_size)


def rank_of(file: str, world_size: int) -> int | None:
    """'rank1.engine' -> 1; None for a file that belongs to all ranks."""
    match = re.fullmatch(r"rank(\d+)\.\w+", file)
    return int(match[1]) if match and int(match[1]) < world_size else None


# --- shell ---


def place(source: Path, target: Path) -> None:
    """Put a file into the context, without copying its bytes if the file system allows that."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def place_room(
    folder: Path, manifest: Mapping[str, Any], target_of: Callable[[str], Path], heard: Callable[[int], object]
) -> None:
    """Put a room's files into the context. Each is compared with its hash,
    so that a file changed later does not get into an image."""
    for name in manifest["files"]:
        expected, actual = room.record_of(manifest, name), room.sha256_of(folder / name)
        if (expected.size_bytes, expected.sha256) != (actual.size_bytes, actual.sha256):
            raise reports.rooms.room_damaged(
                folder, name, f"sha256 {expected.sha256[:12]}", f"sha256 {actual.sha256[:12]}"
            )
        place(folder / name, target_of(name) / name)
        heard(actual.size_bytes)
    place(folder / room.MANIFEST, target_of(room.MANIFEST) / room.MANIFEST)


def place_licences(settings: Settings, target: Path) -> None:
    """The licences of the project and of the model, which Meta's download puts beside the models' folders."""
    ingredients.note("LICENSE")
    place(PROJECT / "LICENSE", target / "trtllm-bake" / "LICENSE")
    for folder in (settings.weights.resolve().parent, settings.weights):
        for pattern in LICENCE_FILES if folder == settings.weights or settings.licence.startswith("llama") else ():
            for file in sorted(folder.glob(pattern)):
                if file.is_file():
                    (target / "model" / file.name).unlink(missing_ok=True)
                    place(file, target / "model" / file.name)
    if notice := release.NOTICES.get(settings.licence):
        (target / "model").mkdir(parents=True, exist_ok=True)
        (target / "model" / "NOTICE").unlink(missing_ok=True)
        (target / "model" / "NOTICE").write_text(notice)


@contextmanager
def shown(total_bytes: int) -> Iterator[Callable[[int], object]]:
    bar = room.progress(total_bytes, "image")
    try:
        yield bar.update
    finally:
        bar.close()


def check_disk(folder: Path, rooms_bytes: int) -> None:
    needed_bytes = COPIES * (rooms_bytes + PACKAGES_BYTES)
    stat = os.statvfs(folder)
    if stat.f_bavail * stat.f_frsize < needed_bytes:
        raise reports.images.no_space_to_bake(folder, stat.f_bavail * stat.f_frsize, needed_bytes)


def build_image(settings: Settings) -> None:
    root = settings.root
    reads = {name: root / name for name in ("engines", "model_repo", "verified")}
    reads.update(base=settings.base, wheels=settings.wheels)
    arguments = {"model": settings.model, "licence": settings.licence, "revision": settings.revision or None}
    with room.filling(settings.output, reads, arguments) as filling:
        rooms = passport.chain(list(reads.values()), [root, root.parent, settings.base.parent])
        release.check_verified(root)
        manifests = {name: rooms[name]["manifest"] for name in reads}
        base, world_size = manifests["base"]["facts"], manifests["engines"]["facts"]["world_size"]
        rooms_bytes = sum(
            record["size_bytes"] for name in ("engines", "model_repo") for record in manifests[name]["files"].values()
        )
        check_disk(filling.path, rooms_bytes)
        builder = builders.find_builder(settings.builder)
        room.say(
            "image",
            f"{world_size} ranks, {room.human_bytes(rooms_bytes)} of rooms, on "
            f"{base.get('image') or base['made_from']}, by {builder.name}",
        )
        context = filling.path / "context"
        shutil.rmtree(context, ignore_errors=True)
        try:
            dockerfile, about = assemble(settings, rooms, context, rooms_bytes)
            image = bake(settings, builder, filling.path, context, dockerfile, about, manifests["base"], base)
        finally:
            shutil.rmtree(context, ignore_errors=True)
        filling.write("Dockerfile", dockerfile.encode())
        filling.write("passport.json", passport.as_bytes(about))
        layers = [
            {
                "digest": layer.digest,
                "size_bytes": layer.size_bytes,
                "instruction": layer.instruction,
                "why": layer.why,
                "files": len(layer.files),
            }
            for layer in image.layers
        ]
        filling.write_json(
            "layers.json", {"iid": image.iid, "manifest": image.manifest_digest, "tag": settings.tag, "layers": layers}
        )
        filling.write("image.iid", image.iid.encode())
        filling.facts = {"iid": image.iid, "manifest": image.manifest_digest, "tag": settings.tag}
        total_bytes = sum(layer.size_bytes for layer in image.layers)
        room.say(
            "image", f"{settings.tag} {image.iid[:19]}: {len(image.layers)} layers, {room.human_bytes(total_bytes)}"
        )


def assemble(
    settings: Settings, rooms: Mapping[str, Mapping[str, Any]], context: Path, rooms_bytes: int
) -> tuple[str, dict[str, Any]]:
    """Fill the build's context; returns its Dockerfile and the passport."""
    root = settings.root
    engines, model_repo = (rooms[name]["manifest"] for name in ("engines", "model_repo"))
    world_size = engines["facts"]["world_size"]
    with shown(rooms_bytes) as heard:

        def engine_place(name: str) -> Path:
            rank = rank_of(name, world_size)
            return context / ("engines" if rank is None else f"rank{rank}")

        place_room(root / "engines", engines, engine_place, heard)
        place_room(root / "model_repo", model_repo, lambda _: context / "model_repo", heard)
    for rank in range(world_size):
        if not (context / f"rank{rank}").is_dir():
            raise reports.images.rank_file_missing(root / "engines", rank, world_size)
    (context / "wheels").mkdir()
    for wheel in rooms["wheels"]["manifest"]["files"]:
        place(settings.wheels / wheel, context / "wheels" / wheel)
    for file in launcher.files():
        place(PROJECT / file, context / "app" / file)
    place_licences(settings, context / "licenses")
    report = json.loads((root / "verified" / "report.json").read_bytes())
    config = json.loads((root / "engines" / "config.json").read_bytes())
    about = passport.passport(
        settings.model,
        rooms,
        passport.weights_of(settings.weights, rooms),
        report,
        config,
        settings.revision or None,
        settings.licence,
    )
    (context / "passport").mkdir()
    (context / "passport" / "passport.json").write_bytes(passport.as_bytes(about))
    place_compiled(root, rooms["wheels"]["manifest"]["files"], context / "passport" / launch.COMPILED)
    dockerfile = dockerfile_for(world_size)
    (context / "Dockerfile").write_text(dockerfile)
    return dockerfile, about


def place_compiled(root: Path, wheels: Iterable[str], target: Path) -> None:
    """Kernels that the engine compiled on a GPU (make verified, serve),
    for an image that also has the compiler (TARGET=cuda)."""
    compiled = root / launch.COMPILED
    if not compiled.is_dir() or not any(wheel.startswith("triton-") for wheel in wheels):
        return
    for path in sorted(compiled.rglob("*")):
        # an unfinished kernel has another name
        if path.is_file() and not path.name.startswith("tmp.") and path.name != "lock":
            place(path, target / path.relative_to(compiled))


def base_of(builder: builders.Builder, base_room: Path, manifest: Mapping[str, Any]) -> str:
    """The name of the base for FROM. One made from Debian packages is loaded first if the builder does not have it."""
    image = manifest["facts"].get("image")
    if not image:
        image = build_base.base_tag(manifest)
        if not builder.has(image):
            with room.waiting("image", f"{builder.name}, which loads the base"):
                builder.make_base(base_room / "base.tar", image)
    elif not builder.has(image):
        raise reports.images.base_not_here(image, builder.name)
    elif image.startswith("sha256:"):  # BuildKit's FROM takes no id
        name = f"localhost/trtllm-bake-toolchain:{image[7:19]}"
        builder.tag(image, name)
        return name
    return str(image)


def bake(
    settings: Settings, builder: builders.Builder, folder: Path, context: Path, dockerfile: str, about: Mapping[str, Any],
    base_manifest: Mapping[str, Any], base: Mapping[str, Any],
) -> archive.Image:  # fmt: skip
    """Build the image, bring it into canonical form, and load that into the builder under its name."""
    base_image = base_of(builder, settings.base, base_manifest)
    base_layers = builder.layers(base_image)
    if base.get("layers") and base["layers"] != base_layers:
        raise reports.images.base_changed(base_image, base["layers"][-1], base_layers[-1])
    below = archive.Base(len(base_layers))
    if not base.get("image"):
        made = {"created": archive.EPOCH, "created_by": build_base.CREATED_BY, "comment": "from Debian packages"}
        below = archive.Base(1, settings.base / "base.tar", [made])
    labels = passport.labels(about, passport.sha256(passport.as_bytes(about)))
    arguments = {
        "BASE": base_image,
        "VENV_FLAGS": "--system-site-packages" if about["engine"]["kind"] == "tensorrt" else "",
    }
    building, started = f"localhost/trtllm-bake-building:{os.getpid()}", time.monotonic()
    built, canonical = folder / "built.tar", folder / "canonical.tar"
    for leftover in (built, canonical):
        leftover.unlink(missing_ok=True)
    try:
        try:
            with room.waiting("image", f"{builder.name}, which builds"):
                builder.build(context, arguments, labels, building, settings.no_cache)
            room.say("image", f"built in {time.monotonic() - started:.0f} s; now in canonical form")
            with room.waiting("image", f"{builder.name}, which saves the image"):
                builder.save(building, built)
        finally:
            if builder.has(building):
                builder.remove(building)
        with archive.Archive(built) as source, open(canonical, "wb") as out:
            total_bytes = sum(source.layer_bytes(number) for number in range(len(source.diff_ids)))
            with shown(total_bytes) as heard:
                image = archive.write_canonical(
                    source, below, archive.layers_of(dockerfile), out, [settings.tag], labels, heard
                )
        built.unlink()
        with room.waiting("image", f"{builder.name}, which loads the image"):
            builder.load(canonical, settings.tag)
        return image
    finally:
        for leftover in (built, canonical):
            leftover.unlink(missing_ok=True)


def arguments_of(words: Sequence[str] | None = None) -> Settings:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag in ("--output", "--root", "--base", "--wheels", "--weights"):
        parser.add_argument(flag, type=Path, required=True)
    parser.add_argument("--model", required=True)
    for flag in ("--license", "--revision", "--builder", "--no-cache"):
        parser.add_argument(flag, default="")
    args = parser.parse_args(words)
    return Settings(
        args.output, args.root, args.base, args.wheels, args.weights, args.model, args.license, args.revision, args.builder,
        args.no_cache not in ("", "0"),
    )  # fmt: skip


def main() -> None:
    build_image(arguments_of())


if __name__ == "__main__":
    reports.run(main)
