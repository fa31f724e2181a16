"""What was baked: how to run it (`make image`), and each layer with its bytes and its reason (`make size`).

Reads   the room image; with --root also engines and model_repo, to say what the image adds to them
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from scripts import reports, room
from scripts.images import builders
from scripts.settings import PORTS

# docker decides which addresses are published; the container listens on all its addresses.
TRITON = f"{PORTS['HTTP_PORT']}-{PORTS['METRICS_PORT']}"
PUBLISHED = " ".join(f"--publish 127.0.0.1:{ports}:{ports}" for ports in (TRITON, PORTS["OPENAI_PORT"]))
RUN = "docker run --rm {gpus}--stop-timeout 40 " + PUBLISHED + " {tag}"


def run_command(tag: str, passport: dict[str, Any]) -> str:
    """The command that serves it. --stop-timeout: running requests get 20 s, but docker alone waits only 10 s."""
    gpus = passport["engine"]["kind"] == "tensorrt"
    return RUN.format(
        gpus="--gpus all --shm-size 8g --ulimit memlock=-1 --ulimit stack=67108864:1073741824 " if gpus else "", tag=tag
    )


def table(described: dict[str, Any]) -> list[str]:
    """One line per layer, and one for the sum."""
    lines = [
        f"{room.human_bytes(layer['size_bytes']):>10}  {layer['instruction'] or '(base)':<46} {layer['why']}"
        for layer in described["layers"]
    ]
    total_bytes = sum(layer["size_bytes"] for layer in described["layers"])
    return [*lines, f"{room.human_bytes(total_bytes):>10}  {described['tag']}"]


def beyond(described: dict[str, Any], root: Path) -> dict[str, int]:
    """Bytes of the image, of its base, of engines with tokenizer, and of the rest."""
    total = sum(layer["size_bytes"] for layer in described["layers"])
    base = sum(layer["size_bytes"] for layer in described["layers"] if not layer["instruction"])
    engines = room.read_manifest(root / "engines")["files"]
    tokenizer = {
        name: record
        for name, record in room.read_manifest(root / "model_repo")["files"].items()
        if "/tokenizer/" in name
    }
    rooms = sum(record["size_bytes"] for record in [*engines.values(), *tokenizer.values()])
    return {
        "image_bytes": total,
        "base_bytes": base,
        "engines_and_tokenizer_bytes": rooms,
        "added_bytes": total - base - rooms,
    }


def summary(sums: dict[str, int]) -> str:
    """What `beyond` counts, as a sentence."""
    image, base, rooms, added = (
        room.human_bytes(sums[f"{name}_bytes"]) for name in ("image", "base", "engines_and_tokenizer", "added")
    )
    return (
        f"The image has {image}: {base} of base, {rooms} of engines and tokenizer, {added} of packages, launcher, "
        "configs and passport."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image-room", type=Path, required=True)
    parser.add_argument("--builder", default="")
    parser.add_argument("--root", type=Path)
    parser.add_argument("--layers", action="store_true")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    room.read_manifest(args.image_room)
    described = json.loads((args.image_room / "layers.json").read_bytes())
    if args.layers:
        sums = beyond(described, args.root)
        if args.json:
            print(json.dumps({**described, **sums}, indent=2))
            return
        print("\n".join(table(described)))
        print(f"\n{summary(sums)}")
        return
    builder = builders.find_builder(args.builder)
    builders.kept(builder, described)
    passport = json.loads((args.image_room / "passport.json").read_bytes())
    print(f"\n  {described['iid']}\n\n  {run_command(described['tag'], passport)}\n", flush=True)


if __name__ == "__main__":
    reports.run(main)
