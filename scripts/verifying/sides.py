"""The two sides of the room verified: Hugging Face's model, and the torch engine's ranks under mpirun;
one process each.

python -m scripts.verifying.sides hf HF QUESTIONS.json REFERENCES.json
mpirun -n 2 python -m scripts.verifying.sides torch ENGINES REFERENCES.json ANSWERS.json

TensorRT engines are asked by scripts/verifying/trtllm_side.py.

Each prints a line `asked N` after N prompts. Logits are reduced at once to the few numbers that are compared, so memory
holds the logits of a few prompts only.
"""

from __future__ import annotations

import importlib
import json
import queue
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from scripts import reports

ENGINE_CODE = Path(__file__).parents[2] / "model_repo_template" / "tensorrt_llm" / "1"
# Prompts in progress at the same time: logits of 16 prompts of 32 tokens and 128 000 ids are 262 MB.
AT_ONCE = 16
# The longest wait for the next piece of any answer; the first step of a large model on a CPU is slow.
PIECE_SECONDS = 600


def groups(prompts: Sequence[Sequence[int]], at_once: int = AT_ONCE) -> Iterator[list[int]]:
    """The prompts' numbers, in groups of equal length and at most AT_ONCE, so that a group needs no padding."""
    size = min(at_once, AT_ONCE)
    by_length = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    for _, same in groupby(by_length, key=lambda i: len(prompts[i])):
        members = list(same)
        for begin in range(0, len(members), size):
            yield members[begin : begin + size]


def log_probs_at(logits: Any, ids: Any) -> Any:
    """Natural log probabilities (..., k) of the token ids (..., k) under logits (..., vocab_size), in float32."""
    logits = logits.float()
    return logits.gather(-1, ids) - logits.logsumexp(-1, keepdim=True)


# --- Hugging Face's model ---


def dtype_keyword(transformers_version: str) -> str:
    """from_pretrained's word for the dtype: renamed in 4.56 (huggingface/transformers#39782);
    NVIDIA's images have older ones."""
    release = tuple(int(number) for number in transformers_version.split(".")[:2])
    return "dtype" if release >= (4, 56) else "torch_dtype"


def load_model(folder: Path) -> tuple[Any, str]:
    """(transformers' model, "cuda" or "cpu").

    With GPUs: in the stored dtype; accelerate spreads it over all GPUs, and over the host's memory if they are too
    small. Without: in float32, because half precision is slow and coarse on a CPU.
    """
    import torch
    import transformers
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = dtype_keyword(transformers.__version__)
    how: dict[str, Any] = {name: "auto", "device_map": "auto"} if device == "cuda" else {name: torch.float32}
    model: Any = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, **how)
    return model.eval(), device


def continue_group(
    model: Any, prompts: Sequence[Sequence[int]], answer_tokens: int, top_k: int
) -> list[dict[str, Any]]:
    """Greedy answers to prompts of one length, each in the form of compare.Reference. No token ends an answer early."""
    import torch

    length = len(prompts[0])
    tokens = torch.tensor(prompts, device=model.device)  # (prompts, length), grows by one token per step
    fresh, past, best_ids, best = tokens, None, [], []
    own: Any = torch.empty(len(prompts), 0)
    with torch.inference_mode():
        for step in range(answer_tokens):
            out = model(fresh, past_key_values=past, use_cache=True)
            past = out.past_key_values
            logits = out.logits.to(tokens.device)  # (prompts, tokens of the step, vocab_size)
            if step == 0:
                own = log_probs_at(logits[:, :-1], tokens[:, 1:, None])[:, :, 0]
            ids = logits.float().topk(min(top_k, logits.shape[-1]), dim=-1).indices
            best_ids.append(ids)
            best.append(log_probs_at(logits, ids))
            fresh = ids[:, -1:, 0]
            tokens = torch.cat((tokens, fresh), dim=1)
    all_ids, all_best = torch.cat(best_ids, dim=1).tolist(), torch.cat(best, dim=1).tolist()
    return [
        {
            "prompt": list(prompt),
            "tokens": row[length:],
            "top_ids": all_ids[i],
            "log_probs": all_best[i],
            "prompt_log_probs": own[i].tolist(),
        }
        for i, (prompt, row) in enumerate(zip(prompts, tokens.tolist()))
    ]


