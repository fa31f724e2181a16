"""Reports of the room checkpoint."""

import shlex
from pathlib import Path
from typing import Sequence

from scripts.reports.problem import PathLike, Problem, make, shown
from scripts.reports.weights import look


def examples_missing(script: PathLike, examples: PathLike, version: str) -> Problem:
    return Problem(
        "no examples of TensorRT-LLM",
        examples,
        f"Quantizing is done by TensorRT-LLM's own {Path(script).name}, which is in no image; {shown(script)} is not there.",
        f"Fetch the repository at the tag of TensorRT-LLM {version}, then type your make command again:",
        f"GIT_LFS_SKIP_SMUDGE=1 git clone --depth 1 --branch v{version} https://github.com/NVIDIA/TensorRT-LLM {shown(examples)}",
    )


def quantization_failed(log: PathLike, quant: str, status: int, lines: Sequence[str]) -> Problem:
    shown_lines = "\n".join(f"    {line[:200]}" for line in lines) or "    (it wrote nothing)"
    return Problem(
        "quantizing failed",
        log,
        f"TensorRT-LLM's tool for QUANT={quant} ended with status {status}. Its last lines:\n\n{shown_lines}",
        "When that is mended (a package that its requirements.txt names, the network for its texts, memory), again:",
        make("checkpoint"),
    )


def checkpoint_not_as_asked(where: PathLike, what: str, asked: object, written: object, log: PathLike) -> Problem:
    return Problem(
        "the checkpoint is not what was asked for",
        where,
        f"{what} was asked to be {asked}; TensorRT-LLM's tool wrote {written}.",
        "Look at what it says of that:",
        f"less {shlex.quote(shown(log))}",
    )


def stages_impossible(where: PathLike, pp_size: int, n_layers: int) -> Problem:
    possible = [stages for stages in range(1, n_layers + 1) if n_layers % stages == 0]
    return Problem(
        "the layers cannot be divided so",
        where,
        f"PP is {pp_size}; the model has {n_layers} layers, and each stage takes the same number of them. "
        f"Possible are {', '.join(map(str, possible))}.",
        "For instance:",
        make("checkpoint", PP=max(stages for stages in possible if stages <= pp_size)),
    )


def split_impossible(
    where: PathLike, tp_size: int, what: str, size: int, rule: str, possible: Sequence[int], by_padding: bool = False
) -> Problem:
    fitting = max((tp for tp in possible if tp <= tp_size), default=1)
    padding = " With PAD_HEADS=on, heads of zeros are added, and it can." if by_padding else ""
    return Problem(
        f"{tp_size} ranks cannot share this model",
        where,
        f"TP is {tp_size}, {what} is {size}: {rule}. What fits: {', '.join(map(str, possible))}.{padding}",
        "For instance:",
        make("checkpoint", TP=fitting),
    )


def no_head_size(
    where: PathLike, n_heads: int, head_size: int, hidden_size: int, version: str, able: Sequence[str]
) -> Problem:
    return Problem(
        "this version cannot say the head size",
        where,
        f"{n_heads} heads of {head_size} are not the {hidden_size} of hidden_size, so the checkpoint's config.json must have head_size; "
        f"that of TensorRT-LLM {version} has no such key. Those that have it: {', '.join(able)}.",
        "For instance:",
        make("checkpoint", TOOLCHAIN=able[-1]),
    )


def weights_not_finite(path: PathLike, tensor: str, count: int, total: int) -> Problem:
    return Problem(
        "weights are no numbers",
        path,
        f"{count} of the {total} values of {tensor} are NaN or infinite; no text can come of that.",
        "The weights are damaged where they come from. Fetch them again:",
        look(path),
    )


def cast_overflows(
    path: PathLike, tensor: str, count: int, total: int, largest: float, source: str, target: str, limit: float
) -> Problem:
    return Problem(
        f"weights do not fit into {target}",
        path,
        f"{count} of the {total} values of {tensor} are too large for {target}: the largest is {largest:g}, the limit is {limit:g}. "
        f"The source is {source}.",
        "Keep a type with a larger range:",
        make("checkpoint", DTYPE="bfloat16" if target == "float16" else source),
    )
