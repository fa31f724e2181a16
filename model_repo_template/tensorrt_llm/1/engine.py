"""In-flight batching: requests join and leave while others run, and each forward step serves all that are running.

It does not know Triton. `open_engine` loads one rank; on rank 0 it gives an Engine to submit requests to, on the others
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
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

import torch
from engine_config import EngineConfig, read_config
from kv_blocks import Blocks
from llama import Llama, load_weights
from ranks import FollowerLink, GpuRanks, LeaderLink, Ranks, meet, this_rank, use_own_cores, world_size
from sampling import Sampling, adjusted, choose, ends_with, guided, log_probs, of_prompt, on, refusal, with_likeliest
from step import HELD_IDS, ON_DEVICE, Choice, Chunk, Model, Outcome, Step, decode, encode
from torch import Tensor

log = logging.getLogger("torch engine")

# Positions of prompts whose log probabilities one step tells:
# their logits are in memory together (0.5 GB at 128,256 tokens)
PROMPT_ROWS = 1024
CLOSE_SECONDS = 10.0  # how long a last step may take; Triton has drained the requests before


class Refused(ValueError):
    """A request that this engine cannot serve; the message is for the client."""


@dataclass(frozen=True)
class Piece:
    """What one step gave a request. The last piece is final; after an error nothing else comes."""

    tokens: tuple[int, ...] = ()
    log_probs: tuple[
        float, ...
    ] = ()  # one per token, when asked for; with its likeliest tokens (sampling.with_likeliest)
    prompt_log_probs: tuple[
        float, ...
    ] = ()  # the same for the prompt's tokens of this step, from its second on, when asked for
    context_logits: Tensor | None = None  # (prompt tokens of this step, vocab_size), when asked for
    generation_logits: Tensor | None = None  # (tokens, vocab_size), when asked for
    final: bool = False
    error: str | None = None


@dataclass(frozen=True, eq=False)
class Request:
    """A prompt and how to answer it. `receive` is called from the engine's thread and must not block."""

    prompt: tuple[int, ...]
    max_new_tokens: int
    receive: Callable[[Piece], None]
    sampling: Sampling = field(default_factory=Sampling)
    log_probs: bool = False
    prompt_log_probs: bool = False
    context_logits: bool = False
    generation_logits: bool = False
    likeliest: int = 0  # with log_probs: how many other tokens' log probabilities are sent too


