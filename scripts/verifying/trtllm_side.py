"""Asks TensorRT engines, in the room verified, through TensorRT-LLM's own Python runtime; one process per rank,
all doing the same.

mpirun -n 2 python -m scripts.verifying.trtllm_side ENGINES REFERENCES.json ANSWERS.json

The engines are the ones that will be served. They give only the logits of a step's last tokens. Logits of every prompt
token would need engines built with gather_context_logits: then the last layer runs over every token of a step, with a
buffer of 8192 * 32 000 * 4 bytes = 1.05 GB on the GPU (4.2 GB with 128 256 ids), in each step of the server for ever. A
second set of engines would prove nothing about the first. So each prompt is asked twice. The runtime calls a logits
processor at every step, which sees all that is compared:
1. the prompt, answered greedily: the answer's tokens, and the logits from the prompt's last token on
2. its first token, then its own tokens by force: the logits of the positions before

docker/contracts/runtime lists what is used of the runtime,
because generate() silently ignores a name that it does not know.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts import reports
from scripts.verifying.sides import groups, log_probs_at

# Instead of minus infinity, which in half precision would break a softmax
REFUSED = -1e4


class Watcher:
    """The logits processor: keeps the log probabilities of `wanted` ids, and with `forced` decides the next token.

    wanted: (requests, steps, k) token ids; forced: (requests, steps) or None, then the runtime chooses.
    """

    def __init__(self, wanted: Sequence[Sequence[Sequence[int]]], vocab_size: int, forced: Any | None = None) -> None:
        self.wanted, self.vocab_size, self.forced = wanted, vocab_size, forced
        self.rows: list[list[list[float]]] = [[] for _ in wanted]  # (requests, steps so far, k)

    def __call__(self, step: int, input_ids: Any, scores: Any) -> Any:
        """scores: (requests, padded vocabulary), the engine's own output buffer.

        It is changed in place and returned: the engine will write the next step's logits there, and the runtime reads
        them from the returned value (handle_per_step of tensorrt_llm/runtime/generation.py at v0.14.0).
        """
        logits = scores.view(len(self.wanted), -1)
        ids = logits.new_tensor([steps[step] for steps in self.wanted], dtype=int)  # (requests, k)
        for row, values in zip(self.rows, log_probs_at(logits[:, : self.vocab_size], ids).tolist()):
            row.append(values)
        if self.forced is not None:
            chosen = logits.new_tensor([tokens[step] for tokens in self.forced], dtype=int)
            logits.fill_(REFUSED).scatter_(1, chosen[:, None], 0.0)
        return scores


def watchers(references: Sequence[Mapping[str, Any]], vocab_size: int) -> dict[str, Watcher]:
    """Watchers for prompts of one length: one for the `greedy` answer,
    one that forces the `prompt` (see compare.Reference).

    At each position of the prompt its own next token is the last of the wanted ids.
    """
    before = len(references[0]["prompt"]) - 1
    greedy = [reference["top_ids"][before:] for reference in references]
    own = [reference["prompt"][1:] for reference in references]
    prompt = [[[*ids, t] for ids, t in zip(r["top_ids"], tokens)] for r, tokens in zip(references, own)]
    return {"greedy": Watcher(greedy, vocab_size), "prompt": Watcher(prompt, vocab_size, own)}


def unlikely_id(references: Sequence[Mapping[str, Any]], vocab_size: int) -> int:
    """An end id that no answer has: the runtime requires one, but no answer may end early.

    It is not among the likeliest ids at any position: an engine that chooses it has left the reference there anyway.
    """
    spoken = {token for reference in references for token in (*reference["prompt"], *reference["tokens"])}
    rivals = {token for reference in references for ids in reference["top_ids"] for token in ids}
    return min(range(vocab_size), key=lambda token: (token in spoken, token in rivals, token))


def load_arguments(engines: Path, rank: int) -> dict[str, Any]:
    """The arguments of ModelRunner.from_dir."""
    return {"engine_dir": str(engines), "rank": rank}


def generate_arguments(prompts: list[Any], new_tokens: int, end_id: int, watcher: Watcher) -> dict[str, Any]:
    """The arguments of ModelRunner.generate; greedy (top_k 1) is every version's default. prompts: int32 tensors."""
    return {
        "batch_input_ids": prompts,
        "max_new_tokens": new_tokens,
        "end_id": end_id,
        "pad_id": end_id,  # packed input has no padding
        "logits_processor": watcher,
        "return_dict": True,
    }


