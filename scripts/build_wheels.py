"""Room `wheels`: the Python packages of the image as wheels, each checked by the hash in requirements/.

Reads   requirements/*.txt, the room base (its Python); pip's own configuration
Writes  *.whl
Needs   pip of the interpreter that runs it

With --target cpu PyTorch must be its CPU build: a serving image for CPUs does not need gigabytes of CUDA.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scripts import reports, room
from scripts.making import ingredients

PROJECT = Path(__file__).parent.parent
# README: glibc 2.35; pip takes exactly the platforms that it is given, no older ones
GLIBC_MINOR = 35
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in range(GLIBC_MINOR, 4, -1)]
PLATFORMS += ["manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64", "linux_x86_64"]
# All lists together, about
DOWNLOADS = {"cpu": "600 MB", "cuda": "4 GB"}


@dataclass(frozen=True)
class Settings:
    """locks: names of requirements/NAME.txt; target: cpu or cuda, which build of PyTorch."""

    output: Path
    base: Path
    locks: Sequence[str]
    target: str


def lock_file(name: str, python: str) -> Path:
    """requirements/NAME.txt, or the list for that Python, if there is one: 'openai', '3.10' -> openai-3.10.txt."""
    special = PROJECT / "requirements" / f"{name}-{python}.txt"
    return special if special.is_file() else special.with_name(f"{name}.txt")


def for_target(lock: str, target: str) -> str:
    """A lock file's text; for CPUs it asks for PyTorch's CPU build by its full version."""
    return re.sub(r"^(torch==[0-9.]+)", r"\1+cpu", lock, flags=re.MULTILINE) if target == "cpu" else lock


def pip_command(python: str, folder: Path, requirements: Sequence[Path]) -> list[str]:
    """pip, for the base's interpreter, not for the one that runs pip."""
    words = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    words += ["--require-hashes", "--only-binary=:all:", "--python-version", python, "--implementation", "cp"]
    words += ["--abi", f"cp{python.replace('.', '')}", "--abi", "abi3", "--abi", "none"]
    words += [word for platform in PLATFORMS for word in ("--platform", platform)]
    words += ["--dest", str(folder)]
    return words + [word for path in requirements for word in ("--requirement", str(path))]


def build_wheels(settings: Settings) -> None:
    arguments = {"locks": list(settings.locks), "target": settings.target}
    with room.filling(settings.output, {"base": settings.base}, arguments) as filling:
        python = room.read_manifest(settings.base)["facts"]["python"]
        files = [lock_file(name, python) for name in settings.locks]
        lists = ", ".join(f"requirements/{file.name}" for file in files)
        room.say("wheels", f"for CPython {python}: {lists}; at most {DOWNLOADS[settings.target]} to download")
        requirements = []
        for file in files:
            ingredients.note_path(file)
            requirements.append(filling.path / file.name)
            requirements[-1].write_text(for_target(file.read_text(), settings.target))
        with room.waiting("wheels", "pip, which downloads missing packages"):
            done = subprocess.run(
                pip_command(python, filling.path, requirements), capture_output=True, text=True, check=False
            )
        if done.returncode:
            last = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()[
                -6:
            ]
            raise reports.images.wheels_not_fetched(settings.target, last)
        for path in requirements:
            path.unlink()
        for path in sorted(filling.path.glob("*.whl")):
            filling.take(path.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag in ("--output", "--base"):
        parser.add_argument(flag, type=Path, required=True)
    parser.add_argument("--lock", action="append", default=[])
    parser.add_argument("--target", choices=["cpu", "cuda"], required=True)
    args = parser.parse_args()
    build_wheels(Settings(args.output, args.base, args.lock, args.target))


if __name__ == "__main__":
    reports.run(main)
