"""Reads a Llama model in Meta's form: params.json,
consolidated.NN.pth (one per model-parallel shard) and where its bytes lie.

Nothing of a .pth is run (see torch_file.py);
the weights are read by rows and checked against the checksums that the file carries.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator, Mapping

import numpy as np

from scripts import reports
from scripts.weights import files
from scripts.weights.hugging_face import check_tensors
from scripts.weights.safetensors import DTYPE_NAMES, DTYPES, ITEM_BYTES, Raw, StoredTensor
from scripts.weights.shape import EMBEDDING, HEAD, LAST_NORM, LlamaShape, Params, Shape
from scripts.weights.torch_file import read_torch_file

# How the shards of a tensor make the whole: "rows" and "columns" are joined, "same" is equal in every shard.
ROWS, COLUMNS, SAME = "rows", "columns", "same"
# Meta's name -> Hugging Face's name, how it was split (Meta's model.py: ColumnParallelLinear splits the output,
# RowParallelLinear the input, ParallelEmbedding the columns). wq and wk are permuted on the way, see pairs_to_halves.
GLOBAL = {
    "tok_embeddings.weight": (EMBEDDING, COLUMNS),
    "norm.weight": (LAST_NORM, SAME),
    "output.weight": (HEAD, ROWS),
}
LAYER = {
    "attention.wq.weight": ("self_attn.q_proj.weight", ROWS),
    "attention.wk.weight": ("self_attn.k_proj.weight", ROWS),
    "attention.wv.weight": ("self_attn.v_proj.weight", ROWS),
    "attention.wo.weight": ("self_attn.o_proj.weight", COLUMNS),
    "feed_forward.w1.weight": ("mlp.gate_proj.weight", ROWS),
    "feed_forward.w2.weight": ("mlp.down_proj.weight", COLUMNS),
    "feed_forward.w3.weight": ("mlp.up_proj.weight", ROWS),
    "attention_norm.weight": ("input_layernorm.weight", SAME),
    "ffn_norm.weight": ("post_attention_layernorm.weight", SAME),
}
# the rotary frequencies: every engine computes them itself
DROPPED = "rope.freqs"


Shard = Mapping[str, StoredTensor]


def shard_paths(folder: Path) -> list[Path]:
    """consolidated.00.pth and its followers; a Problem for a gap in the numbers or for a .pth that does not belong
    there."""
    names = sorted(path.name for path in folder.glob("*.pth"))
    expected = [files.shard(index) for index in range(len(names))]
    numbered = files.weights_among(names, ".pth")
    extra = sorted(set(names) - set(numbered))
    if extra:
        raise reports.weights.weights_extra_file(folder, extra, "consolidated.NN.pth")
    missing = sorted(set(expected) - set(names))
    if missing or not names:
        raise reports.weights.weights_file_missing(folder, missing[0] if missing else files.shard(0), names)
    dangling = [name for name in names if not (folder / name).is_file()]
    if dangling:
        raise reports.weights.weights_file_missing(folder, dangling[0], sorted(set(names) - set(dangling)))
    return [folder / name for name in names]


def read_shard(path: Path) -> Shard:
    """The tensors of one .pth; only its directory is read. A Problem if it is damaged, cut off, not a torch file, or
    holds more than weights."""
    shard = {}
    for name, tensor in read_torch_file(path).items():
        if name == DROPPED:
            continue
        if tensor.dtype not in ITEM_BYTES:
            raise reports.weights.model_unfit(path, f"{name} is of the type {tensor.dtype}", ", ".join(DTYPES))
        shard[name] = StoredTensor(path, name, tensor.dtype, tensor.shape, tensor.start, tensor.crc32)
    return shard


@dataclass(frozen=True)
class MetaModel:
    """All shards of a model, checked against params.json; gives Hugging Face's tensors by blocks of rows."""

    shape: LlamaShape
    dtype: str  # float16, bfloat16, float32
    shards: tuple[Shard, ...]
    # Hugging Face's tensor name -> (Meta's name, how its shards are laid together)
    names: Mapping[str, tuple[str, str]]

    @property
    def files(self) -> tuple[Path, ...]:
        """The shards."""
        return tuple(next(iter(shard.values())).path for shard in self.shards)

    @property
    def tensors(self) -> Mapping[str, tuple[str, Shape]]:
        """Hugging Face's tensor name -> its stored type and shape."""
        return {name: (DTYPES[self.dtype], shape) for name, shape in self.shape.hf_tensors().items()}

    def origin(self, hf_name: str) -> tuple[Path, str]:
        """The first file that holds a tensor, and what it is called there."""
        stored = self.shards[0][self.names[hf_name][0]]
        return stored.path, stored.name

    def blocks(self, hf_name: str) -> Iterator[Raw]:
        """The rows of Hugging Face's tensor, in order: arrays of (rows, columns) or (rows,)."""
        name, how = self.names[hf_name]
        parts = [shard[name] for shard in self.shards]
        if how == SAME:
            same = [np.concatenate(list(part.blocks())) for part in parts]  # norms: a few kB
            for part, values in zip(parts, same, strict=True):
                if not np.array_equal(values, same[0]):
                    raise reports.weights.weights_contradict(
                        part.path,
                        name,
                        "it must be the same in all shards",
                        f"it differs from the one in {parts[0].path.name}",
                    )
            yield same[0]
        elif how == COLUMNS:
            row_bytes = sum(part.row_bytes for part in parts)
            for blocks in zip(*(part.blocks(1, row_bytes) for part in parts), strict=True):
                yield np.concatenate(blocks, axis=1)
        else:
            permuted = name.endswith(("wq.weight", "wk.weight"))
            for part in parts:
                for block in part.blocks(self.shape.head_size if permuted else 1):
                    yield pairs_to_halves(block, self.shape.head_size) if permuted else block


