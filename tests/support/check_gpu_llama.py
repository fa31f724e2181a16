"""The GPU's Llama without a GPU: its kernels in Triton's interpreter, its graphs as plain calls. Run by test_gpu_kernels.py.

What only a GPU can show (captures, ranks that read each other's memory) is not shown here; that each request gets the tokens and logits
that the plain network gives is.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are defined
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "model_repo_template" / "tensorrt_llm" / "1"))

import engine as engines  # noqa: E402
import gpu_llama  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from drive_engine import Answer  # noqa: E402
from split_checkpoint import write_engine  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn import functional as F  # noqa: E402

NETWORK = {
    "dtype": "float32", "vocab_size": 101, "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 1,
    "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 10, "rms_norm_eps": 1e-5, "rope_theta": 5000.0,
    "max_position_embeddings": 200,
}  # fmt: skip
BUILD = {"max_batch_size": 3, "max_input_len": 90, "max_output_len": 20, "max_num_tokens": 80}


class PlainCalls(gpu_llama.GpuLlama):
    """Graphs that run what they would have captured."""

    def _captured(self, run: Callable[[int], None], size: int) -> Any:
        run(size)
        return SimpleNamespace(replay=lambda: run(size))


def packed_attention(q: Tensor, k: Tensor, v: Tensor, begins: Tensor, longest: int) -> Tensor:
    out, group = torch.zeros_like(q), q.shape[1] // k.shape[1]
    for begin, end in zip(begins.tolist(), begins.tolist()[1:], strict=False):
        assert 0 <= end - begin <= longest
        if end > begin:
            parts = (q[begin:end], *(part[begin:end].repeat_interleave(group, 1) for part in (k, v)))
            out[begin:end] = F.scaled_dot_product_attention(
                *(part.transpose(0, 1) for part in parts), is_causal=True
            ).transpose(0, 1)
    return out


def without_gpu(packed: bool) -> None:
    """packed: whole prompts together, as on a GPU that computes in half precision."""
    nothing = lambda *_: None  # noqa: E731
    event = lambda **_: SimpleNamespace(record=nothing, synchronize=nothing)  # noqa: E731
    for name, value in {
        "set_device": nothing, "synchronize": nothing, "Event": event, "Stream": nothing, "get_device_name": lambda *_: "none",
        "get_device_capability": lambda *_: (8, 0), "mem_get_info": lambda *_: (1 << 30, 2 << 30),
    }.items():  # fmt: skip
        setattr(torch.cuda, name, value)
    torch.Tensor.pin_memory = lambda self: self  # type: ignore[method-assign, assignment]
    gpu_llama.SPARE_BYTES, gpu_llama.PROMPT_SIZES = 0, (16, 64)
    gpu_llama.flash_attention = packed_attention
    PlainCalls._packs_prompts = lambda _: packed  # type: ignore[method-assign]


def random_hf() -> dict[str, np.ndarray]:
    chance = np.random.default_rng(3)
    head, hidden, inner, vocab = (
        NETWORK["head_dim"],
        NETWORK["hidden_size"],
        NETWORK["intermediate_size"],
        NETWORK["vocab_size"],
    )
    rows = {"q": 8 * head, "k": 2 * head, "v": 2 * head}
    shapes = {
        "model.embed_tokens.weight": (vocab, hidden),
        "lm_head.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
    }
    for layer in range(NETWORK["num_hidden_layers"]):
        name = f"model.layers.{layer}."
        shapes.update({f"{name}self_attn.{part}_proj.weight": (size, hidden) for part, size in rows.items()})
        shapes[f"{name}self_attn.o_proj.weight"] = (hidden, 8 * head)
        shapes.update({f"{name}mlp.{part}_proj.weight": (inner, hidden) for part in ("gate", "up")})
        shapes[f"{name}mlp.down_proj.weight"] = (hidden, inner)
        shapes.update({f"{name}{norm}_layernorm.weight": (hidden,) for norm in ("input", "post_attention")})
    return {
        name: (chance.normal(0, 0.25, shape) if len(shape) > 1 else chance.uniform(0.5, 1.5, shape)).astype(np.float32)
        for name, shape in shapes.items()
    }


def requests() -> list[dict[str, Any]]:
    """Long and short prompts, greedy and drawn, with and without what needs history; more than there are slots."""
    chance = np.random.default_rng(5)

    def prompt(length: int) -> list[int]:
        return chance.integers(3, NETWORK["vocab_size"], length).tolist()

    return [
        {"prompt": prompt(5), "max_new_tokens": 6},
        {"prompt": prompt(62), "max_new_tokens": 4, "top_k": 20, "random_seed": 3, "temperature": 2.0},
        {"prompt": prompt(1), "max_new_tokens": 3, "log_probs": True},
        {"prompt": prompt(9), "max_new_tokens": 3, "context_logits": True, "generation_logits": True},
        {"prompt": prompt(90), "max_new_tokens": 3},
        {"prompt": prompt(7), "max_new_tokens": 4, "top_p": 0.9, "repetition_penalty": 1.3},
        {"prompt": prompt(3), "max_new_tokens": 1},
    ]


def answered(opened: engines.Engine) -> list[Answer]:
    answers = [Answer(opened, **request) for request in requests()]
    for answer in answers:
        answer.wait()
        assert answer.error is None, answer.error
    assert (opened.running, opened.waiting) == (0, 0)
    return answers


def main(packed: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        written = write_engine(Path(folder) / "engine", random_hf(), NETWORK, 1, **BUILD)
        plain = engines.open_engine(written)
        assert isinstance(plain, engines.Engine)
        expected = answered(plain)
        plain.close()
        without_gpu(packed == "packed")

        def on_gpu(path: Path, config: Any, ranks: Any) -> Any:
            return PlainCalls(
                config, engines.load_weights(path, config, ranks.device, torch.float32, together=True), ranks
            )

        engines.open_model = on_gpu
        opened = engines.open_engine(written)
        assert isinstance(opened, engines.Engine) and isinstance(opened._model, PlainCalls)
        for found, wanted in zip(answered(opened), expected, strict=True):
            assert found.tokens == wanted.tokens
            torch.testing.assert_close(
                torch.tensor(found.log_probs), torch.tensor(wanted.log_probs), rtol=1e-4, atol=1e-4
            )
            for kind in ("context_logits", "generation_logits"):
                if getattr(wanted.request, kind):
                    torch.testing.assert_close(found.logits(kind), wanted.logits(kind), rtol=1e-4, atol=1e-3)
        assert sorted(opened._free_blocks) == list(range(1, opened._model.n_blocks + 1))
        assert bool(opened._model.prompt_graphs) is (packed == "packed")
        opened.close()
    print("the same answers")


if __name__ == "__main__":
    main(sys.argv[1])
