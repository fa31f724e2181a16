"""A second, slow and plain opinion on how a Llama is split over ranks: numpy only, from the documented rules.

It reads the tensors of a Hugging Face Llama and writes an engine directory (config.json, rankN.safetensors) for the
torch engine's tests. It shares no code with the project's own conversion, so that the two can be compared.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

Arrays = dict[str, np.ndarray[Any, Any]]


def rank_tensors(hf: Arrays, rank: int, tp_size: int, layers: int, heads: int, kv_heads: int) -> Arrays:
    """One rank's tensors under TensorRT-LLM's names, from Hugging Face's."""

    def rows(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return np.split(array, tp_size, axis=0)[rank]

    def columns(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return np.split(array, tp_size, axis=1)[rank]

    def kv_rows(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        if tp_size <= kv_heads:
            return rows(array)
        by_head = array.reshape(kv_heads, -1, array.shape[1])  # (kv_heads, head_size, hidden)
        return rows(np.repeat(by_head, tp_size // kv_heads, axis=0).reshape(-1, array.shape[1]))

    head = hf["lm_head.weight"]
    padding = -len(head) % tp_size
    out = {
        "transformer.vocab_embedding.weight": hf["model.embed_tokens.weight"],
        "transformer.ln_f.weight": hf["model.norm.weight"],
        "lm_head.weight": rows(np.concatenate([head, np.zeros((padding, head.shape[1]), head.dtype)])),
    }
    for layer in range(layers):
        source, target = f"model.layers.{layer}.", f"transformer.layers.{layer}."
        q, k, v = (hf[f"{source}self_attn.{name}_proj.weight"] for name in "qkv")
        out[target + "attention.qkv.weight"] = np.concatenate([rows(q), kv_rows(k), kv_rows(v)])
        out[target + "attention.dense.weight"] = columns(hf[source + "self_attn.o_proj.weight"])
        out[target + "mlp.fc.weight"] = rows(hf[source + "mlp.gate_proj.weight"])
        out[target + "mlp.gate.weight"] = rows(hf[source + "mlp.up_proj.weight"])
        out[target + "mlp.proj.weight"] = columns(hf[source + "mlp.down_proj.weight"])
        out[target + "input_layernorm.weight"] = hf[source + "input_layernorm.weight"]
        out[target + "post_layernorm.weight"] = hf[source + "post_attention_layernorm.weight"]
        if f"{source}self_attn.q_proj.bias" in hf:
            q, k, v = (hf[f"{source}self_attn.{name}_proj.bias"][:, None] for name in "qkv")
            out[target + "attention.qkv.bias"] = np.concatenate([rows(q), kv_rows(k), kv_rows(v)])[:, 0]
            out[target + "attention.dense.bias"] = hf[f"{source}self_attn.o_proj.bias"]
        if f"{source}mlp.up_proj.bias" in hf:
            out[target + "mlp.fc.bias"] = rows(hf[source + "mlp.gate_proj.bias"])
            out[target + "mlp.gate.bias"] = rows(hf[source + "mlp.up_proj.bias"])
            out[target + "mlp.proj.bias"] = hf[source + "mlp.down_proj.bias"]
    return {name: np.ascontiguousarray(array) for name, array in out.items()}


def engine_config(network: dict[str, Any], tp_size: int, **build: Any) -> dict[str, Any]:
    """config.json of an engine; `network` holds Hugging Face's names."""
    heads = network["num_attention_heads"]
    return {
        "version": "0.8.0",
        "pretrained_config": {
            "architecture": "LlamaForCausalLM",
            "dtype": network["dtype"],
            "logits_dtype": "float32",
            "vocab_size": network["vocab_size"],
            "max_position_embeddings": network["max_position_embeddings"],
            "hidden_size": network["hidden_size"],
            "num_hidden_layers": network["num_hidden_layers"],
            "num_attention_heads": heads,
            "num_key_value_heads": network["num_key_value_heads"],
            "head_size": network.get("head_dim", network["hidden_size"] // heads),
            "hidden_act": "silu",
            "intermediate_size": network["intermediate_size"],
            "norm_epsilon": network["rms_norm_eps"],
            "position_embedding_type": "rope_gpt_neox",
            "use_parallel_embedding": False,
            "mapping": {"world_size": tp_size, "tp_size": tp_size, "pp_size": 1},
            "rotary_base": network["rope_theta"],
            "rotary_scaling": network.get("rope_scaling"),
            "attn_bias": network.get("attention_bias", False),
            "mlp_bias": network.get("mlp_bias", False),
            "quantization": {"quant_algo": None, "kv_cache_quant_algo": None},
        },
        "build_config": {"max_beam_width": 1, **build},
    }


def write_engine(folder: Path, hf: Arrays, network: dict[str, Any], tp_size: int, **build: Any) -> Path:
    """Writes an engine directory and returns it."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(engine_config(network, tp_size, **build)))
    shape = network["num_hidden_layers"], network["num_attention_heads"], network["num_key_value_heads"]
    for rank in range(tp_size):
        save_file(rank_tensors(hf, rank, tp_size, *shape), folder / f"rank{rank}.safetensors")
    return folder


def meta_to_hf(meta: Arrays, heads: int, kv_heads: int) -> Arrays:
    """Meta's names and rotary layout (neighbouring pairs) -> Hugging Face's (halves)."""

    def halves(array: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
        rows, columns = array.shape
        pairs = array.reshape(heads, rows // heads // 2, 2, columns)
        return pairs.transpose(0, 2, 1, 3).reshape(rows, columns)

    top = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
    inner = {
        "attention.wq": "self_attn.q_proj",
        "attention.wk": "self_attn.k_proj",
        "attention.wv": "self_attn.v_proj",
        "attention.wo": "self_attn.o_proj",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w2": "mlp.down_proj",
        "feed_forward.w3": "mlp.up_proj",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    out = {}
    for name, array in meta.items():
        key = name.removesuffix(".weight")
        if key in top:
            out[f"{top[key]}.weight"] = array
        elif key.startswith("layers."):
            _, layer, part = key.split(".", 2)
            if part == "attention.wq":
                array = halves(array, heads)
            elif part == "attention.wk":
                array = halves(array, kv_heads)
            out[f"model.layers.{layer}.{inner[part]}.weight"] = array
    return out