def joined(folder: Path, shards: list[Shard], params: Params, tokenizer_path: Path, vocab_size: int) -> MetaModel:
    """Compares all tensors of all shards with params.json and the tokenizer's vocab_size;
    a Problem for the first mismatch."""
    layers = {match.group(1) for name in shards[0] if (match := re.match(r"layers\.(\d+)\.", name))}
    if len(layers) != params.n_layers:
        raise reports.weights.weights_contradict(
            folder, "n_layers", f"params.json says {params.n_layers}", f"the tensors have {len(layers)}"
        )
    shape = params.shape(vocab_size)
    found = [{name: tensor.shape for name, tensor in shard.items()} for shard in shards]
    _check_feed_forward(folder / files.shard(0), params, shape, len(shards), found[0])
    model_vocab_size = found[0].get("output.weight", (0,))[0] * len(shards)
    if model_vocab_size not in (0, vocab_size):
        raise reports.weights.vocabulary_differs(tokenizer_path, vocab_size, model_vocab_size)
    for name, size in (
        ("n_heads", shape.n_heads),
        ("n_kv_heads", shape.n_kv_heads),
        ("vocab_size", vocab_size),
        ("dim", params.dim),
    ):
        if size % len(shards):
            raise reports.weights.weights_contradict(
                folder, name, f"it is {size}", f"{len(shards)} shards cannot share it evenly"
            )
    names = _names(shape, shards)
    expected = _shard_shapes(shape, len(shards), names)
    for index, shapes in enumerate(found):
        check_tensors(folder / files.shard(index), "params.json", expected, shapes)
    dtypes = {tensor.dtype: tensor for shard in shards for tensor in shard.values()}
    if len(dtypes) > 1:
        one, other = list(dtypes.values())[:2]
        raise reports.weights.weights_contradict(
            folder,
            "the type of the weights",
            f"{one.name} in {one.path.name} is {one.dtype}",
            f"{other.name} in {other.path.name} is {other.dtype}",
        )
    return MetaModel(shape, DTYPE_NAMES[next(iter(dtypes))], tuple(shards), names)


def pairs_to_halves(rows: Raw, head_size: int) -> Raw:
    """Re-order the rows of wq or wk within each head: (heads * head_size, columns) -> the same shape.

    Meta rotates neighbours (x0 with x1, x2 with x3), Hugging Face and TensorRT-LLM rotate halves (x0 with x[d/2]): rows
    0, 2, 4, ... of a head come first, then 1, 3, 5, ... Source:
    transformers' convert_llama_weights_to_hf.py, `permute`.
    """
    columns = rows.shape[1]
    return rows.reshape(-1, head_size // 2, 2, columns).swapaxes(1, 2).reshape(-1, columns)


def halves_to_pairs(rows: Raw, head_size: int) -> Raw:
    """The way back: halves_to_pairs(pairs_to_halves(x)) == x."""
    columns = rows.shape[1]
    return rows.reshape(-1, 2, head_size // 2, columns).swapaxes(1, 2).reshape(-1, columns)


def _names(shape: LlamaShape, shards: list[Shard]) -> dict[str, tuple[str, str]]:
    names = {hf: (meta, how) for meta, (hf, how) in GLOBAL.items()}
    for index in range(shape.n_layers):
        names.update(
            {f"model.layers.{index}.{hf}": (f"layers.{index}.{meta}", how) for meta, (hf, how) in LAYER.items()}
        )
    # Llama 2 splits the embedding by columns, some Llama 3 files by rows: the shape tells
    meta_embedding = names[EMBEDDING][0]
    if meta_embedding in shards[0] and shards[0][meta_embedding].shape[0] * len(shards) == shape.vocab_size:
        names[EMBEDDING] = (meta_embedding, ROWS)
    return names


def _shard_shapes(shape: LlamaShape, n_shards: int, names: Mapping[str, tuple[str, str]]) -> dict[str, tuple[int, ...]]:
    """Meta's names -> the shape that each shard's part must have."""
    shapes = {}
    for hf_name, whole in shape.hf_tensors().items():
        name, how = names[hf_name]
        split = {ROWS: 0, COLUMNS: 1, SAME: None}[how]
        shapes[name] = tuple(size // n_shards if axis == split else size for axis, size in enumerate(whole))
    return shapes


def _check_feed_forward(
    path: Path, params: Params, shape: LlamaShape, n_shards: int, found: Mapping[str, tuple[int, ...]]
) -> None:
    """Checks the first matrix, to say in Meta's terms what is wrong: too few shards, or another multiple_of or
    ffn_dim_multiplier."""
    rows, columns = (*found.get("layers.0.feed_forward.w1.weight", ()), 0, 0)[:2]
    expected = shape.intermediate_size
    if rows * n_shards == expected or columns != shape.hidden_size:
        return
    if rows and expected % rows == 0 and expected // rows > n_shards:
        raise reports.weights.shards_missing(path.parent, n_shards, expected // rows)
    raise reports.weights.weights_contradict(
        path,
        "feed-forward size",
        f"params.json (dim {params.dim}, multiple_of {params.multiple_of}, ffn_dim_multiplier "
        f"{params.ffn_dim_multiplier}) gives {expected}",
        f"the tensors of {n_shards} shard(s) have {rows * n_shards}",
    )
