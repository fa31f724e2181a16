"""The Llama network of one tensor-parallel rank: its weights, its key/value cache and one packed forward step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from engine_config import EngineConfig
from ranks import Ranks
from safetensors import safe_open
from step import Choice, Chooser, Chunk, Step
from torch import Tensor
from torch.nn import functional as F
from weight_file import read_into, tensors_of

# Positions of a block that requests share
REUSED_BLOCK_TOKENS = 16


def tensor_shapes(config: EngineConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of each tensor of one rank's file (TensorRT-LLM v0.8.0's names, the same in later versions)."""
    hidden, inner = config.hidden_size, config.intermediate_size // config.tp_size
    q_rows, kv_rows = config.heads_per_rank * config.head_size, config.kv_heads_per_rank * config.head_size
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.vocab_embedding.weight": (config.vocab_size, hidden),
        "transformer.ln_f.weight": (hidden,),
        "lm_head.weight": (config.padded_vocab_size // config.tp_size, hidden),
    }
    for index in range(config.num_hidden_layers):
        layer = f"transformer.layers.{index}."
        shapes[layer + "input_layernorm.weight"] = (hidden,)
        shapes[layer + "attention.qkv.weight"] = (q_rows + 2 * kv_rows, hidden)
        shapes[layer + "attention.dense.weight"] = (hidden, q_rows)
        shapes[layer + "post_layernorm.weight"] = (hidden,)
        # Upstream's names are crossed: fc is Hugging Face's gate_proj, gate is its up_proj.
        shapes[layer + "mlp.fc.weight"] = (inner, hidden)
        shapes[layer + "mlp.gate.weight"] = (inner, hidden)
        shapes[layer + "mlp.proj.weight"] = (hidden, inner)
        biased = ["attention.qkv", "attention.dense"] if config.attn_bias else []
        biased += ["mlp.fc", "mlp.gate", "mlp.proj"] if config.mlp_bias else []
        shapes.update({f"{layer}{name}.bias": shapes[f"{layer}{name}.weight"][:1] for name in biased})
    return shapes


def load_weights(
    path: Path, config: EngineConfig, device: torch.device, dtype: torch.dtype, together: bool = False
) -> dict[str, Tensor]:
    """The tensors of rankN.safetensors on `device`. Raises ValueError when one is missing or has another shape.

    together: mlp.fc and mlp.gate of a layer become one tensor mlp.both, in that order; their biases too.
    Tensors that are not asked for are left alone: TensorRT-LLM 0.10 and later add rotary tables to the file.
    """
    if not path.is_file():
        raise ValueError(f"no weights for this rank: {path} does not exist")
    weights: dict[str, Tensor] = {}
    stored, places, converted = tensors_of(path), dict[int, Tensor](), dict[str, Tensor]()
    for name, shape in tensor_shapes(config).items():
        if name not in stored:
            raise ValueError(f"{path} has no tensor {name}; config.json promises it with shape {list(shape)}")
        kind, found, begin, _ = stored[name]
        if found != shape:
            raise ValueError(f"{path}: {name} has shape {list(found)}, config.json promises {list(shape)}")
        layer, _, part = name.rpartition("mlp.")
        of, _, what = part.partition(".")
        if together and of in ("fc", "gate"):
            both = f"{layer}mlp.both.{what}"
            if both not in weights:
                weights[both] = torch.empty(2 * shape[0], *shape[1:], device=device, dtype=dtype)
            place = weights[both][shape[0] :] if of == "gate" else weights[both][: shape[0]]
        else:
            place = weights[name] = torch.empty(shape, device=device, dtype=dtype)
        if kind == dtype:
            places[begin] = place
        else:
            converted[name] = place
    read_into(path, places)
    if converted:
        with safe_open(path, framework="pt") as file:
            for name, place in converted.items():
                place.copy_(file.get_tensor(name))
    return weights


def rotary_tables(config: EngineConfig) -> tuple[Tensor, Tensor]:
    """(cos, sin) of every position, float32 (max_seq_len, head_size); both halves of a head have the same angles. yarn:
    times its factor."""
    angles = torch.arange(config.max_seq_len, dtype=torch.float32)[:, None] * rotary_frequencies(config)
    angles = torch.cat((angles, angles), dim=-1)
    factor = attention_factor(config.rotary_scaling or {})
    return angles.cos() * factor, angles.sin() * factor


