"""The kinds of QUANT: what NVIDIA's tools are asked for, and how engines call them. The standard library only.

Their words are a setting's: scripts/settings.py, QUANTS.
"""

from __future__ import annotations

from typing import Any, Mapping, NamedTuple

from scripts import reports
from scripts.nvidia.contracts import Wish


class Quant(NamedTuple):
    """One kind of quantization.

    tool: a kind of table in docker/contracts; algo: how config.json's word for it begins; flags: what the tool is asked
    for;
    measured: whether it measures on texts, which it fetches. Bytes: scripts/nvidia/memory.py.
    """

    tool: str
    algo: str
    flags: Mapping[str, Wish]
    measured: bool = True


# Flags: the examples of examples/llama/README.md of 0.8.0, which later ones repeat.
TABLE = {
    "int8_wo": Quant("convert", "W8A16", {"use_weight_only": True, "weight_only_precision": "int8"}, measured=False),
    "int4_awq": Quant("quantize", "W4A16_AWQ", {"qformat": "int4_awq", "awq_block_size": 128, "calib_size": 32}),
    "fp8": Quant("quantize", "FP8", {"qformat": "fp8", "calib_size": 512}),
    "sq": Quant("convert", "W8A8_SQ", {"smoothquant": "0.5", "per_token": True, "per_channel": True}),
}


def algo_of(quant: str) -> str | None:
    """How the engines' config.json calls a QUANT; None for none."""
    return TABLE[quant].algo if quant else None


def quant_of(algo: str) -> str:
    """The other way round; '' for what is not quantized."""
    return next((word for word, kind in TABLE.items() if algo.startswith(kind.algo)), "")


def no_quantizer(quant: str, version: str, toolchains: Mapping[str, Mapping[str, Any]]) -> reports.Problem | None:
    """Why a toolchain cannot make a checkpoint of this QUANT, whatever the GPU; None if it can.

    toolchains: docker/toolchains.json; quantizer_missing: the package that quantize.py needs and the image lacks.
    """
    missing = toolchains[version]["quantizer_missing"]
    if not quant or TABLE[quant].tool != "quantize" or not missing:
        return None
    versions = list(toolchains)
    later = versions[versions.index(version) + 1 :]
    other = next(name for name in later if not toolchains[name]["quantizer_missing"])
    return reports.checkpoint.quantizer_missing(quant, version, missing, other)
