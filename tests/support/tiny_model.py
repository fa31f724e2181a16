"""A Llama of a few kilobytes whose sizes all differ, with random weights; the bundled one;
and what transformers says of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from split_checkpoint import Arrays, meta_to_hf
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


STORIES = Path(__file__).resolve().parents[2] / "models" / "stories"
STORIES_NETWORK: dict[str, Any] = {
    "dtype": DTYPE, "vocab_size": 2048, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 5,
    "num_attention_heads": 8, "num_key_value_heads": 4, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "max_position_embeddings": 512,
}  # fmt: skip


def story_weights() -> Arrays:
    """The bundled model's, under Hugging Face's names."""
    meta = torch.load(STORIES / "consolidated.00.pth", weights_only=True)
    return meta_to_hf({name: tensor.numpy() for name, tensor in meta.items() if name != "rope.freqs"}, 8, 4)


def oracle(network: dict[str, Any], hf: Arrays) -> LlamaForCausalLM:
    """transformers' own model, float32 on the stored values."""
    model: LlamaForCausalLM = LlamaForCausalLM(LlamaConfig(**{**network, "dtype": "float32"})).float().eval()
    model.load_state_dict({name: torch.from_numpy(array).float() for name, array in hf.items()})
    return model


@torch.inference_mode()
def log_probs_of_next(model: LlamaForCausalLM, tokens: list[int]) -> torch.Tensor:
    """transformers' log-softmax after each token but the last: (tokens - 1, vocab_size)."""
    logits: torch.Tensor = model(torch.tensor([tokens])).logits[0, :-1]
    return logits.log_softmax(-1)