class Running:
    """A request in the batch: its slot, its blocks of the cache, its tokens so far, and how far it has been
    launched."""

    def __init__(
        self, request: Request, slot: int, blocks: Sequence[int], cached: int, on_device: bool, device: torch.device
    ) -> None:
        self.request, self.slot, self.blocks = request, slot, tuple(blocks)
        self.sampling, bias = request.sampling, request.sampling.embedding_bias
        if bias is not None:  # once, not in every step
            self.sampling = replace(self.sampling, embedding_bias=on(device, bias))
        self.tokens = list(request.prompt)
        self.cached = cached  # tokens that are in the cache: those it shares, and those of the steps launched so far
        self._on_device = on_device
        # One generator per request: what it draws does not depend on who else is in the batch.
        self._generator = torch.Generator().manual_seed(request.sampling.random_seed)

    @property
    def generating(self) -> bool:
        return self.cached >= len(self.request.prompt)

    @property
    def launched(self) -> bool:
        """Every token that was asked for has been launched."""
        return self.cached - len(self.request.prompt) + 1 >= self.request.max_new_tokens

    @property
    def with_logits(self) -> bool:
        """Rank 0 must see the logits: to choose, or to hand them on."""
        request = self.request
        return (
            not request.sampling.best_of_logits
            or (request.sampling.held and not (self._on_device and len(request.sampling.end_ids) <= HELD_IDS))
            or request.log_probs
            or request.prompt_log_probs
            or request.context_logits
            or request.generation_logits
        )

    def next_chunk(self, room: int) -> Chunk:
        """At most `room` tokens that are not in the cache yet."""
        if self.generating:
            token = ON_DEVICE if self._on_device else self.tokens[self.cached]
            return Chunk(self.slot, self.cached, (token,), 1)
        token_ids = self.request.prompt[self.cached : self.cached + room]
        at_end = self.cached + len(token_ids) == len(self.request.prompt)
        everywhere = self.request.context_logits or self.request.prompt_log_probs
        return Chunk(self.slot, self.cached, token_ids, len(token_ids) if everywhere else int(at_end))

    def prompt_log_probs(self, chunk: Chunk, logits: Tensor) -> tuple[float, ...]:
        """The log probabilities of the prompt's tokens that follow the chunk,
        from its logits (n_logits, vocab_size)."""
        following = self.request.prompt[chunk.start + 1 : chunk.start + 1 + chunk.n_logits]
        return of_prompt(logits[: len(following)], following, self.request.likeliest)

    def generated(self, chunk: Chunk) -> int:
        """How many tokens were generated before the choice after a chunk."""
        return chunk.start + len(chunk.token_ids) - len(self.request.prompt)

    def ends_with(self, chunk: Chunk) -> bool:
        """Whether the chunk's last token is the sequence's last, so that a new one follows."""
        return chunk.start + len(chunk.token_ids) >= len(self.request.prompt)

    def draw(self) -> float:
        return float(torch.rand((), generator=self._generator))

    def take(
        self,
        chunk: Chunk,
        token: int,
        log_prob: list[float] | None,
        logits: Tensor | None,
        prompt_log_probs: tuple[float, ...] = (),
    ) -> Piece:
        """What a step that has ended gave. token: the choice after the chunk; logits: the chunk's,
        (n_logits, vocab_size)."""
        request, sampling = self.request, self.request.sampling
        context = logits if request.context_logits and chunk.start < len(request.prompt) else None
        if not self.ends_with(chunk):
            return Piece(prompt_log_probs=prompt_log_probs, context_logits=context)
        if token < 0:
            return Piece(
                final=True, error="no token is left to choose: bad_words_list, min_length or the guide ban every one"
            )
        if token in sampling.end_ids:  # not part of the output
            return Piece(prompt_log_probs=prompt_log_probs, context_logits=context, final=True)
        self.tokens.append(token)
        full = len(self.tokens) - len(request.prompt) == request.max_new_tokens
        return Piece(
            tokens=(token,),
            log_probs=tuple(log_prob[: 1 + 2 * request.likeliest]) if log_prob is not None else (),
            prompt_log_probs=prompt_log_probs,
            context_logits=context,
            generation_logits=logits[-1:] if logits is not None and request.generation_logits else None,
            final=full or ends_with(self.tokens, sampling.stop_words),
        )


Batch = list[tuple[Running, Chunk]]


def choice_of(batch: Batch, logits: Tensor) -> Choice:
    """The next token after each chunk that has logits (sum of n_logits, vocab_size), on their device."""
    choosing = [(one, chunk) for one, chunk in batch if chunk.n_logits]
    last = on(logits.device, torch.tensor([chunk.n_logits for _, chunk in choosing]).cumsum(0) - 1)
    rows = logits.index_select(0, last)
    samplings = [one.sampling if one.ends_with(chunk) else Sampling() for one, chunk in choosing]
    changed = [
        adjusted(rows[index], sampling, one.tokens, one.generated(chunk)) if sampling.adjusts else rows[index]
        for index, (sampling, (one, chunk)) in enumerate(zip(samplings, choosing, strict=True))
    ]
    draws = [one.draw() for sampling, (one, _) in zip(samplings, choosing, strict=True) if not sampling.greedy]
    tokens = choose(guided(torch.stack(changed), samplings), samplings, draws)
    asked = any(one.request.log_probs for one, _ in choosing)
    if not asked:
        return Choice(tokens, None)
    most = max(one.request.likeliest for one, _ in choosing)
    return Choice(tokens, with_likeliest(rows, log_probs(rows, tokens), most))


