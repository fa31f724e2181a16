"""Checks what a release refuses, before anything is made: `make release VERSION=x.y.z`.
scripts/images/dist.py then writes it.

Reads   git, docker/toolchains.json, docker/contracts/sources.json, the weights' licence
Needs   nothing but the standard library
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any, Mapping, Sequence

from scripts import reports, room
from scripts.images import builders, signing
from scripts.nvidia import contracts

BASE_LOCK = Path(__file__).parents[1] / "docker" / "base.txt"
# What a licence requires to be passed on with the model: files, and a notice.
PASSED_ON = ("LICENSE", "USE_POLICY")
NOTICES = {
    "llama2": "Llama 2 is licensed under the LLAMA 2 Community License, Copyright (c) Meta Platforms, Inc. All Rights Reserved.\n",
}
# Tables that only some choices use; the others are used by every release with ENGINE=tensorrt.
ONLY_WITH = {"quantize": "QUANT", "convert": "QUANT", "rank-tensors": "tests"}


def inferred_cells(row: Mapping[str, Any], sources: Mapping[str, Any], quant: str) -> dict[str, str]:
    """The parts of a toolchain without a primary source: cell or table -> the reason. row: of toolchains.json; sources:
    contracts/sources.json."""
    cells = {f"toolchains.json {cell}": reason for cell, reason in row.get("inferred", {}).items()}
    for kind, name in row["contract"].items():
        table = f"{kind}/{name}.json"
        if sources[table].get("inferred") and (quant or kind not in ONLY_WITH):
            cells[f"contracts/{table}"] = sources[table]["inferred_reason"]
    return cells


def check_version(version: str) -> None:
    """A Problem unless the version has three numbers."""
    if not re.fullmatch(r"\d+\.\d+\.\d+", version):
        raise reports.settings.bad_setting(
            "VERSION", version, "x.y.z, three numbers", reports.make("release", VERSION="1.0.0")
        )


def check_tree() -> None:
    """A Problem if the tree has changes that are not committed."""
    done = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, timeout=60, check=False)
    if done.returncode or done.stdout.strip():
        raise reports.releasing.tree_not_clean((done.stderr or done.stdout).strip().splitlines())


def check_toolchain(trtllm_version: str, quant: str, accepted: bool) -> None:
    """A Problem unless NVIDIA's image is named by digest and nothing is only inferred (or INFERRED=accept)."""
    row = contracts.toolchain(trtllm_version)
    if not row["digest"]:
        raise reports.releasing.toolchain_not_pinned(trtllm_version, row["image"])
    sources = json.loads((contracts.DOCKER / "contracts" / "sources.json").read_text())
    cells = inferred_cells(row, sources, quant)
    if cells and not accepted:
        raise reports.releasing.toolchain_inferred(trtllm_version, cells)


def check_license(license: str, weights: Path) -> None:
    """A Problem without the licence, use policy and notice,
    which must be passed on with a Llama (Llama 2 Community License, 1.b)."""
    if not license:
        raise reports.images.which_license()
    if license.startswith("llama"):
        folders = (weights, weights.resolve().parent)
        missing = [name for name in PASSED_ON if not any(list(folder.glob(f"{name}*")) for folder in folders)]
        if missing:
            raise reports.images.license_files_missing(license, weights, missing)


def unpinned(packages: Sequence[str], pinned: Sequence[str]) -> list[str]:
    """'+ package' for what a base has and docker/base.txt does not, '- package' for the opposite."""
    return [f"+ {line}" for line in packages if line not in pinned] + [
        f"- {line}" for line in pinned if line not in packages
    ]


def check_base(engine: str, base_image: str, builder: str, made: Path) -> None:
    """A Problem unless the base can be made again: an image by digest, or Debian packages that docker/base.txt pins.
    made: the room base of Debian packages, compared if it is there; once the image is built,
    images/dist.py always compares it."""
    if base_image:
        if "@sha256:" not in base_image:
            keeper = builders.find_builder(builder)
            if not keeper.has(base_image):
                raise reports.images.base_not_here(base_image, keeper.name)
            if not keeper.digest(base_image):
                raise reports.images.base_not_pinned([f"{base_image}: a name without a digest"])
    elif engine == "torch":
        pinned = BASE_LOCK.read_text().splitlines() if BASE_LOCK.is_file() else []
        if not pinned:
            raise reports.images.base_not_pinned(["docker/base.txt is missing or empty"])
        if (made / "packages.txt").is_file() and room.is_room(made):
            differ = unpinned((made / "packages.txt").read_text().splitlines(), pinned)
            if differ:
                raise reports.images.base_not_pinned(differ[:12])


def check_verified(root: Path) -> None:
    """A Problem unless exactly these engines were verified."""
    verified = room.read_manifest(root / "verified")
    asked, here = verified["reads"]["engines"], room.manifest_sha256(root / "engines")
    if verified["facts"].get("passed") is not True or asked != here:
        raise reports.rooms.room_damaged(root / "verified", "manifest.json", f"engines {asked[:12]}", here[:12])


def check_rooms(root: Path) -> None:
    """A Problem unless the engines are real and verified."""
    if room.read_manifest(root / "engines")["facts"].get("rehearsal"):
        raise reports.releasing.engines_rehearsed(root / "engines")
    check_verified(root)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag in ("--engine", "--trtllm-version", "--version"):
        parser.add_argument(flag, required=True)
    for flag in ("--quant", "--license"):
        parser.add_argument(flag, default="")
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--inferred", default="", help="accept: tables without a primary source may be used")
    args = parser.parse_args()
    check_version(args.version)
    check_tree()
    check_license(args.license, args.weights)
    if args.engine == "tensorrt":
        check_toolchain(args.trtllm_version, args.quant, args.inferred == "accept")
    # make passes on what the user typed
    target = os.environ.get("TARGET", "").strip() or "cpu"
    base_image, builder = (os.environ.get(name, "").strip() for name in ("BASE_IMAGE", "BUILDER"))
    check_base(args.engine, base_image, builder, Path("build") / f"ground-torch-{target}" / "base")
    if key := os.environ.get("KEY", "").strip():
        signing.check_key(Path(key))


if __name__ == "__main__":
    reports.run(main)
