"""Reports of plan, doctor and the checks before serving."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Sequence

from scripts.reports.problem import NotYet, PathLike, Problem, indented, make, shown, some


def too_many_ranks(tp_size: int, pp_size: int, count: int, found: str, command: str) -> Problem:
    return Problem(
        "more ranks than GPUs",
        "Makefile",
        f"TP {tp_size} x PP {pp_size} = {tp_size * pp_size} ranks, and each rank needs its own GPU. This machine has "
        f"{count} ({found}).",
        "See what fits with fewer ranks:",
        command,
    )


def does_not_fit(model: str, found: str, shares: str, advice: str, command: str) -> Problem:
    return Problem(
        f"{model} does not fit",
        found,
        "The KV cache has no room for the tokens that it must hold, so the engine would not start. One rank "
        "takes this much of its GPU's memory:"
        f"\n\n{shares}",
        advice,
        command,
    )


def shape_in_gguf(folder: PathLike, names: Sequence[str], size_bytes: int, command: str) -> Problem:
    return NotYet(
        "the model's shape is not known yet",
        folder,
        f"The folder has {some(names)}, {size_bytes / 1e6:,.1f} MB. The shape of the model is in the metadata of the "
        "GGUF file. The room config reads it, and the plan reads the room; the room is not made yet.",
        "Make it, which reads no weights, and ask again:",
        command,
    )


def disk_too_small(where: PathLike, free_bytes: int, needed_bytes: int, rooms: Sequence[str]) -> Problem:
    return Problem(
        "the disk is too small",
        where,
        f"{free_bytes / 1e9:.1f} GB are free here; the rooms that are not made yet ({', '.join(rooms)}) take "
        f"{needed_bytes / 1e9:.1f} GB.",
        "You can make build/ a link to a folder on a larger disk. See what each room takes:",
        make("plan"),
    )


def too_few_gpus(needed: int, names: Sequence[str]) -> Problem:
    return Problem(
        "not enough GPUs",
        "nvidia-smi",
        f"The engines have {needed} ranks, and each needs one GPU; this machine has {len(names)}"
        f"{': ' + ', '.join(names) if names else ''}.",
        "Build for as many as there are:" if names else "Check the driver, and docker's option --gpus all:",
        make("serve", TP=len(names)) if names else make("doctor"),
    )


def engine_for_another_gpu(engines: PathLike, built_on: str, built_for: str, here: str, capability: str) -> Problem:
    return Problem(
        "engine does not fit this GPU",
        engines,
        f"The engines were built on {built_on} for compute capability {built_for}; {here} has {capability}. TensorRT "
        "engines do not work on another GPU generation.",
        "Build them here:",
        f"rm -r {shown(engines)} && {make('engines')}",
    )


def engine_needs_peer_access(engines: PathLike, peer_access: bool | None) -> Problem:
    seen = "does not say whether the GPUs of this machine can" if peer_access is None else "says that these cannot"
    return Problem(
        "the GPUs do not reach each other",
        engines,
        "The engines use custom all-reduce, for which GPUs must read each other's memory. `nvidia-smi topo -p2p r` "
        f"{seen}.",
        "Build them here, so that they use NCCL:",
        f"rm -r {shown(engines)} && {make('engines')}",
    )


def engine_of_another_version(engines: PathLike, built_by: str, found: str, toolchain: str) -> Problem:
    """built_by, found: versions as the package tensorrt_llm reports them; toolchain:
    what the user types to get the first one."""
    return Problem(
        "engine of another TensorRT-LLM",
        engines,
        f"The engines were built by TensorRT-LLM {built_by}; version {found} is installed here. TensorRT-LLM "
        "runs only engines of its own version.",
        "Serve them in the toolchain that built them:",
        make("serve", TOOLCHAIN=toolchain),
    )


def driver_too_old(driver: str, minimum: str, version: str) -> Problem:
    return Problem(
        "NVIDIA's driver is too old",
        "nvidia-smi",
        f"The driver is {driver}; the container of TensorRT-LLM {version} needs {minimum} or later.",
        "Install a newer driver, restart, and check:",
        "nvidia-smi --query-gpu=driver_version --format=csv",
    )


def opal_prefix_wrong(seen: str, mpirun: PathLike) -> Problem:
    return Problem(
        "Open MPI cannot find itself",
        mpirun,
        f"OPAL_PREFIX is {seen}; mpirun is {mpirun}. NVIDIA's image sets OPAL_PREFIX to the folder of its Open MPI; "
        "an image that was exported and imported, or a cleaned environment, loses it.",
        "Use NVIDIA's image itself. If you cannot, set OPAL_PREFIX and serve again:",
        f"export OPAL_PREFIX={shlex.quote(str(Path(mpirun).parent.parent))}",
    )


def ranks_do_not_add_up(world_size: int, status: int | None, seconds: float, lines: Sequence[str]) -> Problem:
    event = f"did not finish within {seconds:.0f} s" if status is None else f"ended with status {status}"
    return Problem(
        "the ranks do not reach each other",
        "scripts/serving/all_reduce.py",
        f"Every token needs sums over all ranks. A test sum over {world_size} ranks {event}. Its last lines:\n\n"
        f"{indented(lines)}\n\nThis has two usual causes. First: GPUs report that they can read each other's memory "
        "although they cannot (virtual machines, IOMMU, ACS). Then set NCCL_P2P_DISABLE=1. Second: /dev/shm is too small.",
        "See NCCL's messages:",
        f'NCCL_DEBUG=INFO mpirun --allow-run-as-root -n {world_size} python3 -m scripts.serving.all_reduce "$(mktemp -d)" 60',
    )