def answers_of(
    references: Sequence[Mapping[str, Any]], tokens: Sequence[Sequence[int]], rows: Mapping[str, Sequence[Any]]
) -> list[dict[str, Any]]:
    """Each answer in the form of compare.Answer. tokens: the greedy answers; rows: what both watchers kept."""
    return [
        {
            "tokens": list(tokens[i][: len(rows["greedy"][i])]),
            "log_probs": [values[:-1] for values in rows["prompt"][i]] + rows["greedy"][i],
            "prompt_log_probs": [values[-1] for values in rows["prompt"][i]],
        }
        for i in range(len(references))
    ]


def ask_group(
    runner: Any, references: Sequence[Mapping[str, Any]], vocab_size: int, gather: Any
) -> list[dict[str, Any]] | None:
    """Ask prompts of one length; the answers on rank 0, None on the others.

    Tokens come out on the first stage, logits are seen on the last: gather(value) brings all ranks' values to rank 0.
    """
    import torch

    length = len(references[0]["prompt"])
    watching, end_id = watchers(references, vocab_size), unlikely_id(references, vocab_size)
    prompts = [torch.tensor(reference["prompt"], dtype=torch.int32) for reference in references]
    new_tokens = len(references[0]["tokens"])
    with torch.no_grad():
        said = runner.generate(**generate_arguments(prompts, new_tokens, end_id, watching["greedy"]))
        if length > 1:
            first = [prompt[:1] for prompt in prompts]
            runner.generate(**generate_arguments(first, length - 1, end_id, watching["prompt"]))
    seen = gather({name: watcher.rows for name, watcher in watching.items()})
    if seen is None:
        return None
    # the last rank always belongs to the last stage
    return answers_of(references, said["output_ids"][:, 0, length:].tolist(), seen[-1])


def ask_tensorrt_engine(folder: Path, questions: Path, target: Path) -> None:
    """Answer the references' prompts with this rank; rank 0 writes."""
    import mpi4py

    # At the end of a process MPI_Finalize waits for every rank,
    # so a rank that fails would hang instead of ending the others.
    mpi4py.rc.finalize = False
    from mpi4py import MPI
    from tensorrt_llm.runtime import ModelRunner

    world = MPI.COMM_WORLD
    config = json.loads((folder / "config.json").read_bytes())
    references = json.loads(questions.read_bytes())["references"]
    prompts = [reference["prompt"] for reference in references]
    build, vocab_size = config["build_config"], config["pretrained_config"]["vocab_size"]
    runner = ModelRunner.from_dir(**load_arguments(folder, world.Get_rank()))
    answers: dict[int, dict[str, Any]] = {}
    together = max(1, min(build["max_batch_size"], build["max_num_tokens"] // max(map(len, prompts))))
    for members in groups(prompts, together):
        found = ask_group(runner, [references[i] for i in members], vocab_size, world.gather)
        if found is not None:
            answers.update(zip(members, found))
            print(f"asked {len(members)}", flush=True)
    if world.Get_rank() == 0:
        target.write_text(json.dumps({"answers": [answers[i] for i in range(len(answers))]}))
    MPI.Finalize()


def main() -> None:
    ask_tensorrt_engine(*map(Path, sys.argv[1:]))


if __name__ == "__main__":
    reports.run(main)
