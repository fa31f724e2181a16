"""Which models each TOOLCHAIN can take. This is the only place that knows; plan, doctor, checkpoint and engines ask it.

It needs only the standard library.
"""

from __future__ import annotations

from pathlib import Path

from scripts import reports
from scripts.nvidia import contracts
from scripts.weights.shape import LlamaShape, padded_heads

# The version that introduced a kind of rope scaling; all versions have none, linear and dynamic. llama3:
# upstream's release notes of 0.12.
ROPE_SINCE: dict[str, tuple[int, ...]] = {"llama3": (0, 12)}
# Kinds that no version's Llama has (layers/attention.py: yarn is for DeepSeek, with its own position embedding);
# the torch engine has them.
ROPE_OF_TORCH = ("yarn",)


def lacks(shape: LlamaShape, rope: str, version: str, engine: str, tp_size: int = 1, quant: str = "") -> str | None:
    """What a version lacks for a model, in words; None if it can take the model. rope: the kind of rope scaling;
    tp_size: heads may be padded.

    Biases: all versions read attn_bias and mlp_bias from the checkpoint's config.json (check_config of
    models/llama/model.py, 0.8.0 on); NVIDIA's tools for QUANT are for Llamas only,
    so they do not know the biases of a Qwen2.
    """
    n_heads = padded_heads(shape, tp_size)[0]
    if n_heads * shape.head_size != shape.hidden_size and "head_size" not in contracts.table(
        "checkpoint-config", version
    ):
        return f"a head size ({n_heads} heads of {shape.head_size} do not make hidden_size {shape.hidden_size})"
    if rope in ROPE_OF_TORCH and engine == "tensorrt":
        return f"rope scaling of the type {rope}"
    if rope in ROPE_SINCE and _number(version) < ROPE_SINCE[rope]:
        return f"rope scaling of the type {rope}"
    if quant and (shape.attention_bias or shape.mlp_bias):
        return f"QUANT={quant} for a model with biases"
    return None


def check(
    where: str | Path,
    shape: LlamaShape,
    rope: str,
    version: str,
    engine: str,
    tp_size: int = 1,
    quant: str = "",
    goal: str = "checkpoint",
) -> None:
    """A Problem if a version cannot take a model; it names those that can. where: the model, for the report; goal:
    what is made."""
    lacking = lacks(shape, rope, version, engine, tp_size, quant)
    if lacking is None:
        return
    able = able_versions(shape, rope, engine, tp_size, quant)
    raise reports.checkpoint.toolchain_lacks(where, lacking, version, able, engine, quant, goal)


def able_versions(shape: LlamaShape, rope: str, engine: str, tp_size: int = 1, quant: str = "") -> list[str]:
    """The versions that can take a model."""
    return [name for name in contracts.versions() if lacks(shape, rope, name, engine, tp_size, quant) is None]


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])
