"""Reports about NVIDIA's GPUs, toolchains and programs."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Mapping, Sequence

from scripts.reports.problem import PathLike, Problem, indented, make, shown


def no_contract_table(trtllm_version: str, kind: str, path: PathLike) -> Problem:
    return Problem(
        f"no {kind} table for TensorRT-LLM {trtllm_version}",
        path,
        f"TOOLCHAIN is {trtllm_version}, but {shown(path)} has no table for it, so the flags and files of that version "
        "are not known.",
        "Use a version whose tables are complete:",
        make("serve", TOOLCHAIN=""),
    )


def gpu_not_known(text: str, known: Sequence[str], matching: Sequence[str]) -> Problem:
    meant = f"Several names begin like this: {', '.join(matching)}." if matching else f"Known GPUs: {', '.join(known)}."
    return Problem(
        "no such GPU",
        "docker/gpus.json",
        f"ASSUME_GPU is {text!r}; it must be a number and the name of a GPU. {meant}",
        "For instance:",
        make("plan", ASSUME_GPU="4x V100-SXM2-16GB"),
    )


def nvidia_smi_failed(command: Sequence[str], reason: str) -> Problem:
    return Problem(
        "nvidia-smi does not answer",
        command[0],
        f"The GPUs of this machine are not known: {reason or 'nvidia-smi failed without a message'}",
        "If the driver was updated since this machine started, restart the machine. Otherwise run nvidia-smi yourself:",
        shlex.join(command),
    )


def no_gpu(asked_by: str) -> Problem:
    return Problem(
        "no GPU",
        "nvidia-smi",
        f"{asked_by} needs one NVIDIA GPU; nvidia-smi lists none. (One GPU is enough to build for any TP.)",
        "Check the driver and, in a container, the option --gpus; or use the torch engine:",
        make("serve", ENGINE="torch"),
    )


def gpu_not_in_toolchain(
    version: str, architectures: Sequence[str], name: str, capability: str, fitting: Sequence[str]
) -> Problem:
    if fitting:
        advice, command = "Use the newest version that runs on this GPU:", make("serve", TOOLCHAIN=fitting[-1])
    else:
        advice = "No version in docker/toolchains.json runs on this GPU. The torch engine runs on any:"
        command = make("serve", ENGINE="torch")
    return Problem(
        "TensorRT-LLM does not run on this GPU",
        "docker/toolchains.json",
        f"{name} has compute capability {capability}; TensorRT-LLM {version} has kernels for "
        f"{', '.join(architectures)}.",
        advice,
        command,
    )


def gpu_cannot(what: str, needed: str, name: str, capability: str, reason: str, command: str) -> Problem:
    return Problem(
        f"{what} does not run on this GPU",
        name,
        f"{what} needs compute capability {needed} or later; {name} has {capability}. {reason}",
        f"Do without {what}:",
        command,
    )


def engines_too_large(engines: PathLike, gpu: str, gpu_bytes: int, weights_bytes: int, needed_tokens: int) -> Problem:
    return Problem(
        "engines do not fit this GPU",
        engines,
        f"{gpu} has {gpu_bytes / (1 << 30):.1f} GiB; the weights of one rank take {weights_bytes / (1 << 30):.1f} "
        f"GiB. CUDA and one step of the engine need memory too. What is left does not hold a KV cache of "
        f"{needed_tokens} tokens (MAX_SEQ_LEN), so the engines would not start.",
        "See the numbers, and what would fit:",
        make("plan"),
    )


def not_in_toolchain(program: str, version: str) -> Problem:
    return Problem(
        f"no {program}",
        program,
        f"{program} is not installed. It is part of TensorRT-LLM {version}, which comes in NVIDIA's container. "
        "TensorRT engines are built and run only there.",
        "See what this machine lacks for the container:",
        make("doctor"),
    )


def toolchain_is_another(asked: str, expected: str, found: str) -> Problem:
    """expected, found: the version that the package tensorrt_llm should report, and the one that it reports."""
    return Problem(
        "another TensorRT-LLM is installed",
        sys.executable,
        f"The image of TOOLCHAIN {asked} reports TensorRT-LLM {expected}; version {found} is installed here. "
        "The installed version takes other flags and builds other engines.",
        "Run this in the image that docker/toolchains.json names, and install nothing else in it:",
        make("engines", TOOLCHAIN=asked),
    )


def trtllm_build_failed(
    log: PathLike, status: int, lines: Sequence[str], cause: str, advice: str, command: str
) -> Problem:
    ended = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
    return Problem(
        "trtllm-build failed",
        log,
        f"trtllm-build {ended}. {cause}\n\nIts last lines:\n\n{indented(lines)}",
        advice,
        command,
    )


def engine_not_as_asked(where: PathLike, what: str, asked: object, built: object) -> Problem:
    return Problem(
        "the engine is not what was asked for",
        where,
        f"{what} should be {asked}; trtllm-build wrote {built}.",
        "See what its log says about it:",
        f"grep -n -i -e warn -e {what} {shlex.quote(shown(Path(where).parent / 'building' / 'trtllm-build.log'))}",
    )


def which_gpu() -> Problem:
    return Problem(
        "which GPU?",
        "nvidia-smi",
        "With ENGINE=tensorrt and without TOOLCHAIN, the GPU decides which TensorRT-LLM is used. This machine has no "
        "nvidia-smi, which would name its GPU.",
        "Name a GPU to see the plan for it (engines for it cannot be built here), or use the torch engine:",
        f"{make('plan', ASSUME_GPU='4x V100-SXM2-16GB')}\n{make('serve', ENGINE='torch')}",
    )


def driver_silent(seen: str) -> Problem:
    return Problem(
        "the driver does not answer",
        "nvidia-smi",
        f"nvidia-smi says: {seen or 'nothing'}",
        "Look at the driver:",
        "nvidia-smi",
    )


def several_kinds_of_gpu(seen: Sequence[str], newest: str) -> Problem:
    return Problem(
        "GPUs of more than one kind",
        "nvidia-smi",
        f"This machine has {'; '.join(seen)}. An engine runs only on the architecture it was built for.",
        "Name the version of TensorRT-LLM, and see what fits:",
        make("doctor", TOOLCHAIN=newest),
    )


def no_toolchain_for(gpus: str, capability: str, supported: Mapping[str, str]) -> Problem:
    listed = indented(f"{version}: {architectures}" for version, architectures in supported.items())
    return Problem(
        "no TensorRT-LLM for this GPU",
        "docker/toolchains.json",
        f"{gpus} has compute capability {capability}. Supported are:\n\n{listed}",
        "The torch engine runs on it:",
        make("serve", ENGINE="torch", TOOLCHAIN=""),
    )
