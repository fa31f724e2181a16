"""The GPU's Llama without a GPU: its kernels in Triton's interpreter, its graphs as plain calls.
Run by test_gpu_kernels.py.

check_gpu_llama.py RANKS    (under mpirun where there are more than one)

This cannot show what needs a GPU (captures, the order of memory). It shows that each request gets the tokens and logits
of the plain network, also when ranks read and write each other's memory: here a file that all of them map,
each at another address.
"""

from __future__ import annotations

import mmap
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are defined
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "model_repo_template" / "tensorrt_llm" / "1"))

import drive_engine  # noqa: E402
import engine as engines  # noqa: E402
import gpu_llama  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from drive_engine import Answer  # noqa: E402
from llama import load_weights  # noqa: E402
from ranks import Alone, MpiRanks  # noqa: E402
from split_checkpoint import write_engine  # noqa: E402
from torch import Tensor  # noqa: E402

NETWORK: dict[str, Any] = {
    "dtype": "float32", "vocab_size": 101, "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 1,
    "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 10, "rms_norm_eps": 1e-5, "rope_theta": 5000.0,
    "max_position_embeddings": 200,
}  # fmt: skip
if "biased" in sys.argv:
    YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 50}
    NETWORK.update(attention_bias=True, mlp_bias=True, rope_scaling=YARN)
BUILD = {"max_batch_size": 3, "max_input_len": 90, "max_output_len": 20, "max_num_tokens": 80}


class PlainCalls(gpu_llama.GpuLlama):
    """Graphs that run what they would have captured."""

    def _captured(self, run: Callable[[int], None], size: int) -> Any:
        run(size)
        return SimpleNamespace(replay=lambda: run(size))


