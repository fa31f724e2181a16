"""Small random Llama models in Meta's form, made for tests: all dimensions differ,
so that a swapped axis cannot pass."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import sentencepiece
import torch

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Dims:
    """A model's params.json, and the feed-forward size that Meta's rule gives for it (worked out by hand)."""

    dim: int = 96
    n_layers: int = 3
    n_heads: int = 16
    n_kv_heads: int = 8
    multiple_of: int = 40
    intermediate_size: int = 280  # 2/3 * 4 * 96 = 256, up to the next multiple of 40
    vocab_size: int = 312
    norm_eps: float = 1e-4

    @property
    def head_size(self) -> int:
        return self.dim // self.n_heads

    def params(self, **changed: Any) -> dict[str, Any]:
        names = ("dim", "n_layers", "n_heads", "n_kv_heads", "multiple_of", "norm_eps")
        return {**{name: getattr(self, name) for name in names}, "vocab_size": -1, **changed}


GROUPED = Dims()  # 2 heads share a key/value head; can be split 1, 2, 4 and 8 ways
PLAIN = Dims(n_kv_heads=16)  # each head has its own
PADDED = Dims(vocab_size=313)  # 313 is prime: the output layer is padded for any TP but 1


def meta_tensors(dims: Dims = GROUPED, dtype: torch.dtype = torch.float16, seed: int = 0) -> Tensors:
    """All tensors of a model, unsplit, under Meta's names, in Meta's row order."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        drawn: torch.Tensor = torch.randn(rows, columns, generator=generator) * columns**-0.5
        return drawn.to(dtype)

    def norm() -> torch.Tensor:
        return (1 + 0.1 * torch.randn(dims.dim, generator=generator)).to(dtype)

    kv_size = dims.n_kv_heads * dims.head_size
    tensors = {
        "tok_embeddings.weight": matrix(dims.vocab_size, dims.dim),
        "norm.weight": norm(),
        "output.weight": matrix(dims.vocab_size, dims.dim),
    }
    for layer in range(dims.n_layers):
        tensors.update(
            {
                f"layers.{layer}.attention.wq.weight": matrix(dims.dim, dims.dim),
                f"layers.{layer}.attention.wk.weight": matrix(kv_size, dims.dim),
                f"layers.{layer}.attention.wv.weight": matrix(kv_size, dims.dim),
                f"layers.{layer}.attention.wo.weight": matrix(dims.dim, dims.dim),
                f"layers.{layer}.feed_forward.w1.weight": matrix(dims.intermediate_size, dims.dim),
                f"layers.{layer}.feed_forward.w2.weight": matrix(dims.dim, dims.intermediate_size),
                f"layers.{layer}.feed_forward.w3.weight": matrix(dims.intermediate_size, dims.dim),
                f"layers.{layer}.attention_norm.weight": norm(),
                f"layers.{layer}.ffn_norm.weight": norm(),
            }
        )
    return tensors


def split(tensors: Tensors, n_shards: int, embedding_dim: int = 1) -> list[Tensors]:
    """The shards as Meta's model-parallel layers cut them: each layer's output rows, or its input columns."""
    by_columns = ("wo.weight", "w2.weight") + (("tok_embeddings.weight",) if embedding_dim == 1 else ())
    shards: list[Tensors] = [{} for _ in range(n_shards)]
    for name, tensor in tensors.items():
        dim = None if name.endswith("norm.weight") else 1 if name.endswith(by_columns) else 0
        parts = [tensor] * n_shards if dim is None else tensor.chunk(n_shards, dim)
        for shard, part in zip(shards, parts, strict=True):
            shard[name] = part.clone().contiguous()
    for shard in shards:
        shard["rope.freqs"] = torch.arange(4, dtype=torch.float32)
    return shards


def write_meta(folder: Path, shards: Sequence[Tensors], params: dict[str, Any], tokenizer: bytes | None) -> Path:
    """Lay a model out as Meta's download does."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, shard in enumerate(shards):
        torch.save(shard, folder / f"consolidated.{index:02d}.pth")
    (folder / "params.json").write_text(json.dumps(params))
    if tokenizer is not None:
        (folder / "tokenizer.model").write_bytes(tokenizer)
    return folder


def write_model(folder: Path, dims: Dims = GROUPED, dtype: torch.dtype = torch.float16, n_shards: int = 1) -> Path:
    """A whole model with its tokenizer."""
    return write_meta(
        folder, split(meta_tensors(dims, dtype), n_shards), dims.params(), tokenizer_model(dims.vocab_size)
    )


# repetitive on purpose: where equal pieces follow each other, the order of merges shows
CORPUS = (
    ["aaaaaaaa abababab banana anan ana", "the  quick   brown    fox", "한국어 안녕하세요 안녕", "x = [[0, 0], [0, 0]]"]
    * 5
    + ["hello hello world, hello!"] * 9
    + ["    indented\tby tabs\tand    spaces"] * 7
)


@lru_cache(None)
def tokenizer_model(vocab_size: int = GROUPED.vocab_size, **changed: Any) -> bytes:
    """A tokenizer.model of Llama 2's kind, trained on CORPUS."""
    settings = {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "character_coverage": 1.0,
        "allow_whitespace_only_pieces": True,
        "split_by_whitespace": False,
        "minloglevel": 2,
        **changed,
    }
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=model, vocab_size=vocab_size, **settings
    )
    return model.getvalue()
