"""Who gets which rows and columns: the rank tables of tensor and pipeline parallelism."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from scripts.weights.safetensors import Raw
from scripts.weights.shape import EMBEDDING, HEAD, LAST_NORM, LlamaShape, Shape, padded_heads


@dataclass(frozen=True)
class Cut:
    """A rectangle of one of Hugging Face's tensors: rows and columns [first, end); columns None: all. Zeros follow on
    the right and below."""

    source: str
    rows: tuple[int, int]
    columns: tuple[int, int] | None = None
    zero_columns: int = 0
    zero_rows: int = 0


@dataclass(frozen=True)
class RankTensor:
    """One tensor of a rank file: its shape, and the rectangles that make it, one below the other."""

    shape: Shape
    cuts: tuple[Cut, ...]


def rank_tensors(shape: LlamaShape, tp_size: int, rank: int, pp_size: int = 1) -> dict[str, RankTensor]:
    """Everything that rankN.safetensors holds, by TensorRT-LLM v0.8.0's rules (examples/llama/convert_checkpoint.py).

    - q, k and v: rows; each is cut by itself, then q, k and v of this rank are stacked.
    - More ranks than key/value heads: each such head is repeated for tp / kv_heads neighbouring ranks.
    - fc is gate_proj and gate is up_proj: the network computes proj(silu(fc x) * gate x).
    - dense and proj: columns. Norms and the embedding: whole on every rank.
    - lm_head: rows, after zero rows up to the next multiple of tp. vocab_size in config.json stays what it was.
    - Biases: those of qkv, fc and gate are cut as their rows; those of dense and proj are whole on every rank, which
      adds them after the ranks' sum (layers/linear.py, RowLinear). attn_bias has all four or none, so if the model has
      none for dense (Qwen2) it is zeros.
    - Pipeline stages: rank = stage * tp_size + its place in the stage. Each takes the same number of layers and counts
      them from 0; the embedding is on the first stage, ln_f and lm_head are on the last (Mapping.pp_layers of
      tensorrt_llm/mapping.py).
    - Heads that do not divide are followed by heads of zeros up to padded_heads(shape, tp_size). This is our own rule:
      such a head's query and value are 0, and dense ignores it, so it adds nothing to the sum.
    """
    hidden, head = shape.hidden_size, shape.head_size
    stage, place = divmod(rank, tp_size)
    layers = shape.n_layers // pp_size

    def part(size: int) -> tuple[int, int]:
        return place * (size // tp_size), (place + 1) * (size // tp_size)

    q, k_v = _rank_heads(shape, tp_size, place)

    def heads(name: str, span: tuple[int, int, int]) -> Cut:
        first, end, count = span
        return Cut(name, (first * head, end * head), zero_rows=(count - (end - first)) * head)

    def stack(columns: int | None, *cuts: Cut) -> RankTensor:
        rows = sum(cut.rows[1] - cut.rows[0] + cut.zero_rows for cut in cuts)
        return RankTensor((rows,) if columns is None else (rows, columns), cuts)

    def whole(name: str, *size: int) -> RankTensor:
        return RankTensor(size, (Cut(name, (0, size[0])),))

    def columns(name: str, first: int, end: int, size: int) -> RankTensor:
        return RankTensor((hidden, size), (Cut(name, (0, hidden), (first, end), size - (end - first)),))

    first, end = part(-(-shape.vocab_size // tp_size) * tp_size)
    inside = min(first, shape.vocab_size), min(end, shape.vocab_size)
    tensors: dict[str, RankTensor] = {}
    if stage == pp_size - 1:
        tensors["lm_head.weight"] = stack(hidden, Cut(HEAD, inside, zero_rows=end - first - (inside[1] - inside[0])))
        tensors["transformer.ln_f.weight"] = whole(LAST_NORM, hidden)
    if stage == 0:
        tensors["transformer.vocab_embedding.weight"] = whole(EMBEDDING, shape.vocab_size, hidden)
    for index in range(layers):
        hf, ours = f"model.layers.{stage * layers + index}.", f"transformer.layers.{index}."
        attention, mlp = f"{hf}self_attn.", f"{hf}mlp."
        tensors.update(
            {
                f"{ours}attention.qkv.weight": stack(
                    hidden,
                    heads(f"{attention}q_proj.weight", q),
                    heads(f"{attention}k_proj.weight", k_v),
                    heads(f"{attention}v_proj.weight", k_v),
                ),
                f"{ours}attention.dense.weight": columns(
                    f"{attention}o_proj.weight", q[0] * head, q[1] * head, q[2] * head
                ),
                f"{ours}mlp.fc.weight": stack(hidden, Cut(f"{mlp}gate_proj.weight", part(shape.intermediate_size))),
                f"{ours}mlp.gate.weight": stack(hidden, Cut(f"{mlp}up_proj.weight", part(shape.intermediate_size))),
                f"{ours}mlp.proj.weight": columns(
                    f"{mlp}down_proj.weight", *part(shape.intermediate_size), shape.intermediate_size // tp_size
                ),
                f"{ours}input_layernorm.weight": whole(f"{hf}input_layernorm.weight", hidden),
                f"{ours}post_layernorm.weight": whole(f"{hf}post_attention_layernorm.weight", hidden),
            }
        )
        if shape.attention_bias:
            parts = [
                heads(f"{attention}{letter}_proj.bias", span) for letter, span in (("q", q), ("k", k_v), ("v", k_v))
            ]
            tensors[f"{ours}attention.qkv.bias"] = stack(None, *parts)
            dense = f"{attention}o_proj.bias"
            zeros = Cut(f"{attention}q_proj.bias", (0, 0), zero_rows=hidden)
            has_dense = shape.attention_bias == "all"
            tensors[f"{ours}attention.dense.bias"] = whole(dense, hidden) if has_dense else stack(None, zeros)
        if shape.mlp_bias:
            for name, source in (("fc", "gate"), ("gate", "up")):
                cut = Cut(f"{mlp}{source}_proj.bias", part(shape.intermediate_size))
                tensors[f"{ours}mlp.{name}.bias"] = stack(None, cut)
            tensors[f"{ours}mlp.proj.bias"] = whole(f"{mlp}down_proj.bias", hidden)
    return tensors


def _rank_heads(shape: LlamaShape, tp_size: int, place: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """(first, end, count) of the heads of a rank, and of its key/value heads;
    count - (end - first) heads of zeros follow."""
    n_heads, n_kv_heads = padded_heads(shape, tp_size)
    group, wide_group = shape.n_heads // shape.n_kv_heads, n_heads // n_kv_heads
    count, kv_count = n_heads // tp_size, max(1, n_kv_heads // tp_size)
    kv_first = place * n_kv_heads // tp_size
    kv = min(kv_first, shape.n_kv_heads), min(kv_first + kv_count, shape.n_kv_heads), kv_count
    # heads within their group, and the model's own groups; a rank has whole groups, or a part of one
    inside = place * count - kv_first * wide_group
    first = min(kv_first * group + min(inside, group), shape.n_heads)
    end = min(first + count, (kv_first + kv_count) * group, shape.n_heads)
    return (first, end, count), kv


def _rows_of(cut: Cut, block: Raw, at: int) -> Raw:
    """The part of a rectangle that lies in the rows from `at` on."""
    rows = block[max(0, cut.rows[0] - at) : max(0, cut.rows[1] - at)]
    if cut.columns is not None:
        rows = rows[:, slice(*cut.columns)]
    if cut.zero_columns:
        rows = np.pad(rows, ((0, 0), (0, cut.zero_columns)))
    return rows


def _zeros(cut: Cut, shape: Shape, item_bytes: int) -> Raw:
    return np.zeros((cut.zero_rows, *shape[1:]), np.uint16 if item_bytes == 2 else np.uint32)
