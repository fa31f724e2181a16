"""A small random Llama in Hugging Face's form, as transformers saves it, with a tokenizer.json of bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

# a byte is a token; then four special ones
SPECIAL = {"<|begin|>": 256, "<|end|>": 257, "<|turn_end|>": 258, "<|unused|>": 259}
VOCABULARY = 260


def byte_spellings() -> list[str]:
    """GPT-2's writing of the 256 bytes."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in visible]
    return [chr(byte) if byte in visible else chr(256 + others.index(byte)) for byte in range(256)]


def byte_tokenizer(**changed: Any) -> dict[str, Any]:
    """tokenizer.json of bytes."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    vocabulary = {**{spelt: byte for byte, spelt in enumerate(byte_spellings())}, **SPECIAL}
    return {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "pre_tokenizer": level, "post_processor": None,
        "decoder": level, "added_tokens": [{"id": number, "content": text, **flags} for text, number in SPECIAL.items()],
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []}, **changed,
    }  # fmt: skip


def write_published(folder: Path, vocab_size: int = VOCABULARY, seed: int = 0, **files: Any) -> LlamaForCausalLM:
    """The model, saved with its files. files: name -> what replaces it: a dict is merged into ours, bytes or text are
    taken as they are, None leaves the file out."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.5, bos_token_id=256, eos_token_id=257,
    )  # fmt: skip
    model: LlamaForCausalLM = LlamaForCausalLM(config).float().eval()
    model.save_pretrained(folder)
    ours: dict[str, Any] = {
        "config.json": json.loads((folder / "config.json").read_text()),
        "generation_config.json": {"bos_token_id": 256, "eos_token_id": 257},
        "tokenizer.json": byte_tokenizer(),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|begin|>",
            "eos_token": "<|end|>",
            "chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
        },
    }
    for name, value in {**ours, **files}.items():
        (folder / name).unlink(missing_ok=True)
        if isinstance(value, dict):
            value = json.dumps({**ours.get(name, {}), **value})
        if value is not None:
            (folder / name).write_bytes(value if isinstance(value, bytes) else value.encode())
    return model
