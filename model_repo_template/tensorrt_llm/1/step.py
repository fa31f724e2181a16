"""What one forward step does, and its result: the same for every device, and plain integers between the ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

# Stands for a token that only the device knows: the step that chooses it may still be running.
ON_DEVICE = -1
# How many end tokens a slot can hold back without rank 0's help.
HELD_IDS = 4


class Chunk(NamedTuple):
    """Consecutive tokens of one request: a piece of its prompt, or the one token that was generated last."""

    slot: int  # the request's place in the batch
    start: int  # position of the first token in its sequence
    token_ids: tuple[int, ...]
    n_logits: int  # how many of the last positions need logits: none inside a prompt, one at its end


class Step(NamedTuple):
    """Chunks to run together.

    tables: the slots that got blocks of the key/value cache, with these blocks; held: (slot, count, HELD_IDS tokens or
    -1): tokens that may not be chosen while the slot's sequence has fewer tokens than the count.
    """

    chunks: tuple[Chunk, ...]
    tables: tuple[tuple[int, tuple[int, ...]], ...] = ()
    held: tuple[tuple[int, ...], ...] = ()
    with_logits: bool = True  # rank 0 gets all logits and chooses; else every rank chooses the best token by itself


class Choice(NamedTuple):
    """The choices for the chunks that end their sequence, in the order of the chunks."""

    tokens: Tensor  # (choices,); -1 where no token was left
    log_probs: Tensor | None = None  # float32 (choices, 1 + 2 * likeliest), sampling.with_likeliest


class Outcome(Protocol):
    """A step that has been launched. Waiting for it may raise what went wrong in it."""

    @property
    def logits(self) -> Tensor | None:
        """float32 (sum of n_logits, vocab_size) on rank 0, if requested."""

    def choose(self) -> None:
        """Rank 0 chooses, if `launch` left that open. It comes after the tokens of every earlier step are known, and
        before the next launch."""

    def wait(self) -> Choice:
        """Returns when the step has ended, with tensors on the CPU."""


Chooser = Callable[[Tensor], Choice]


class Model(Protocol):
    """One rank's share of the network, and its key/value cache."""

    lookahead: int  # how many steps may be launched before the first of them is waited for
    most_prompt_tokens: int  # in one step, of all prompts together
    most_prompts: int  # pieces of prompts in one step
    n_blocks: int  # the cache
    block_tokens: int

    def prompt_tokens_beside_streams(self, waiting: int) -> int:
        """How many prompt tokens a step takes while streams wait for it and `waiting` prompt tokens wait."""

    def launch(self, step: Step, choose: Chooser | None = None) -> Outcome:
        """Runs a step, or starts to. All ranks launch the same steps; rank 0 brings `choose` for those with logits.
        With lookahead it is called by `Outcome.choose`: the choice may depend on a step that still runs."""


def encode(step: Step) -> list[int]:
    """A step as plain integers: with_logits, n of tables, n of held; tables, each (slot, length, blocks); held; chunks,
    each (slot, start, n_logits, length, tokens)."""
    out = [int(step.with_logits), len(step.tables), len(step.held)]
    for slot, blocks in step.tables:
        out += [slot, len(blocks), *blocks]
    for held in step.held:
        out += held
    for c in step.chunks:
        out += [c.slot, c.start, c.n_logits, len(c.token_ids), *c.token_ids]
    return out


def decode(plan: Sequence[int]) -> Step:
    """The step that `encode` wrote."""
    tables, held, chunks, at = [], [], [], 3
    for _ in range(plan[1]):
        slot, length = plan[at : at + 2]
        tables.append((slot, tuple(plan[at + 2 : at + 2 + length])))
        at += 2 + length
    for _ in range(plan[2]):
        held.append(tuple(plan[at : at + 2 + HELD_IDS]))
        at += 2 + HELD_IDS
    while at < len(plan):
        slot, start, n_logits, length = plan[at : at + 4]
        at += 4 + length
        chunks.append(Chunk(slot, start, tuple(plan[at - length : at]), n_logits))
    return Step(tuple(chunks), tuple(tables), tuple(held), bool(plan[0]))
