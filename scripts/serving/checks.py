"""What must be true of this host before engines are served.
The checks compare it with the facts of the engines' manifest.

A check takes values and raises a Problem; `check` at the end looks the values up.
The kind of engine decides which checks run.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Mapping, Sequence

from scripts import reports, room
from scripts.nvidia import contracts, gpus
from scripts.nvidia.gpus import Gpu, Links
from scripts.serving import launch, processes
from scripts.serving.flag import Flag

PROJECT = Path(__file__).parents[2]
# Triton's Python backend takes by default 64 MB for each of the three Python models; NCCL and MPI take tens of MB per
# rank (hosts with docker's 64 MB were seen to hang: TensorRT-LLM #408, #602, #9680).
MODELS_SHM_BYTES, RANK_SHM_BYTES = 3 * (64 << 20), 64 << 20
# Importing torch from a cold disk and NCCL's first contact of eight GPUs take tens of seconds.
ALL_REDUCE_SECONDS = 120.0
LAST_LINES = 12


@dataclass(frozen=True)
class Host:
    """What `look` found on this host. engines: the room; trtllm_version: None if the Python package is not installed;
    memlock_bytes: None if there is no limit."""

    engines: Path
    gpus: Sequence[Gpu]
    links: Links
    trtllm_version: str | None
    shared_memory_bytes: int
    memlock_bytes: int | None
    opal_prefix: Path | None
    mpirun: Path


# --- core: a passport and a host ---


def check_gpus(facts: Mapping[str, Any], host: Host) -> None:
    """One GPU per rank, with the compute capability that the engines were built for: other GPUs cannot run them."""
    if len(host.gpus) < facts["world_size"]:
        raise reports.planning.too_few_gpus(facts["world_size"], [gpu.name for gpu in host.gpus])
    built_for = facts["gpu"]["compute_capability"]
    for gpu in host.gpus[: facts["world_size"]]:
        if gpu.compute_capability != built_for:
            raise reports.planning.engine_for_another_gpu(
                host.engines, facts["gpu"]["name"], built_for, gpu.name, gpu.compute_capability
            )


def check_links(facts: Mapping[str, Any], host: Host) -> None:
    """Engines with custom all-reduce crash at their first token if the GPUs do not reach each other (TensorRT-LLM
    #1374)."""
    if facts["custom_all_reduce"] and host.links.peer_access is not True:
        raise reports.planning.engine_needs_peer_access(host.engines, host.links.peer_access)


def check_version(facts: Mapping[str, Any], host: Host) -> None:
    """A runtime reads only what its own version wrote (TensorRT-LLM #1803, tensorrtllm_backend #375)."""
    if host.trtllm_version is not None and host.trtllm_version.partition("+")[0] != facts["trtllm_reported"]:
        raise reports.planning.engine_of_another_version(
            host.engines, facts["trtllm_reported"], host.trtllm_version, facts["trtllm_version"]
        )


def check_driver(facts: Mapping[str, Any], host: Host, minimum: str) -> None:
    """minimum: driver_min of docker/toolchains.json; with an older driver CUDA in the container does not start."""
    for gpu in host.gpus[:1]:
        if gpu.driver is not None and _numbers(gpu.driver) < _numbers(minimum):
            raise reports.planning.driver_too_old(gpu.driver, minimum, facts["trtllm_version"])


def check_shared_memory(facts: Mapping[str, Any], host: Host) -> None:
    """Docker gives 64 MB by default."""
    needed_bytes = MODELS_SHM_BYTES + RANK_SHM_BYTES * facts["world_size"]
    if host.shared_memory_bytes < needed_bytes:
        raise reports.serving.shared_memory_too_small(host.shared_memory_bytes, needed_bytes)


def check_mpi(facts: Mapping[str, Any], host: Host) -> None:
    """NVIDIA's images have Open MPI under /opt/hpcx and name that place in OPAL_PREFIX. After `docker export`, or in a
    cleaned environment, the variable is missing, and mpirun cannot find its files (tensorrtllm_backend #738)."""
    relocated = "hpcx" in host.mpirun.parts
    if relocated and host.opal_prefix is None:
        raise reports.planning.opal_prefix_wrong("not set", host.mpirun)
    if host.opal_prefix is not None and not host.opal_prefix.is_dir():
        raise reports.planning.opal_prefix_wrong(f"{host.opal_prefix}, which is not a folder", host.mpirun)


def remarks(facts: Mapping[str, Any], host: Host) -> list[str]:
    """Notes that are worth a line and stop nothing."""
    found = []
    if host.memlock_bytes is not None:
        found.append(
            f"locked memory is limited to {room.human_bytes(host.memlock_bytes)}; NVIDIA starts its containers with "
            "--ulimit memlock=-1"
        )
    names = {gpu.name for gpu in host.gpus[: facts["world_size"]]} - {facts["gpu"]["name"]}
    if names:
        found.append(
            f"built on {facts['gpu']['name']}, to run on {', '.join(sorted(names))}: same generation, other timings"
        )
    if host.trtllm_version is None:
        found.append(
            "the Python package tensorrt_llm is not installed, so its version is not compared with the engines'"
        )
    return found


def all_reduce_command(world_size: int, folder: Path, seconds: float) -> list[str]:
    """One process per rank."""
    return [
        *launch.MPIRUN,
        "-n",
        str(world_size),
        sys.executable,
        "-m",
        "scripts.serving.all_reduce",
        str(folder),
        str(seconds),
    ]


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version))


