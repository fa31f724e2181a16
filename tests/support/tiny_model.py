"""A Llama of a few kilobytes whose sizes all differ, with random weights."""

from __future__ import annotations

from typing import Any

import torch
from split_checkpoint import Arrays
from transformers import LlamaConfig, LlamaForCausalLM

# On a GPU the engine computes in the dtype of its files; what is compared to 1e-4 here is float32.
DTYPE = "float32" if torch.cuda.is_available() else "float16"
# All sizes differ; a head is not hidden/heads wide; 4 ranks share 2 KV heads and pad the vocabulary.
TINY: dict[str, Any] = {
    "dtype": DTYPE, "vocab_size": 101, "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 3,
    "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 10, "rms_norm_eps": 1e-5, "rope_theta": 5000.0,
    "max_position_embeddings": 96,
}  # fmt: skip
TINY_BUILD = {"max_batch_size": 5, "max_input_len": 48, "max_output_len": 32, "max_num_tokens": 11}


def random_weights(network: dict[str, Any]) -> Arrays:
    torch.manual_seed(7)
    arrays = {}
    for name, tensor in LlamaForCausalLM(LlamaConfig(**network)).state_dict().items():
        spread = 1 + 0.3 * torch.randn_like(tensor) if tensor.ndim == 1 else 0.2 * torch.randn_like(tensor)
        arrays[name] = spread.half().numpy()
    return arrays