class SharedFile(MpiRanks):
    """Ranks on a CPU that can do what ranks on GPUs can."""

    def broadcast(self, tensor: Tensor) -> None:
        self._world.Bcast(tensor.numpy(), root=0)

    def least(self, number: int) -> int:
        return int(self._world.allreduce(number, op=self._mpi.MIN))

    def shared_memory(self, n_bytes: int) -> tuple[Tensor, list[int]]:
        each = -(-n_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        path = Path(self.share(tempfile.mktemp(dir="/dev/shm") if self.rank == 0 else ""))
        if self.rank == 0:
            path.write_bytes(bytes(each * self.size))
        self._world.Barrier()
        with path.open("r+b") as file:
            self._all = torch.frombuffer(mmap.mmap(file.fileno(), each * self.size), dtype=torch.uint8)
        self._world.Barrier()
        if self.rank == 0:
            path.unlink()
        base = self._all.data_ptr()
        begin = self.rank * each
        return self._all[begin : begin + n_bytes], [base + rank * each for rank in range(self.size)]


def without_gpu() -> None:
    nothing = lambda *_: None  # noqa: E731
    event = lambda **_: SimpleNamespace(record=nothing, synchronize=nothing)  # noqa: E731
    replaced: dict[str, Any] = {
        "set_device": nothing,
        "synchronize": nothing,
        "Event": event,
        "Stream": nothing,
        "get_device_name": lambda *_: "none",
        "get_device_capability": lambda *_: (8, 0),
        "mem_get_info": lambda *_: (1 << 30, 2 << 30),
    }
    for name, value in replaced.items():
        setattr(torch.cuda, name, value)
    torch.Tensor.pin_memory = lambda self: self  # type: ignore[method-assign, assignment, misc]
    # up to 2 rows are pushed, more are read from the others; both happen
    gpu_llama.SPARE_BYTES, gpu_llama.PUSH_ROWS = 0, 2
    vars(gpu_llama)["PROMPT_SIZES"] = (16, 64)
    gpu_llama.BESIDE_STREAMS, gpu_llama.MANY_WAITING, gpu_llama.PROMPTS = 40, 60, 4
    gpu_llama.GpuLlama.most_prompts = 4


def give_way() -> None:
    """Ranks that wait for each other spin; where there are more of them than cores, each must let the others run."""
    from triton.runtime import interpreter

    builder: Any = interpreter.interpreter_builder

    def patient(plain: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            os.sched_yield()
            return plain(*given, **named)

        return call

    for name in ("create_atomic_rmw", "create_masked_load"):
        setattr(builder, name, patient(getattr(builder, name)))


def random_hf() -> dict[str, np.ndarray[Any, Any]]:
    chance = np.random.default_rng(3)
    head, hidden, inner, vocab = (
        NETWORK["head_dim"],
        NETWORK["hidden_size"],
        NETWORK["intermediate_size"],
        NETWORK["vocab_size"],
    )
    rows = {"q": 8 * head, "k": 2 * head, "v": 2 * head}
    shapes: dict[str, tuple[int, ...]] = {
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
        if NETWORK.get("mlp_bias"):
            layers = [key for key in shapes if key.startswith(name) and "_proj" in key]
            shapes.update({key.replace(".weight", ".bias"): shapes[key][:1] for key in layers})
    return {
        name: (chance.normal(0, 0.25, shape) if len(shape) > 1 else chance.uniform(0.5, 1.5, shape)).astype(np.float32)
        for name, shape in shapes.items()
    }


class Multiples:
    """A guide whose every mask depends on all tokens before it: their sum grows by multiples of a number."""

    ready = True

    def __init__(self, step: int) -> None:
        self.step, self.guides, self.tokens = step, self, list[int]()

    def when_ready(self, call: Callable[[], None]) -> None:
        call()

    @staticmethod
    def ahead(answers: Sequence[tuple[Any, Sequence[int]]]) -> None:
        for guide, tokens in answers:
            guide.tokens = list(tokens)

    @staticmethod
    def allowed(guides: Sequence[Any]) -> np.ndarray[Any, Any]:
        bits = np.zeros((len(guides), 128), dtype=np.uint8)
        for row, guide in zip(bits, guides, strict=True):
            row[(len(guide.tokens) + sum(guide.tokens)) % guide.step : NETWORK["vocab_size"] : guide.step] = 1
        return np.packbits(bits, axis=1, bitorder="little").view(np.uint32)


def requests(few: bool) -> list[dict[str, Any]]:
    """Long and short prompts, greedy and drawn, with and without what needs history; more than there are slots. few:
    where many ranks share few cores."""
    chance = np.random.default_rng(5)

    def prompt(length: int) -> list[int]:
        return [int(token) for token in chance.integers(3, NETWORK["vocab_size"], length)]

    if few:
        return [{"prompt": prompt(5), "max_new_tokens": 3}, {"prompt": prompt(70), "max_new_tokens": 2}]
    return [
        {"prompt": prompt(5), "max_new_tokens": 6},
        {"prompt": prompt(62), "max_new_tokens": 4, "top_k": 20, "random_seed": 3, "temperature": 2.0},
        {"prompt": prompt(1), "max_new_tokens": 3, "log_probs": True},
        {"prompt": prompt(9), "max_new_tokens": 3, "context_logits": True, "generation_logits": True},
        {"prompt": prompt(90), "max_new_tokens": 3},
        {"prompt": prompt(7), "max_new_tokens": 4, "top_p": 0.9, "repetition_penalty": 1.3},
        {"prompt": prompt(3), "max_new_tokens": 1},
        {"prompt": prompt(4), "max_new_tokens": 6, "guide": Multiples(3)},
        {"prompt": prompt(6), "max_new_tokens": 5, "guide": Multiples(7), "min_p": 0.01, "top_k": 9, "random_seed": 4},
        {"prompt": prompt(8), "max_new_tokens": 5, "bad_words": tuple((token,) for token in range(0, 101, 2))},
        {"prompt": prompt(2), "max_new_tokens": 4, "embedding_bias": torch.linspace(-9, 9, NETWORK["vocab_size"])},
    ]


def answered(opened: engines.Engine) -> list[Answer]:
    answers = [Answer(opened, **request) for request in requests(opened.config.tp_size > 2)]
    for answer in answers:
        answer.wait()
        assert answer.error is None, answer.error
    assert (opened.running, opened.waiting) == (0, 0)
    return answers


def main(n_ranks: int) -> None:
    ranks = SharedFile() if n_ranks > 1 else Alone()
    drive_engine.ANSWER_SECONDS = 280
    if n_ranks > 1:
        give_way()
    vars(engines)["this_rank"] = lambda: ranks
    name = ranks.share(tempfile.mkdtemp() if ranks.rank == 0 else "")
    folder = Path(name) / "engine"
    if ranks.rank == 0:
        write_engine(folder, random_hf(), NETWORK, n_ranks, **BUILD)
    ranks.share("written")
    plain = engines.open_engine(folder)
    expected = None
    ended, ranks.close = ranks.close, lambda: None  # type: ignore[method-assign]
    if isinstance(plain, engines.Engine):
        expected = answered(plain)
        plain.close()
    else:
        plain.follow()
    without_gpu()

    def on_gpu(path: Path, config: Any, ranks: Any, reuse: bool) -> Any:
        return PlainCalls(config, load_weights(path, config, ranks.device, torch.float32, together=True), ranks)

    engines.open_model = on_gpu
    for reuse in (False, True) if n_ranks < 4 else (True,):
        opened = engines.open_engine(folder, reuse)
        if not isinstance(opened, engines.Engine):
            opened.follow()
            continue
        assert expected is not None and isinstance(opened._model, PlainCalls)
        for _ in range(1 + reuse):  # the second time, long prompts find their beginnings
            for found, wanted in zip(answered(opened), expected, strict=True):
                assert found.tokens == wanted.tokens, (reuse, found.tokens, wanted.tokens)
                torch.testing.assert_close(
                    torch.tensor(found.log_probs), torch.tensor(wanted.log_probs), rtol=1e-4, atol=1e-4
                )
                for kind in ("context_logits", "generation_logits"):
                    if getattr(wanted.request, kind):
                        torch.testing.assert_close(found.logits(kind), wanted.logits(kind), rtol=1e-4, atol=1e-3)
        assert opened.blocks.available == opened._model.n_blocks
        assert opened.blocks.reused_tokens == (64 if reuse else 0)
        opened.close()
    shutil.rmtree(name, ignore_errors=True)
    ended()
    if ranks.rank == 0:
        print("the same answers")


if __name__ == "__main__":
    main(int(sys.argv[1]))
