"""Which TensorRT-LLM is used, if TOOLCHAIN does not name one:
the newest of docker/toolchains.json that runs on the GPUs.

build/gpu.json keeps the result, because nvidia-smi takes seconds. Its key is the kernel's description of the GPUs,
and the table.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Mapping, Sequence

from scripts import reports

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "docker" / "toolchains.json"
KEPT = Path("build") / "gpu.json"
SEEN_BY_THE_KERNEL = Path("/proc/driver/nvidia/gpus")
QUERY = ["nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader"]


def rows() -> dict[str, dict[str, object]]:
    """The table: version -> row, oldest first."""
    return dict(json.loads(TABLE.read_text()))


def newest_for(capability: str, table: Mapping[str, Mapping[str, object]]) -> str | None:
    """The newest version with kernels for a compute capability ('7.0'); None if there is none."""
    fitting = [version for version, row in table.items() if capability in row["architectures"]]  # type: ignore[operator]
    return fitting[-1] if fitting else None


def parse(text: str) -> list[tuple[str, str]]:
    """The answer to QUERY: (name, compute capability) of each GPU. Other lines are left out (infoROM is corrupted)."""
    found = [re.fullmatch(r"(.+?)\s*,\s*(\d+\.\d)\s*", line) for line in text.splitlines()]
    return [(match[1], match[2]) for match in found if match]


def decided(gpus: Sequence[tuple[str, str]]) -> tuple[str, str]:
    """(version, the GPUs in words); a Problem if they are of several kinds, or none runs on them."""
    table = rows()
    kinds = sorted({capability for _, capability in gpus})
    if len(kinds) > 1:
        raise reports.nvidia.several_kinds_of_gpu([", ".join(gpu) for gpu in gpus], list(table)[-1])
    words = f"{len(gpus)}x {gpus[0][0]}"
    version = newest_for(kinds[0], table)
    if version is None:
        supported = {name: " ".join(row["architectures"]) for name, row in table.items()}  # type: ignore[arg-type]
        raise reports.nvidia.no_toolchain_for(words, kinds[0], supported)
    return version, f"{words}, {kinds[0]}"


def gpus_here(path: str) -> list[tuple[str, str]]:
    """This machine's GPUs from nvidia-smi on `path`; a Problem if it is missing or does not answer."""
    program = shutil.which(QUERY[0], path=path)
    if not program:
        raise reports.nvidia.which_gpu()
    done = subprocess.run(
        [program, *QUERY[1:]], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False, text=True,
        env={**os.environ, "PATH": path},
    )  # fmt: skip
    gpus = parse(done.stdout) if done.returncode == 0 else []
    if not gpus:
        raise reports.nvidia.driver_silent(done.stdout.strip())
    return gpus


def key(rehearsal: str) -> str:
    """What the choice depends on, without asking a GPU."""
    digest = hashlib.sha256(TABLE.read_bytes() + rehearsal.encode())
    for path in sorted(SEEN_BY_THE_KERNEL.glob("*/information")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def choose(assumed: str, rehearsal: str, path: str, asked: bool) -> tuple[str, str]:
    """(version, what to tell the user; empty if it is known from before). asked: nothing may be written."""
    if assumed or (asked and rehearsal):
        from scripts.nvidia import gpus

        return decided([(gpu.name, gpu.compute_capability) for gpu in gpus.assumed(assumed or rehearsal)])[0], ""
    try:
        kept = json.loads(KEPT.read_bytes())
        if kept["key"] == key(rehearsal) and kept["toolchain"] in rows():
            return str(kept["toolchain"]), ""
    except (OSError, ValueError, KeyError, TypeError):
        pass
    version, words = decided(gpus_here(path))
    if asked:
        return version, ""
    KEPT.parent.mkdir(exist_ok=True)
    writing = KEPT.with_name(f"{KEPT.name}.writing")
    writing.write_text(json.dumps({"key": key(rehearsal), "toolchain": version, "decided_by": words}) + "\n")
    os.replace(writing, KEPT)
    return version, f"toolchain   TensorRT-LLM {version} for {words}"
