"""Stand-in for tensorrt_llm.runtime in a rehearsal: ModelRunner takes what the version's runtime table has,
and asks the torch engine.

As upstream's, every rank calls it with the same arguments, one step after the other, and the logits processor is handed
the buffer in which the next step's logits will be written.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from mpi4py import MPI

PROJECT = Path(__file__).resolve().parents[4]
sys.path += [str(PROJECT), str(PROJECT / "model_repo_template/tensorrt_llm/1")]

from engine_config import read_config  # noqa: E402
from llama import Chunk, Llama, load_weights  # noqa: E402
from ranks import this_rank, use_own_cores  # noqa: E402

from scripts.nvidia import contracts  # noqa: E402

TABLE = contracts.table("runtime", os.environ["REHEARSAL_TRTLLM"])


def check(call: str, given: dict[str, Any]) -> None:
    """TypeError for a name that the version does not have (upstream's generate ignores such names, silently)."""
    part = TABLE[call]
    unknown = sorted(set(given) - {*part["parameters"], *part.get("sampling", [])})
    missing = sorted(set(part["required"]) - set(given))
    if unknown or missing:
        raise TypeError(f"ModelRunner.{call} of this version: unknown {unknown}, missing {missing}")


class ModelRunner:
    """Holds one rank of the torch engine, over the files that the stand-in for trtllm-build wrote."""

    def __init__(self, engine_dir: Path) -> None:
        self.config = read_config(engine_dir)
        use_own_cores()
        ranks = this_rank()
        path = engine_dir / f"rank{ranks.rank}.engine"
        with tempfile.TemporaryDirectory() as folder:
            weights = Path(folder) / "weights.safetensors"
            weights.symlink_to(path)
            tensors = load_weights(weights, self.config, ranks.device, torch.float32)
        self.model = Llama(self.config, tensors, ranks)

    @classmethod
    def from_dir(cls, **given: Any) -> ModelRunner:
        check("from_dir", given)
        assert given.get("rank", 0) == MPI.COMM_WORLD.Get_rank()
        print("rehearsal: the torch engine stands in for TensorRT-LLM", flush=True)
        return cls(Path(given["engine_dir"]).resolve())

    def generate(self, **given: Any) -> Any:
        """Greedy; (requests, 1, prompt and answer) ids, in a dictionary when asked for one."""
        check("generate", given)
        prompts = [prompt.tolist() for prompt in given["batch_input_ids"]]
        new_tokens, end_id, watch = given["max_new_tokens"], given["end_id"], given.get("logits_processor")
        self._check_inputs(prompts, new_tokens)
        texts, ended = [list(prompt) for prompt in prompts], [False] * len(prompts)
        buffer = torch.empty(len(prompts), self.config.padded_vocab_size)
        for step in range(new_tokens):
            seen = [len(text) - 1 if step else 0 for text in texts]
            chunks = [Chunk(slot, at, tuple(text[at:]), 1) for slot, (text, at) in enumerate(zip(texts, seen))]
            logits = MPI.COMM_WORLD.bcast(self.model.step(chunks))
            buffer.zero_()[:, : self.config.vocab_size] = logits
            if watch is not None and watch(step, torch.tensor(texts), buffer) is not buffer:
                raise RuntimeError("the next step's logits go into the tensor that the logits processor was given")
            for row, (text, token) in enumerate(zip(texts, buffer[:, : self.config.vocab_size].argmax(-1).tolist())):
                text.append(end_id if ended[row] else token)
                ended[row] |= token == end_id
            if all(ended):
                break
        longest = max(map(len, prompts)) + new_tokens
        output_ids = torch.tensor([[text + [end_id] * (longest - len(text))] for text in texts], dtype=torch.int32)
        return {"output_ids": output_ids} if given.get("return_dict") else output_ids

    def _check_inputs(self, prompts: list[list[int]], new_tokens: int) -> None:
        """The limits that upstream checks."""
        longest, limits = max(map(len, prompts)), self.config
        if len(prompts) > limits.max_batch_size:
            raise RuntimeError(
                f"Input batch size ({len(prompts)}) exceeds the engine's limit ({limits.max_batch_size})"
            )
        if longest > limits.max_input_len:
            raise RuntimeError(f"Maximum input length ({longest}) exceeds the engine's limit ({limits.max_input_len})")
        if longest + new_tokens > limits.max_seq_len:
            raise RuntimeError(f"{longest} and {new_tokens} tokens exceed the engine's limit ({limits.max_seq_len})")