def rotary_frequencies(config: EngineConfig) -> Tensor:
    """Angle per position of each rotary pair, float32 (head_size / 2). Raises ValueError for an unknown scaling.

    Conventions of Hugging Face's modeling_rope_utils ("linear", "llama3" and "yarn").
    """
    exponents = torch.arange(0, config.head_size, 2, dtype=torch.float32) / config.head_size
    frequencies = torch.pow(config.rotary_base, exponents).reciprocal()
    scaling = config.rotary_scaling or {"type": "default"}
    kind = scaling.get("rope_type", scaling.get("type"))
    # "dynamic" changes nothing up to max_position_embeddings, and no engine is built for longer sequences
    # (scripts/build_engines.py, limits)
    if kind in ("default", "dynamic"):
        return frequencies
    if kind == "linear":
        return frequencies / float(scaling["factor"])
    if kind == "llama3":
        low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
        turns = frequencies * (scaling["original_max_position_embeddings"] / (2 * math.pi))
        # slow pairs are scaled, fast ones stay, those between are mixed
        return torch.lerp(frequencies / scaling["factor"], frequencies, ((turns - low) / (high - low)).clamp(0, 1))
    if kind == "yarn":
        # pairs that turn more than beta_fast times over the original positions stay, below beta_slow they are scaled
        low, high = (
            config.head_size
            * math.log(scaling["original_max_position_embeddings"] / (turns * 2 * math.pi))
            / (2 * math.log(config.rotary_base))
            for turns in (scaling.get("beta_fast") or 32, scaling.get("beta_slow") or 1)
        )
        if scaling.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, config.head_size - 1)
        ramp = (torch.arange(config.head_size // 2, dtype=torch.float32) - low) / (high - low if high != low else 0.001)
        return torch.lerp(frequencies, frequencies / scaling["factor"], ramp.clamp(0, 1))
    raise ValueError(
        f"the torch engine does not support rotary_scaling {kind!r}, only linear, dynamic, llama3 and yarn"
    )


def attention_factor(scaling: dict[str, Any]) -> float:
    """The factor by which yarn multiplies cos and sin (modeling_rope_utils, _compute_yarn_parameters); 1 for other
    scalings."""
    if scaling.get("rope_type", scaling.get("type")) != "yarn":
        return 1.0
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])

    def grown(by: float) -> float:
        return 0.1 * by * math.log(scaling["factor"]) + 1.0 if scaling["factor"] > 1 else 1.0

    mscale, of_all = scaling.get("mscale"), scaling.get("mscale_all_dim")
    return grown(mscale) / grown(of_all) if mscale and of_all else grown(1.0)


class Packing:
    """Where each token of a step lies: its rows in the packed tensors, its slots and positions in the cache."""

    def __init__(self, chunks: Sequence[Chunk], device: torch.device) -> None:
        def index(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.long, device=device)

        ends = list(accumulate(len(c.token_ids) for c in chunks))
        placed = [(c, end - len(c.token_ids), end) for c, end in zip(chunks, ends, strict=True)]
        self.token_ids = index([token for c in chunks for token in c.token_ids])
        self.slots = index([c.slot for c in chunks for _ in c.token_ids])
        self.positions = index([c.start + i for c in chunks for i in range(len(c.token_ids))])
        self.logit_rows = index([row for c, _, end in placed for row in range(end - c.n_logits, end)])
        self.prompts = [(c, begin, end) for c, begin, end in placed if end - begin > 1]
        # Single tokens attend all together, in the order of their slots: neighbouring slots are a view of the cache.
        singles = sorted((c.slot, c.start, begin) for c, begin, end in placed if end - begin == 1)
        self.single_rows = index([row for _, _, row in singles])
        if singles:
            first, last = singles[0][0], singles[-1][0]
            adjacent = last - first + 1 == len(singles)
            self.single_slots = slice(first, last + 1) if adjacent else index([slot for slot, _, _ in singles])
            starts = index([start for _, start, _ in singles])
            self.single_length = max(start for _, start, _ in singles) + 1
            visible = torch.arange(self.single_length, device=device) <= starts[:, None]
            self.single_mask = visible[:, None, None, :]  # (singles, 1, 1, single_length)


