"""Reports about the room `checkpoint`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Sequence

from scripts.reports.problem import PathLike, Problem, indented, make, shown
from scripts.reports.weights import look


def examples_missing(script: PathLike, examples: PathLike, version: str, revision: str) -> Problem:
    """version: as the image reports it; revision: the tag or commit of TensorRT-LLM's repository from which that
    version was built."""
    return Problem(
        "no examples of TensorRT-LLM",
        examples,
        f"QUANT uses TensorRT-LLM's own {Path(script).name}, which no image contains. Here {shown(script)} does not "
        "exist.",
        f"Fetch the repository as it was when TensorRT-LLM {version} was built ({revision}), then type your make "
        "command again:",
        f"git init -q {shown(examples)} && cd {shown(examples)} && export GIT_LFS_SKIP_SMUDGE=1 && "
        f"git fetch --depth 1 https://github.com/NVIDIA/TensorRT-LLM {revision} && git checkout -q FETCH_HEAD",
    )


def quantizer_missing(quant: str, toolchain: str, package: str, other: str) -> Problem:
    """QUANT needs a package that the toolchain's image lacks. other: the next toolchain whose image has it."""
    return Problem(
        f"QUANT={quant} is not possible with TensorRT-LLM {toolchain}",
        f"TOOLCHAIN={toolchain}",
        f"TensorRT-LLM's tool for QUANT={quant} needs the package {package}, which is neither in NVIDIA's image nor on "
        "a package index any more.",
        "A later toolchain has the package:",
        make("checkpoint", TOOLCHAIN=other),
    )


def quantization_failed(log: PathLike, quant: str, status: int, lines: Sequence[str]) -> Problem:
    return Problem(
        "quantizing failed",
        log,
        f"TensorRT-LLM's tool for QUANT={quant} ended with status {status}. Its last lines:\n\n{indented(lines)}",
        "Correct the cause (a package of its requirements.txt, the network, memory), then type:",
        make("checkpoint"),
    )


def checkpoint_not_as_asked(where: PathLike, what: str, asked: object, written: object, log: PathLike) -> Problem:
    return Problem(
        "the checkpoint is not what was asked for",
        where,
        f"{what} should be {asked}; TensorRT-LLM's tool wrote {written}.",
        "See what its log says:",
        f"less {shlex.quote(shown(log))}",
    )


def stages_impossible(where: PathLike, pp_size: int, n_layers: int) -> Problem:
    possible = [stages for stages in range(1, n_layers + 1) if n_layers % stages == 0]
    return Problem(
        "PP does not divide the layers",
        where,
        f"PP is {pp_size}; the model has {n_layers} layers, and every stage must have the same number of "
        "layers. "
        f"Possible: {', '.join(map(str, possible))}.",
        "For instance:",
        make("checkpoint", PP=max(stages for stages in possible if stages <= pp_size)),
    )


def split_impossible(
    where: PathLike, tp_size: int, what: str, size: int, rule: str, possible: Sequence[int], by_padding: bool = False,
    goal: str = "checkpoint",
) -> Problem:  # fmt: skip
    fitting = max((tp for tp in possible if tp <= tp_size), default=1)
    padding = " PAD_HEADS=on makes this TP possible by adding heads of zeros." if by_padding else ""
    return Problem(
        f"{tp_size} ranks cannot share this model",
        where,
        f"TP is {tp_size}, {what} is {size}: {rule}. Possible: {', '.join(map(str, possible))}.{padding}",
        "For instance:",
        make(goal, TP=fitting),
    )


def toolchain_lacks(
    where: PathLike, lacking: str, version: str, able: Sequence[str], engine: str, quant: str, goal: str
) -> Problem:
    change: dict[str, str | None]
    if able:
        others, change = f"Versions that have it: {', '.join(able)}.", {"TOOLCHAIN": able[0]}
    elif quant:
        others, change = "None has it.", {"QUANT": None}
    else:
        others, change = "None has it; the torch engine does.", {"ENGINE": "torch", "TOOLCHAIN": None}
    return Problem(
        f"this version has no {lacking.partition(' (')[0].removeprefix('a ')}",
        where,
        f"The model needs {lacking}, which TensorRT-LLM {version} does not have. {others}",
        "For instance:" if "TOOLCHAIN" in change and able else "Without it:",
        make(goal, **change),
    )


def weights_not_finite(path: PathLike, tensor: str, count: int, total: int) -> Problem:
    return Problem(
        "weights are not numbers",
        path,
        f"{count} of the {total} values of {tensor} are NaN or infinite, so the model cannot produce text.",
        "The damage is in the weights themselves. Fetch them again:",
        look(path),
    )


def cast_overflows(
    path: PathLike, tensor: str, count: int, total: int, largest: float, source: str, target: str, limit: float
) -> Problem:
    return Problem(
        f"weights do not fit into {target}",
        path,
        f"{count} of the {total} values of {tensor} are too large for {target}: the largest is {largest:g}, the "
        f"limit is {limit:g}. The source is {source}.",
        "Use a type with a larger range:",
        make("checkpoint", DTYPE="bfloat16" if target == "float16" else source),
    )