# --- shell ---


def look(engines: Path, world_size: int, environment: Mapping[str, str]) -> Host:
    """This host, and the environment that the ranks will have."""
    try:
        version: str | None = importlib.metadata.version("tensorrt_llm")
    except importlib.metadata.PackageNotFoundError:
        version = None
    shm = os.statvfs("/dev/shm")
    memlock = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    mpirun = shutil.which("mpirun", path=environment.get("PATH"))
    if mpirun is None:
        raise reports.serving.program_missing("mpirun")
    prefix = environment.get("OPAL_PREFIX")
    return Host(
        engines,
        gpus.here(),
        gpus.links_here(world_size),
        version,
        shm.f_bavail * shm.f_frsize,
        None if memlock == resource.RLIM_INFINITY else memlock,
        Path(prefix) if prefix else None,
        Path(mpirun).resolve(),
    )


def check_all_reduce(
    world_size: int,
    environment: Mapping[str, str],
    folder: Path,
    asked_to_end: Flag,
    seconds: float = ALL_REDUCE_SECONDS,
) -> None:
    """All ranks add up a number, in processes like the servers', before a deadline:
    a wrong link hangs instead of failing.

    folder: temporary, local to this host. Returns early if the user ends it.
    """
    if world_size < 2:
        return
    missing = [module for module in ("torch", "mpi4py") if importlib.util.find_spec(module) is None]
    if missing:
        room.say("serve", f"no {' and '.join(missing)} here, so it was not tested whether the ranks reach each other")
        return
    meeting = folder / "all_reduce"
    meeting.mkdir()
    log = meeting / "log"
    with open(log, "w", encoding="utf-8") as output:
        child = subprocess.Popen(
            all_reduce_command(world_size, meeting, seconds), cwd=PROJECT, env=dict(environment), stdin=subprocess.DEVNULL,
            stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        deadline = time.monotonic() + seconds
        try:
            while child.poll() is None and time.monotonic() < deadline and not asked_to_end.wait(0.1):
                pass
            status = child.poll()
        finally:
            processes.end_session(child.pid, timeout_seconds=5)
            child.wait()
    if status != 0 and not asked_to_end.is_set():
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        raise reports.planning.ranks_do_not_add_up(world_size, status, seconds, lines[-LAST_LINES:])


def check_tensorrt(
    engines: Path, environment: Mapping[str, str], folder: Path, asked_to_end: Flag, said_by: str
) -> None:
    """TensorRT engines: cheap checks first, then all ranks together."""
    facts = room.read_manifest(engines)["facts"]
    host = look(engines, facts["world_size"], environment)
    check_gpus(facts, host)
    check_links(facts, host)
    check_version(facts, host)
    check_driver(facts, host, contracts.toolchain(facts["trtllm_version"])["driver_min"])
    check_shared_memory(facts, host)
    check_mpi(facts, host)
    for remark in remarks(facts, host):
        room.say(said_by, remark)
    check_all_reduce(facts["world_size"], environment, folder, asked_to_end)


def check_torch(engines: Path, environment: Mapping[str, str], folder: Path, asked_to_end: Flag, said_by: str) -> None:
    """The torch engine runs anywhere, and reports lost ranks itself."""


CHECKS: dict[str, Callable[[Path, Mapping[str, str], Path, Flag, str], None]] = {
    "torch": check_torch,
    "tensorrt": check_tensorrt,
}


def check(
    engines: Path,
    environment: Mapping[str, str],
    folder: Path,
    asked_to_end: Flag,
    said_by: str = "serve",
) -> None:
    """Every check for the room `engines`; raises the first Problem. environment: the ranks'; folder: temporary,
    on this host.

    said_by: the room whose name the notes carry.
    """
    CHECKS[room.read_manifest(engines)["facts"]["engine"]](engines, environment, folder, asked_to_end, said_by)
