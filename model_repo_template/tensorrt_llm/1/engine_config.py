"""What an engine directory's config.json says about the network and its limits, checked before anything is loaded."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class EngineConfig:
    """The part of TensorRT-LLM's engine config.json that this engine needs, under upstream's names."""

    dtype: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_size: int
    norm_epsilon: float
    rotary_base: float
    rotary_scaling: dict[str, Any] | None
    tp_size: int
    max_batch_size: int
    max_input_len: int
    max_seq_len: int
    max_num_tokens: int
    attn_bias: bool = False
    mlp_bias: bool = False

    @property
    def heads_per_rank(self) -> int:
        return self.num_attention_heads // self.tp_size

    @property
    def kv_heads_per_rank(self) -> int:
        """At least one: with more ranks than KV heads the checkpoint repeats each head on adjacent ranks."""
        return max(1, self.num_key_value_heads // self.tp_size)

    @property
    def padded_vocab_size(self) -> int:
        """lm_head's rows over all ranks: the vocabulary, padded to a multiple of tp_size."""
        return -(-self.vocab_size // self.tp_size) * self.tp_size


def read_config(engine_dir: Path) -> EngineConfig:
    """config.json of an engine directory. Raises ValueError that names the request and what this engine can do."""
    path = engine_dir / "config.json"
    if not path.is_file():
        raise ValueError(f"no engine here: {path} does not exist (gpt_model_path is '{engine_dir}')")
    return parse_config(json.loads(path.read_text(encoding="utf-8")))


def parse_config(config: dict[str, Any]) -> EngineConfig:
    """The parsed config.json ({version, pretrained_config, build_config}) as an EngineConfig. Raises ValueError."""
    network, build = config["pretrained_config"], config["build_config"]
    only = {
        "architecture": ("LlamaForCausalLM",),
        "dtype": ("float16", "bfloat16", "float32"),
        "hidden_act": ("silu",),
        "position_embedding_type": ("rope_gpt_neox",),
        "use_parallel_embedding": (False,),
        "attn_bias": (False, True),
        "mlp_bias": (False, True),
    }
    for key, known in only.items():
        if network.get(key, known[0]) not in known:
            allowed = " ".join(map(str, known))
            raise ValueError(f"the torch engine does not support {key} {network[key]!r}, only {allowed}")
    if (quant_algo := (network.get("quantization") or {}).get("quant_algo")) is not None:
        raise ValueError(f"the torch engine does not support quantization: quant_algo is {quant_algo!r}, not null")
    mapping = network["mapping"]
    if mapping.get("pp_size", 1) != 1:
        raise ValueError(f"the torch engine has no pipeline parallelism: pp_size is {mapping['pp_size']}, not 1")
    heads = network["num_attention_heads"]
    kv_heads = network.get("num_key_value_heads") or heads
    tp_size = mapping["tp_size"]
    if heads % tp_size or (kv_heads % tp_size and tp_size % kv_heads):
        raise ValueError(f"{heads} heads with {kv_heads} KV heads cannot be split over tp_size {tp_size}")
    max_batch_size, max_input_len = build["max_batch_size"], build["max_input_len"]
    # Before 0.11 the build knew max_output_len; since then max_seq_len, which counts the prompt too.
    max_seq_len = build.get("max_seq_len") or max_input_len + build["max_output_len"]
    max_num_tokens = build.get("max_num_tokens") or max_batch_size * max_input_len
    return EngineConfig(
        dtype=network["dtype"],
        vocab_size=network["vocab_size"],
        hidden_size=network["hidden_size"],
        intermediate_size=network["intermediate_size"],
        num_hidden_layers=network["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_size=network.get("head_size") or network["hidden_size"] // heads,
        norm_epsilon=network["norm_epsilon"],
        rotary_base=network.get("rotary_base", 10000.0),
        rotary_scaling=network.get("rotary_scaling"),
        tp_size=tp_size,
        # Every running request needs room for one token in every step.
        max_batch_size=min(max_batch_size, max_num_tokens),
        max_input_len=min(max_input_len, max_seq_len - 1),
        max_seq_len=max_seq_len,
        max_num_tokens=max_num_tokens,
        attn_bias=network.get("attn_bias", False),
        mlp_bias=network.get("mlp_bias", False),
    )