def ask_hf(folder: Path, questions: Path, target: Path) -> None:
    """Answer questions.json ({prompts, answer_tokens, top_k}) with Hugging Face's model."""
    asked = json.loads(questions.read_bytes())
    model, device = load_model(folder)
    references: dict[int, dict[str, Any]] = {}
    for members in groups(asked["prompts"]):
        prompts = [asked["prompts"][i] for i in members]
        references.update(zip(members, continue_group(model, prompts, asked["answer_tokens"], asked["top_k"])))
        print(f"asked {len(members)}", flush=True)
    ordered = [references[i] for i in range(len(references))]
    target.write_text(json.dumps({"device": device, "references": ordered}))


# --- the torch engine ---


class Collector:
    """One answer of the engine while it comes: each row of logits is reduced to the reference's ids at once."""

    def __init__(self, reference: dict[str, Any]) -> None:
        self.reference = reference
        self.tokens: list[int] = []
        self.log_probs: list[list[float]] = []
        self.prompt_log_probs: list[float] = []

    def take(self, piece: Any) -> None:
        """A Piece of engine.py. Its context logits are those of the prompt's positions;
        the last of them predicts the answer."""
        if piece.error is not None:
            raise RuntimeError(piece.error)
        if piece.context_logits is not None:
            following = self.reference["prompt"][len(self.log_probs) + 1 :]
            for row, token in zip(piece.context_logits, following):
                self._row(row)
                self.prompt_log_probs += log_probs_at(row, row.new_tensor([token], dtype=int)).tolist()
        for row in piece.generation_logits if piece.generation_logits is not None else ():
            self._row(row)
        self.tokens += piece.tokens

    def _row(self, row: Any) -> None:
        ids = self.reference["top_ids"][len(self.log_probs)]
        self.log_probs.append(log_probs_at(row, row.new_tensor(ids, dtype=int)).tolist())

    def answer(self) -> dict[str, Any]:
        """The answer in the form of compare.Answer."""
        return {"tokens": self.tokens, "log_probs": self.log_probs, "prompt_log_probs": self.prompt_log_probs}


def ask_torch_engine(folder: Path, questions: Path, target: Path) -> None:
    """Answer the prompts of the references with this rank of the torch engine; only rank 0 writes,
    the others follow."""
    sys.path.insert(0, str(ENGINE_CODE))
    engine_code = importlib.import_module("engine")
    references = json.loads(questions.read_bytes())["references"]
    engine = engine_code.open_engine(folder)
    if not isinstance(engine, engine_code.Engine):
        engine.follow()
        return
    pieces: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
    collectors = [Collector(reference) for reference in references]

    waiting = iter(range(len(references)))

    def submit(how_many: int) -> None:
        for number in islice(waiting, how_many):
            prompt, tokens = references[number]["prompt"], references[number]["tokens"]
            receive = partial(lambda number, piece: pieces.put((number, piece)), number)
            flags = {"context_logits": True, "generation_logits": True}
            engine.submit(engine_code.Request(tuple(prompt), len(tokens), receive, **flags))

    submit(AT_ONCE)
    unfinished = len(references)
    while unfinished:
        number, piece = pieces.get(timeout=PIECE_SECONDS)
        collectors[number].take(piece)
        if piece.final:
            unfinished -= 1
            print("asked 1", flush=True)
            submit(1)
    target.write_text(json.dumps({"answers": [collector.answer() for collector in collectors]}))
    engine.close()


def main() -> None:
    ask = {"hf": ask_hf, "torch": ask_torch_engine}[sys.argv[1]]
    ask(*map(Path, sys.argv[2:]))


if __name__ == "__main__":
    reports.run(main)