@dataclass(frozen=True)
class Done:
    """A step that has ended before `launch` returned."""

    choice: Choice
    logits: Tensor | None

    def choose(self) -> None:
        """`launch` has chosen."""

    def wait(self) -> Choice:
        return self.choice


class Llama:
    """One rank's share of the network. All ranks launch the same steps; rank 0 gets the logits and chooses.

    A slot of the cache is as long as the longest sequence, so that neighbouring slots are a view. reuse: what a slot
    holds is also kept in blocks, and a request that shares blocks gets a copy of them.
    """

    lookahead = 0

    def __init__(self, config: EngineConfig, weights: dict[str, Tensor], ranks: Ranks, reuse: bool = False) -> None:
        self.config, self.weights, self.ranks = config, weights, ranks
        embedding = weights["transformer.vocab_embedding.weight"]
        self.device, self.dtype = embedding.device, embedding.dtype
        # (max_seq_len, 1, head_size): the same for all heads
        self.cos, self.sin = (table[:, None].to(self.device, self.dtype) for table in rotary_tables(config))
        cache = (config.max_batch_size, config.kv_heads_per_rank, config.max_seq_len, config.head_size)
        self.keys = [torch.zeros(cache, device=self.device, dtype=self.dtype) for _ in range(config.num_hidden_layers)]
        self.values = [torch.zeros_like(keys) for keys in self.keys]
        self.n_blocks, self.block_tokens = config.max_batch_size, config.max_seq_len
        self.most_prompt_tokens = self.most_prompts = config.max_num_tokens
        self.kept: tuple[Tensor, Tensor] | None = None
        self.tables: dict[int, tuple[int, ...]] = {}
        self.fresh: set[int] = set()  # slots whose request has not run yet
        if reuse:
            self.block_tokens = REUSED_BLOCK_TOKENS
            self.n_blocks *= -(-config.max_seq_len // REUSED_BLOCK_TOKENS)
            shape = (config.num_hidden_layers, self.n_blocks + 1, cache[1], REUSED_BLOCK_TOKENS, config.head_size)
            self.kept = (
                torch.zeros(shape, device=self.device, dtype=self.dtype),
                torch.zeros(shape, device=self.device, dtype=self.dtype),
            )

    def prompt_tokens_beside_streams(self, waiting: int) -> int:
        return self.most_prompt_tokens

    def launch(self, step: Step, choose: Chooser | None = None) -> Done:
        """Runs a step. Rank 0 brings `choose`."""
        for slot, blocks in step.tables:
            self.tables[slot] = blocks
            self.fresh.add(slot)
        if self.kept is not None:
            for chunk in step.chunks:
                if chunk.slot in self.fresh:
                    self._copy(chunk.slot, range(chunk.start // self.block_tokens), to_slot=True)
        self.fresh -= {chunk.slot for chunk in step.chunks}
        logits = self.step(step.chunks)
        if self.kept is not None:
            for chunk in step.chunks:
                end = chunk.start + len(chunk.token_ids)
                full = range(chunk.start // self.block_tokens, end // self.block_tokens)
                self._copy(chunk.slot, full, to_slot=False)
        if choose is None or logits is None:
            return Done(Choice(torch.empty(0)), logits)
        return Done(choose(logits), logits)

    def _copy(self, slot: int, indices: range, to_slot: bool) -> None:
        """The n-th blocks of a slot's sequence, from where blocks are kept to the slot or back."""
        assert self.kept is not None
        for index in indices:
            begin, block = index * self.block_tokens, self.tables[slot][index]
            for layer in range(self.config.num_hidden_layers):
                for cache, kept in zip((self.keys[layer], self.values[layer]), self.kept, strict=True):
                    part, its = cache[slot, :, begin : begin + self.block_tokens], kept[layer, block]
                    if to_slot:
                        part.copy_(its)
                    else:
                        its.copy_(part)

    @torch.inference_mode()
    def step(self, chunks: Sequence[Chunk]) -> Tensor | None:
        """Runs all chunks through the network at once and remembers their keys and values.

        Returns float32 logits (sum of n_logits, vocab_size) on the CPU of rank 0, in the order of the chunks; None on
        other ranks, or when no chunk asks for logits.
        """
        config, weights, packing = self.config, self.weights, Packing(chunks, self.device)
        x = weights["transformer.vocab_embedding.weight"][packing.token_ids]  # (tokens, hidden)
        for index in range(config.num_hidden_layers):
            layer = f"transformer.layers.{index}."
            hidden = self._norm(x, layer + "input_layernorm.weight")
            x = x + self._attention(hidden, index, packing)
            hidden = self._norm(x, layer + "post_layernorm.weight")
            inner = F.silu(self._linear(hidden, layer + "mlp.fc"))
            inner = inner * self._linear(hidden, layer + "mlp.gate")  # (tokens, intermediate / ranks)
            x = x + self._summed(inner, layer + "mlp.proj")
        if not len(packing.logit_rows):
            return None
        last = self._norm(x[packing.logit_rows], "transformer.ln_f.weight")
        logits = self.ranks.gather(F.linear(last, weights["lm_head.weight"]).float())
        return None if logits is None else logits[:, : config.vocab_size].cpu()

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, (self.config.hidden_size,), self.weights[name], self.config.norm_epsilon)

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.weights[name + ".weight"], self.weights.get(name + ".bias"))

    def _summed(self, x: Tensor, name: str) -> Tensor:
        """A layer whose input is split over the ranks: the sum of their outputs, plus the bias once."""
        out = self.ranks.all_reduce(F.linear(x, self.weights[name + ".weight"]))
        bias = self.weights.get(name + ".bias")
        return out if bias is None else out + bias

    def _attention(self, hidden: Tensor, index: int, packing: Packing) -> Tensor:
        """(tokens, hidden) -> (tokens, hidden), summed over the ranks."""
        heads, kv_heads, size = self.config.heads_per_rank, self.config.kv_heads_per_rank, self.config.head_size
        layer = f"transformer.layers.{index}.attention."
        qkv = self._linear(hidden, layer + "qkv").view(-1, heads + 2 * kv_heads, size)
        rotated, v = qkv[:, : heads + kv_heads], qkv[:, heads + kv_heads :]
        # Hugging Face's rotation: the two halves of a head are the pairs. The checkpoint has q and k in that order.
        low, high = rotated.chunk(2, dim=-1)
        turned = torch.cat((-high, low), dim=-1)
        rotated = rotated * self.cos[packing.positions] + turned * self.sin[packing.positions]
        q, k = rotated[:, :heads], rotated[:, heads:]  # (tokens, heads, size), (tokens, kv_heads, size)

        keys, values = self.keys[index], self.values[index]  # (slots, kv_heads, max_seq_len, size)
        keys[packing.slots, :, packing.positions] = k
        values[packing.slots, :, packing.positions] = v
        out = torch.empty_like(q)
        if len(packing.single_rows):
            length = packing.single_length
            # The heads that share a KV head are the rows of one query, so no key is repeated. Nothing is causal here.
            grouped = q[packing.single_rows].view(-1, kv_heads, heads // kv_heads, size)
            seen_k = keys[:, :, :length][packing.single_slots]
            seen_v = values[:, :, :length][packing.single_slots]
            mixed = F.scaled_dot_product_attention(grouped, seen_k, seen_v, attn_mask=packing.single_mask)
            out[packing.single_rows] = mixed.reshape(-1, heads, size)
        for chunk, begin, end in packing.prompts:
            length = chunk.start + end - begin
            causal = torch.ones(end - begin, length, dtype=torch.bool, device=self.device).tril(chunk.start)
            mixed = F.scaled_dot_product_attention(
                q[begin:end].transpose(0, 1)[None],
                keys[chunk.slot, :, :length][None],
                values[chunk.slot, :, :length][None],
                attn_mask=causal,
                enable_gqa=True,
            )  # (1, heads, tokens of the chunk, size)
            out[begin:end] = mixed[0].transpose(0, 1)
        return self._summed(out.flatten(1), layer + "dense")