class Engine:
    """Rank 0: owns the queue and the batch, and a thread that steps while there is work and sleeps while there is none.

    All methods may be called from any thread. The lock is never held during a step, so that a step which hangs (a dead
    peer) cannot keep `fail` from answering.
    """

    def __init__(self, config: EngineConfig, model: Model, link: LeaderLink, ranks: Ranks, reuse: bool = False) -> None:
        self.config = config
        self.steps = 0
        self._model, self._link, self._ranks = model, link, ranks
        self._waiting: list[Request] = []
        self._running: list[Running] = []
        self._free_slots = list(range(config.max_batch_size))  # a heap: low slots first keeps them adjacent
        self.blocks = Blocks(model.n_blocks, model.block_tokens, reuse)
        self._held: list[tuple[int, ...]] = []  # the same, for tokens that may not be chosen at first
        self._tables: list[tuple[int, tuple[int, ...]]] = []  # slots whose tables the model does not have yet
        self._in_flight: deque[tuple[Batch, Outcome]] = deque()
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
        if request.sampling.guide is not None:
            request.sampling.guide.when_ready(self._look_again)

    def _look_again(self) -> None:
        """A request that waited for its guide may start."""
        with self._changed:
            self._changed.notify()

    def cancel(self, request: Request) -> None:
        """Ends a request, if it is still there, with the tokens that it has. Its slot is free for the next step."""
        with self._changed:
            self._end([request], Piece(final=True))

    def fail(self, message: str) -> None:
        """Ends every request, and each later one, with this error. The first failure counts."""
        with self._changed:
            if self._failure is None:
                self._failure = message
                self._end(self._waiting + [one.request for one in self._running], Piece(final=True, error=message))
                self._changed.notify()

    def close(self) -> None:
        """Ends the engine's thread and the other ranks; requests that are still there get an error."""
        if self._failure is not None:
            return  # closed already, or no other rank is left to stop
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

    def _blocks_for(self, request: Request) -> int:
        """How many blocks of the cache a request may fill. It gets all of them before it starts, so that it can always
        end. The cache holds at least one request of max_seq_len."""
        return -(-(len(request.prompt) + request.max_new_tokens) // self._model.block_tokens)

    def _rank_lost(self, rank: int, why: str) -> None:
        log.error("rank %d %s; every request fails from now on", rank, why)  # the supervisor reads this line
        self.fail(f"rank {rank} of the engine {why}")

    def _end(self, requests: Sequence[Request], piece: Piece) -> None:
        """Takes requests out, frees their slots and gives them their last piece. The caller holds the lock."""
        for request in requests:
            if request in self._waiting:
                self._waiting.remove(request)
                request.receive(piece)
        for one in [one for one in self._running if one.request in requests]:
            self._running.remove(one)
            heapq.heappush(self._free_slots, one.slot)
            if piece.error is None:  # a step that failed may have written anything
                self._hold(one, one.tokens[: one.cached], len(one.request.prompt))
            self.blocks.release(one.blocks)
            one.request.receive(piece)

    def _admit(self) -> None:
        """Gives waiting requests, first come first served, a slot and their blocks of the cache.
        The caller holds the lock."""
        while self._free_slots and (request := self._next_waiting()) is not None:
            # a request for the logits of the whole prompt must compute the whole prompt
            computed = request.context_logits or request.prompt_log_probs
            taken = self.blocks.take(self._blocks_for(request), () if computed else request.prompt)
            if taken is None:
                return
            slot, (blocks, shared) = heapq.heappop(self._free_slots), taken
            self._waiting.remove(request)
            on_device, device = self._model.lookahead > 0, self._ranks.device
            self._running.append(Running(request, slot, blocks, shared, on_device, device))
            self._tables.append((slot, blocks))
            sampling = request.sampling
            ends = sampling.end_ids[:HELD_IDS] if sampling.held else ()
            until = len(request.prompt) + sampling.min_length
            self._held.append((slot, until, *ends, *(-1,) * (HELD_IDS - len(ends))))

    def _next_waiting(self) -> Request | None:
        """The first of those that need not wait for their guides. The caller holds the lock."""
        ready = (one for one in self._waiting if (guide := one.sampling.guide) is None or guide.ready)
        return next(ready, None)

    def _hold(self, one: Running, tokens: Sequence[int], told: int) -> None:
        """Lets other requests that begin with these tokens share their blocks; the first `told` tokens are shared
        already. The caller holds the lock."""
        self.blocks.hold(one.blocks, tokens, told // self._model.block_tokens)

    def _next_batch(self) -> Batch | None:
        """What the next step does: decode tokens first, then prompts while there is room. It is empty if there is only
        a step to wait for.

        Waits for work when there is no step to wait for. None when the engine has failed.
        """
        with self._changed:
            if not self._in_flight:
                self._changed.wait_for(
                    lambda: self._running or self._failure is not None or self._next_waiting() is not None
                )
            if self._failure is not None:
                return None
            self._admit()
            ready = [one for one in self._running if not (one.generating and one.launched)]
            streams = [one for one in ready if one.generating]
            prompts = [one for one in ready if not one.generating]
            batch = [(one, one.next_chunk(1)) for one in streams]
            room = min(self.config.max_num_tokens - len(streams), self._model.most_prompt_tokens)
            if streams and prompts:
                left = sum(len(one.request.prompt) - one.cached for one in prompts)
                left += sum(len(request.prompt) for request in self._waiting)
                room = min(room, self._model.prompt_tokens_beside_streams(left))
            rows = PROMPT_ROWS
            for one in prompts[: self._model.most_prompts]:
                taken = min(room, rows) if one.request.prompt_log_probs else room
                if taken > 0:
                    batch.append((one, one.next_chunk(taken)))
                    length = len(batch[-1][1].token_ids)
                    room -= length
                    rows -= length if one.request.prompt_log_probs else 0
            for one, chunk in batch:
                one.cached += len(chunk.token_ids)
            return batch

    def _run(self) -> None:
        while (batch := self._next_batch()) is not None:
            lost = batch
            try:
                if batch:
                    self._launch(batch)
                while len(self._in_flight) > (self._model.lookahead if batch else 0):
                    lost = [*self._in_flight[0][0], *batch]
                    self._deliver(*self._in_flight.popleft())
                if self._in_flight and batch:
                    lost = batch
                    self._look_ahead(batch)
                    self._in_flight[-1][1].choose()
            except Exception:
                log.exception("a step failed")
                self._in_flight.clear()
                if self._ranks.size > 1 or self._ranks.device.type == "cuda":
                    # the other ranks are inside that step and will not return from it; a GPU that failed does not
                    # recover
                    self.fail("the engine has failed; the server's log says why")
                    self._link.abandon()
                    log.error(
                        "rank 0 has ended its work: a step failed"
                    )  # the supervisor reads this line, as that of a lost rank
                with self._changed:
                    failed = Piece(final=True, error="a step of the engine failed; the server's log says why")
                    self._end([one.request for one, _ in lost], failed)

    def _look_ahead(self, batch: Batch) -> None:
        """Begins to compute what may follow guided answers, while the step runs. All their tokens so far are known."""
        ahead = [(guide, one.tokens[len(one.request.prompt) :]) for one, chunk in batch
                 if (guide := one.request.sampling.guide) is not None and one.ends_with(chunk)]  # fmt: skip
        if ahead:
            ahead[0][0].guides.ahead(ahead)

    def _launch(self, batch: Batch) -> None:
        if not self._model.lookahead:
            self._look_ahead(batch)
        tables, self._tables = tuple(self._tables), []
        held, self._held = tuple(self._held), []
        step = Step(tuple(chunk for _, chunk in batch), tables, held, any(one.with_logits for one, _ in batch))
        self._link.send(encode(step))
        self._in_flight.append((batch, self._model.launch(step, lambda logits: choice_of(batch, logits))))
        self.steps += 1
        if self.blocks.reuse:  # shared from now on: a reader comes in a later step
            with self._changed:
                for one, chunk in batch:
                    if chunk.start < len(one.request.prompt) and one in self._running:
                        end = chunk.start + len(chunk.token_ids)
                        self._hold(one, one.request.prompt[:end], chunk.start)

    def _deliver(self, batch: Batch, outcome: Outcome) -> None:
        """Waits for a step and hands out its results."""
        choice = outcome.wait()
        tokens = choice.tokens.tolist()
        chances = choice.log_probs.tolist() if choice.log_probs is not None else []
        row = index = 0
        for one, chunk in batch:
            token, chance, logits = ON_DEVICE, None, None
            told: tuple[float, ...] = ()
            if chunk.n_logits:
                token = tokens[index]
                chance = chances[index] if one.request.log_probs else None
                if one.request.context_logits or one.request.generation_logits:
                    assert outcome.logits is not None
                    logits = outcome.logits[row : row + chunk.n_logits].cpu()
                if one.request.prompt_log_probs and chunk.start < len(one.request.prompt):
                    assert outcome.logits is not None
                    told = one.prompt_log_probs(chunk, outcome.logits[row : row + chunk.n_logits])
                index, row = index + 1, row + chunk.n_logits
            with self._changed:
                if one not in self._running:
                    continue  # it ended before this step did: cancelled, failed, or with a token of the step before
                piece = one.take(chunk, token, chance, logits, told)
                if piece.final:
                    self._end([one.request], piece)
                elif piece.tokens or piece.prompt_log_probs or piece.context_logits is not None:
                    one.request.receive(piece)


class Follower:
    """A rank above 0: launches every step that rank 0 launches, until rank 0 ends."""

    def __init__(self, model: Model, link: FollowerLink, ranks: Ranks) -> None:
        self._model, self._link, self._ranks = model, link, ranks

    def follow(self) -> None:
        self._link.loaded()
        for plan in self._link.plans():
            self._model.launch(decode(plan))
        self._ranks.close()


def open_engine(engine_dir: Path, reuse: bool = False) -> Engine | Follower:
    """Loads this process's rank of the engine and meets the others. Raises ValueError or RankLost when it cannot.

    reuse: requests that begin with the same tokens share blocks of the key/value cache.
    """
    config = read_config(engine_dir)
    if config.tp_size != world_size():
        raise ValueError(f"the engine was built for tp_size {config.tp_size}, but {world_size()} rank(s) were started")
    use_own_cores()
    ranks = this_rank()
    link = meet(ranks)
    model = open_model(engine_dir / f"rank{ranks.rank}.safetensors", config, ranks, reuse)
    if isinstance(link, FollowerLink):
        return Follower(model, link, ranks)
    link.wait_until_loaded()
    return Engine(config, model, link, ranks, reuse)


def open_model(path: Path, config: EngineConfig, ranks: Ranks, reuse: bool) -> Model:
    """The network of this rank, for its kind of device. Raises ValueError."""
    if ranks.device.type == "cpu":
        # A CPU computes in float32 whatever is stored: its half precision is slow, and float32 is what the oracle uses.
        return Llama(config, load_weights(path, config, ranks.device, torch.float32), ranks, reuse)
    dtype = getattr(torch, config.dtype)
    if (why := ranks.share(why_no_kernels(ranks.size))) != "":
        log.warning("without its own kernels, much slower: %s", why)
        return Llama(config, load_weights(path, config, ranks.device, dtype), ranks, reuse)
    from gpu_llama import GpuLlama, OutOfMemory

    free, total = torch.cuda.mem_get_info(ranks.device)
    try:
        return GpuLlama(config, load_weights(path, config, ranks.device, dtype, together=True), cast(GpuRanks, ranks))
    except torch.OutOfMemoryError:
        raise OutOfMemory(
            f"out of GPU memory: {torch.cuda.get_device_name(ranks.device)} has {total / 1e9:.1f} GB, "
            f"{free / 1e9:.1f} GB of them free at the start; the weights of this rank take "
            f"{path.stat().st_size / 1e9:.1f} GB: raise TP, or lower MAX_BATCH_SIZE"
        ) from None


def why_no_kernels(n_ranks: int) -> str:
    """Why this process cannot use kernels in the Triton language, or the memory of the other ranks; empty if it can."""
    try:
        from triton.runtime import driver

        driver.active.utils  # noqa: B018 (builds what starts a kernel: it takes a C compiler and Python's headers)
    except Exception as problem:
        said = f"{type(problem).__name__}: {problem}"
        return f"PyTorch's Triton compiler does not work here ({said}); it needs gcc and Python's headers"
    n_gpus = min(n_ranks, torch.cuda.device_count())
    if not all(torch.cuda.can_device_access_peer(0, other) for other in range(1, n_gpus)):
        return "these GPUs cannot read each other's memory"
    return ""
