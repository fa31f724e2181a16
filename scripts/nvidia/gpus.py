"""NVIDIA's GPUs of this machine, as nvidia-smi reports them, or as ASSUME_GPU names them.

docker/gpus.json holds the GPUs that can be assumed. Its memory_mib is memory.total of nvidia-smi. Sources: for T4 to
H200, Modal's table "Actual, MiB" at thundergolfer.com/blog/nvidia-gpu-memory-capacity; for A10, A30, A40, L40, B200 and
the RTX cards (without bridges), outputs in public repositories, several for each, all with the same value. Drivers have
reported two values for a V100; the table has the smaller one, which CUDA also reports. compute_capability is NVIDIA's
list, developer.nvidia.com/cuda-gpus. nvlink: four such GPUs on one host are linked pairwise.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from scripts import reports

TABLE = Path(__file__).parents[2] / "docker" / "gpus.json"
MIB = 1 << 20
QUERY = ["nvidia-smi", "--query-gpu=name,memory.total,compute_cap,driver_version", "--format=csv,noheader,nounits"]
HOLDERS = ["nvidia-smi", "--query-compute-apps=gpu_uuid,pid,process_name,used_memory", "--format=csv,noheader,nounits"]
INDEXES = ["nvidia-smi", "--query-gpu=uuid,index", "--format=csv,noheader"]
# A driver that hangs on a lost GPU never answers; a good one takes seconds if it has to wake eight GPUs.
SECONDS = 60


@dataclass(frozen=True)
class Gpu:
    """One GPU. compute_capability as nvidia-smi writes it: '7.0'; driver: None if it is assumed."""

    name: str
    memory_bytes: int
    compute_capability: str
    driver: str | None = None

    @property
    def capability(self) -> float:
        """7.0, for comparisons. (CUDA's minor number has one digit.)"""
        return float(self.compute_capability)


@dataclass(frozen=True)
class Links:
    """How GPUs reach each other, for all pairs; None: not known. peer_access: they can read each other's memory."""

    peer_access: bool | None
    nvlink: bool | None


# --- core ---


def assumed(text: str) -> list[Gpu]:
    """'4x V100-SXM2-16GB' -> four of them. A name may be shortened if only one GPU begins so: '2x H100'."""
    table = json.loads(TABLE.read_text())
    match = re.fullmatch(r"(?:([1-9]\d?)\s*x\s*)?(\S+)", text.strip())
    name = match[2].upper() if match else ""
    known = [key for key in table if key.upper() == name] or [
        key for key in table if name and key.upper().startswith(name)
    ]
    if not match or len(known) != 1:
        raise reports.nvidia.gpu_not_known(text, list(table), known)
    row = table[known[0]]
    return [Gpu(known[0], row["memory_mib"] * MIB, row["compute_capability"])] * int(match[1] or 1)


def assumed_links(gpus: list[Gpu]) -> Links:
    """How assumed GPUs reach each other. Without NVLink, peer access depends on the board: not known."""
    if len(gpus) < 2:
        return Links(None, None)
    nvlink = bool(json.loads(TABLE.read_text())[gpus[0].name]["nvlink"])
    return Links(True if nvlink else None, nvlink)


def parse_query(text: str) -> list[Gpu]:
    """The answer to QUERY, one line per GPU; ValueError if a line is not one."""
    found = []
    for line in text.splitlines():
        if not line.strip() or line.startswith("WARNING"):  # for instance: infoROM is corrupted
            continue
        name, memory_mib, capability, driver = (field.strip() for field in line.split(","))
        if not re.fullmatch(r"\d+\.\d", capability):
            raise ValueError(line)
        found.append(Gpu(name, int(memory_mib) * MIB, capability, driver))
    return found


def parse_holders(text: str, indexes: str, ours: Callable[[int], bool]) -> list[str]:
    """The answers to HOLDERS and INDEXES as lines for a reader, the largest first. Lines of another form are left out,
    and so are processes for which `ours` is true."""
    gpu = dict(re.findall(r"^\s*(\S+), (\d+)\s*$", indexes, re.MULTILINE))
    found = [re.fullmatch(r"\s*(\S+), (\d+), (.*), (\d+)\s*", line) for line in text.splitlines()]
    sizes = [
        (int(one[4]) * MIB, f"pid {one[2]} ({one[3].strip()[-60:]}) on GPU {gpu.get(one[1], one[1])}")
        for one in found
        if one and not ours(int(one[2]))
    ]
    return [f"{who}: {size / 1e9:.1f} GB" for size, who in sorted(sizes, reverse=True)]


def parse_matrix(text: str, count: int) -> list[list[str]]:
    """The first `count` GPUs of a matrix that `nvidia-smi topo` prints, row by row; [] if it shows fewer.

    Some drivers underline the head line with escape sequences.
    Columns for network cards and CPUs follow those of the GPUs.
    """
    rows = []
    for line in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines():
        cells = line.split()
        if len(cells) > count and re.fullmatch(r"GPU\d+", cells[0]) and not re.fullmatch(r"GPU\d+", cells[1]):
            rows.append(cells[1 : count + 1])
    return rows[:count] if len(rows) >= count else []


def parse_links(p2p: str, topology: str, count: int) -> Links:
    """The links, from `nvidia-smi topo -p2p r` (OK, or why not) and `topo -m` (NV and the number of links,
    or a path over PCIe)."""
    if count < 2:
        return Links(None, None)

    def every(matrix: list[list[str]], good: str) -> bool | None:
        pairs = [cell for i, row in enumerate(matrix) for j, cell in enumerate(row) if i != j]
        return all(re.fullmatch(good, cell) for cell in pairs) if pairs else None

    return Links(every(parse_matrix(p2p, count), "OK"), every(parse_matrix(topology, count), r"NV\d+"))


# --- shell ---


def here() -> list[Gpu]:
    """This machine's GPUs; [] without nvidia-smi.
    A Problem if nvidia-smi is there but its answer is wrong or missing."""
    if not shutil.which(QUERY[0]):
        return []
    try:
        done = subprocess.run(QUERY, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise reports.nvidia.nvidia_smi_failed(QUERY, f"no answer within {SECONDS} s") from None
    if done.returncode:
        raise reports.nvidia.nvidia_smi_failed(QUERY, (done.stderr or done.stdout).strip())
    try:
        return parse_query(done.stdout)
    except ValueError as error:
        raise reports.nvidia.nvidia_smi_failed(QUERY, f"a line that is not a GPU: {error}") from None


def holders(session: int) -> list[str]:
    """The processes outside a session that hold GPU memory, a line each; [] if nvidia-smi is missing, fails, or names
    none."""

    def ours(pid: int) -> bool:
        try:
            return os.getsid(pid) == session
        except OSError:
            return False

    try:
        said, indexes = (
            subprocess.run(query, capture_output=True, text=True, timeout=SECONDS, check=False)
            for query in (HOLDERS, INDEXES)
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return parse_holders(said.stdout, indexes.stdout, ours) if said.returncode == 0 else []


def links_here(count: int) -> Links:
    """How the first `count` GPUs of this machine reach each other. If it cannot be found out, the answer is "not
    known", never a failure."""
    return parse_links(_topology("-p2p", "r"), _topology("-m"), count) if count > 1 else Links(None, None)


def _topology(*options: str) -> str:
    try:
        command = ["nvidia-smi", "topo", *options]
        return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
