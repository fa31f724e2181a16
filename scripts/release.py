"""What a release refuses, asked before anything is put together: `make release VERSION=x.y.z`.

Reads   git, docker/toolchains.json, docker/contracts/sources.json; with --root also the rooms engines and verified
Needs   nothing but the standard library

The image itself is not made by this version: where nothing is refused, the last report says so.
"""

import argparse
import json
import re
import subprocess
from pathlib import Path
from typing import Any, Dict, Mapping

from scripts import contracts, errors, room

# Tables that only some choices use; the others are used by every release with ENGINE=tensorrt.
ONLY_WITH = {"quantize": "QUANT", "convert": "QUANT", "rank-tensors": "tests"}


def inferred_cells(row: Mapping[str, Any], sources: Mapping[str, Any], quant: str) -> Dict[str, str]:
    """What of a toolchain has no primary source: cell or table -> the reason. row: of toolchains.json; sources: contracts/sources.json."""
    cells = {f"toolchains.json {cell}": reason for cell, reason in row.get("inferred", {}).items()}
    for kind, name in row["contract"].items():
        table = f"{kind}/{name}.json"
        if sources[table].get("inferred") and (quant or kind not in ONLY_WITH):
            cells[f"contracts/{table}"] = sources[table]["inferred_reason"]
    return cells


def check_version(version: str) -> None:
    """A release has a number of three parts."""
    if not re.fullmatch(r"\d+\.\d+\.\d+", version):
        raise errors.bad_setting("VERSION", version, "x.y.z, three numbers", errors.make("release", VERSION="1.0.0"))


def check_tree() -> None:
    """What is released is what is committed."""
    done = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, timeout=60, check=False)
    if done.returncode or done.stdout.strip():
        raise errors.tree_not_clean((done.stderr or done.stdout).strip().splitlines())


def check_toolchain(trtllm_version: str, quant: str, accepted: bool) -> None:
    """NVIDIA's image by digest, and nothing that was only inferred, unless that is accepted in so many words."""
    row = contracts.toolchain(trtllm_version)
    if not row["digest"]:
        raise errors.toolchain_not_pinned(trtllm_version, row["image"])
    sources = json.loads((contracts.DOCKER / "contracts" / "sources.json").read_text())
    cells = inferred_cells(row, sources, quant)
    if cells and not accepted:
        raise errors.toolchain_inferred(trtllm_version, cells)


def check_rooms(root: Path) -> None:
    """The engines are real ones, and it was they who said what Hugging Face's model says."""
    engines, verified = room.read_manifest(root / "engines"), room.read_manifest(root / "verified")
    if engines["facts"].get("rehearsal"):
        raise errors.engines_rehearsed(root / "engines")
    asked, here = verified["reads"]["engines"], room.manifest_sha256(root / "engines")
    if verified["facts"].get("passed") is not True or asked != here:
        raise errors.room_damaged(root / "verified", "manifest.json", f"engines {asked[:12]}", here[:12])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag in ("--engine", "--trtllm-version", "--version"):
        parser.add_argument(flag, required=True)
    parser.add_argument("--quant", default="")
    parser.add_argument("--inferred", default="", help="accept: tables without a primary source may be used")
    parser.add_argument(
        "--root", type=Path, help="the rooms, once they are made; without it only what can be known before"
    )
    args = parser.parse_args()
    if args.root is None:
        check_version(args.version)
        check_tree()
        if args.engine == "tensorrt":
            check_toolchain(args.trtllm_version, args.quant, args.inferred == "accept")
        return
    check_rooms(args.root)
    raise errors.no_image_yet(args.version)


if __name__ == "__main__":
    errors.run(main)
