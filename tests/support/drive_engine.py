"""Runs one rank of the torch engine without Triton: rank 0 answers requests from a JSON file, the others follow.

mpirun -n 2 python drive_engine.py ENGINE_DIR REQUESTS.json ANSWERS.pt
"""

from __future__ import annotations

import json
import os
import queue
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

VERSION_DIR = Path(__file__).resolve().parents[2] / "model_repo_template" / "tensorrt_llm" / "1"
sys.path.insert(0, str(VERSION_DIR))

from engine import Engine, Piece, Request, open_engine  # noqa: E402
from sampling import Sampling  # noqa: E402

ANSWER_SECONDS = 60
MPIRUN = Path(sys.executable).with_name("mpirun")
MPI_ENVIRONMENT = {**os.environ, "OMPI_MCA_mpi_yield_when_idle": "1"}


def mpirun(ranks: int, *command: object) -> list[str]:
    """A command on so many ranks of this machine, whatever its cores."""
    start = [MPIRUN, "--allow-run-as-root", "--bind-to", "none", "--map-by", ":OVERSUBSCRIBE", "-n", ranks]
    return [str(word) for word in (*start, *command)]


class Answer:
    """Collects what the engine says about one request.

    `on_piece[n]` is called with the n-th piece from inside the engine's step, so that a test knows which step it is.
    """

    def __init__(
        self,
        engine: Engine,
        prompt: list[int],
        max_new_tokens: int,
        on_piece: Mapping[int, Callable[[], object]] = MappingProxyType({}),
        **options: Any,
    ) -> None:
        names = ("log_probs", "prompt_log_probs", "context_logits", "generation_logits", "likeliest")
        flags = {name: options.pop(name) for name in names if name in options}
        self.pieces: list[Piece] = []
        self._queue: queue.SimpleQueue[Piece] = queue.SimpleQueue()
        self.request = Request(tuple(prompt), max_new_tokens, self._receive, Sampling(**options), **flags)
        self._engine, self._on_piece, self._received = engine, on_piece, 0
        engine.submit(self.request)

    def _receive(self, piece: Piece) -> None:
        self._queue.put(piece)
        self._received += 1
        self._on_piece.get(self._received, int)()

    def next_piece(self) -> Piece:
        """Waits for the next piece."""
        self.pieces.append(self._queue.get(timeout=ANSWER_SECONDS))
        return self.pieces[-1]

    def wait(self) -> Answer:
        """Waits for the last piece."""
        while not self.pieces or not self.pieces[-1].final:
            self.next_piece()
        return self

    def cancel(self) -> None:
        self._engine.cancel(self.request)

    @property
    def error(self) -> str | None:
        return self.pieces[-1].error

    @property
    def tokens(self) -> list[int]:
        return [token for piece in self.pieces for token in piece.tokens]

    @property
    def log_probs(self) -> list[float]:
        return [value for piece in self.pieces for value in piece.log_probs]

    def logits(self, kind: str) -> torch.Tensor:
        """`context_logits` or `generation_logits`, all pieces together."""
        return torch.cat([part for piece in self.pieces if (part := getattr(piece, kind)) is not None])


def main(engine_dir: str, requests: str, answers: str) -> None:
    engine = open_engine(Path(engine_dir))
    if not isinstance(engine, Engine):
        engine.follow()
        return
    asked = [Answer(engine, **request) for request in json.loads(Path(requests).read_text())]
    answered = []
    for answer in asked:
        answer.wait()
        logits = answer.logits("context_logits") if answer.request.context_logits else None
        answered.append({"tokens": answer.tokens, "error": answer.error, "context_logits": logits})
    torch.save(answered, answers)
    engine.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
