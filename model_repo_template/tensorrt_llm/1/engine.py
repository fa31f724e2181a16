"""In-flight batching: requests join and leave while others run, and each forward step serves all that are running.

Knows nothing of Triton. `open_engine` loads one rank; on rank 0 it gives an Engine to submit requests to, on the others
a Follower's loop:

    engine = open_engine(Path("engines"))
    if isinstance(engine, Engine):
        engine.submit(Request(prompt=(1, 2, 3), max_new_tokens=5, receive=print))
    else:
        engine.follow()
"""

from __future__ import annotations

import heapq
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from engine_config import EngineConfig, read_config
from llama import Chunk, Llama, load_weights
from ranks import FollowerLink, LeaderLink, Ranks, meet, this_rank, use_own_cores, world_size
from sampling import Sampling, adjusted, choose, ends_with, log_prob, refusal
from torch import Tensor

log = logging.getLogger("torch engine")

CLOSE_SECONDS = 10.0  # how long a last step may take; Triton has drained the requests before


class Refused(ValueError):
    """A request that this engine cannot serve, in words for the one who sent it."""


@dataclass(frozen=True)
class Piece:
    """What one step gave a request. The last piece is final; after an error nothing else comes."""

    tokens: tuple[int, ...] = ()
    log_probs: tuple[float, ...] = ()  # one per token, when asked for
    context_logits: Tensor | None = None  # (prompt tokens of this step, vocab_size), when asked for
    generation_logits: Tensor | None = None  # (tokens, vocab_size), when asked for
    final: bool = False
    error: str | None = None


@dataclass(frozen=True, eq=False)
class Request:
    """A prompt and what is wanted of it. `receive` is called from the engine's thread and must not block."""

    prompt: tuple[int, ...]
    max_new_tokens: int
    receive: Callable[[Piece], None]
    sampling: Sampling = field(default_factory=Sampling)
    log_probs: bool = False
    context_logits: bool = False
    generation_logits: bool = False


class Running:
    """A request in the batch: its slot, its tokens so far, and how many of them are in the cache."""

    def __init__(self, request: Request, slot: int) -> None:
        self.request, self.slot = request, slot
        self.tokens = list(request.prompt)
        self.cached = 0
        # A generator of its own: what a request draws does not depend on who else is in the batch.
        self.generator = torch.Generator().manual_seed(request.sampling.random_seed)

    @property
    def generating(self) -> bool:
        return self.cached >= len(self.request.prompt)

    def next_chunk(self, room: int) -> Chunk:
        """At most `room` tokens that are not in the cache yet."""
        token_ids = tuple(self.tokens[self.cached : self.cached + room])
        at_end = self.cached + len(token_ids) == len(self.tokens)
        n_logits = len(token_ids) if self.request.context_logits and not self.generating else int(at_end)
        return Chunk(self.slot, self.cached, token_ids, n_logits)

    def advance(self, chunk: Chunk, logits: Tensor) -> Piece:
        """Counts the chunk as cached and, when its last token is the sequence's last, chooses the next one."""
        request, sampling = self.request, self.request.sampling
        context = logits if request.context_logits and not self.generating else None
        self.cached += len(chunk.token_ids)
        if self.cached < len(self.tokens):
            return Piece(context_logits=context)
        n_prompt, last = len(request.prompt), logits[-1]
        token = choose(adjusted(last, sampling, self.tokens, n_prompt), sampling, self.generator)
        if token == sampling.end_id:  # not part of the output
            return Piece(context_logits=context, final=True)
        self.tokens.append(token)
        full = len(self.tokens) - n_prompt == request.max_new_tokens
        return Piece(
            tokens=(token,),
            log_probs=(log_prob(last, token),) if request.log_probs else (),
            context_logits=context,
            generation_logits=logits[-1:] if request.generation_logits else None,
            final=full or ends_with(self.tokens, sampling.stop_words),
        )


class Engine:
    """Rank 0: owns the queue and the batch, and a thread that steps while there is work and sleeps while there is none.

    All methods may be called from any thread. The lock is never held during a step, so that a step which hangs (a dead
    peer) cannot keep `fail` from answering.
    """

    def __init__(self, config: EngineConfig, model: Llama, link: LeaderLink, ranks: Ranks) -> None:
        self.config = config
        self.steps = 0
        self._model, self._link, self._ranks = model, link, ranks
        self._waiting: list[Request] = []
        self._running: list[Running] = []
        self._free_slots = list(range(config.max_batch_size))  # a heap: low slots first keeps them adjacent
        self._failure: str | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        link.watch(self._rank_lost)
        self._thread.start()

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def submit(self, request: Request) -> None:
        """Queues a request. Raises Refused when it cannot be served as it is, or when the engine has failed."""
        if (why := self._why_not(request)) is not None:
            raise Refused(why)
        with self._changed:
            if self._failure is not None:
                raise Refused(self._failure)
            self._waiting.append(request)
            self._changed.notify()

    def cancel(self, request: Request) -> None:
        """Ends a request, if it is still there, with what it has: its slot is free for the next step."""
        with self._changed:
            self._end([request], Piece(final=True))

    def fail(self, message: str) -> None:
        """Ends every request with this error, and each later one too. The first failure counts."""
        with self._changed:
            if self._failure is None:
                self._failure = message
                self._end(self._waiting + [one.request for one in self._running], Piece(final=True, error=message))
                self._changed.notify()

    def close(self) -> None:
        """Ends the engine's thread and the other ranks; requests that are still there get an error."""
        if self._failure is not None:
            return  # closed already, or nobody is left to end together with
        self.fail("the engine is shutting down")
        self._thread.join(timeout=CLOSE_SECONDS)
        if not self._thread.is_alive():
            self._link.end()
            self._ranks.close()

    def _why_not(self, request: Request) -> str | None:
        config, prompt, new = self.config, request.prompt, request.max_new_tokens
        if not prompt:
            return "the prompt is empty"
        if len(prompt) > config.max_input_len:
            return f"the prompt has {len(prompt)} tokens; this engine takes at most {config.max_input_len}"
        for token in prompt:
            if not 0 <= token < config.vocab_size:
                return f"the prompt holds the id {token}; the vocabulary has ids 0 to {config.vocab_size - 1}"
        if new <= 0:
            return f"request_output_len is {new}; it must be greater than 0"
        if len(prompt) + new > config.max_seq_len:
            return (
                f"the prompt's {len(prompt)} tokens and request_output_len {new} make {len(prompt) + new};"
                f" this engine takes at most {config.max_seq_len}"
            )
        return refusal(request.sampling, config.vocab_size)

    def _rank_lost(self, rank: int, why: str) -> None:
        log.error("rank %d %s; every request fails from now on", rank, why)  # the supervisor reads this line
        self.fail(f"rank {rank} of the engine {why}")

    def _end(self, requests: Sequence[Request], piece: Piece) -> None:
        """Takes requests out, frees their slots and gives them their last piece. Called with the lock held."""
        for request in requests:
            if request in self._waiting:
                self._waiting.remove(request)
                request.receive(piece)
        for one in [one for one in self._running if one.request in requests]:
            self._running.remove(one)
            heapq.heappush(self._free_slots, one.slot)
            one.request.receive(piece)

    def _next_batch(self) -> list[tuple[Running, Chunk]]:
        """Waits for work and says what the next step does: decode tokens first, then prompts while there is room."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._running or self._failure is not None)
            if self._failure is not None:
                return []
            while self._waiting and self._free_slots:
                self._running.append(Running(self._waiting.pop(0), heapq.heappop(self._free_slots)))
            batch, room = [], self.config.max_num_tokens
            for one in sorted(self._running, key=lambda one: not one.generating):
                if room:
                    chunk = one.next_chunk(room)
                    room -= len(chunk.token_ids)
                    batch.append((one, chunk))
            return batch

    def _run(self) -> None:
        while batch := self._next_batch():
            try:
                self._step(batch)
            except Exception:
                log.exception("a step failed")
                if self._ranks.size > 1:  # the others are somewhere inside that step and will not come back from it
                    self.fail("the engine has failed; the server's log says why")
                    self._link.abandon()
                with self._changed:
                    failed = Piece(final=True, error="a step of the engine failed; the server's log says why")
                    self._end([one.request for one, _ in batch], failed)

    def _step(self, batch: list[tuple[Running, Chunk]]) -> None:
        chunks = [chunk for _, chunk in batch]
        self._link.send(encode(chunks))
        logits = self._model.step(chunks)
        self.steps += 1
        begin = 0
        for one, chunk in batch:
            rows = logits[begin : begin + chunk.n_logits] if logits is not None else torch.empty(0)
            begin += chunk.n_logits
            try:
                piece = one.advance(chunk, rows)
            except ValueError as problem:
                piece = Piece(final=True, error=str(problem))
            with self._changed:
                if one not in self._running:
                    continue  # cancelled or failed while the step ran: it has had its last piece
                if piece.final:
                    self._end([one.request], piece)
                elif piece.tokens or piece.context_logits is not None:
                    one.request.receive(piece)


class Follower:
    """A rank above 0: repeats every step that rank 0 takes, until rank 0 ends."""

    def __init__(self, model: Llama, link: FollowerLink, ranks: Ranks) -> None:
        self._model, self._link, self._ranks = model, link, ranks

    def follow(self) -> None:
        self._link.loaded()
        for plan in self._link.plans():
            self._model.step(decode(plan))
        self._ranks.close()


def open_engine(engine_dir: Path) -> Engine | Follower:
    """Loads this process's rank of the engine and meets the others. Raises ValueError or RankLost when it cannot."""
    config = read_config(engine_dir)
    if config.tp_size != world_size():
        raise ValueError(f"the engine was built for tp_size {config.tp_size}, but {world_size()} rank(s) were started")
    use_own_cores()
    ranks = this_rank()
    link = meet(ranks)
    # A processor computes in float32 whatever is stored: its half precision is slow, and this is the oracle's.
    dtype = torch.float32 if ranks.device.type == "cpu" else getattr(torch, config.dtype)
    weights = load_weights(engine_dir / f"rank{ranks.rank}.safetensors", config, ranks.device, dtype)
    model = Llama(config, weights, ranks)
    if isinstance(link, FollowerLink):
        return Follower(model, link, ranks)
    link.wait_until_loaded()
    return Engine(config, model, link, ranks)


def encode(chunks: Sequence[Chunk]) -> list[int]:
    """A step's plan as plain integers: for each chunk slot, start, n_logits, number of tokens, tokens."""
    return [n for c in chunks for n in (c.slot, c.start, c.n_logits, len(c.token_ids), *c.token_ids)]


def decode(plan: Sequence[int]) -> list[Chunk]:
    """The chunks of a plan that `encode` wrote."""
    chunks, at = [], 0
    while at < len(plan):
        slot, start, n_logits, length = plan[at : at + 4]
        at += 4 + length
        chunks.append(Chunk(slot, start, tuple(plan[at - length : at]), n_logits))
    return chunks
