"""Blocks of the key/value cache are shared by requests that begin alike, and by no others."""

from __future__ import annotations

import random

import drive_engine  # noqa: F401 (finds the engine)
import pytest
from kv_blocks import Blocks

SIZE = 4


def numbers(count: int, first: int = 0) -> tuple[int, ...]:
    return tuple(range(first, first + count))


def served(blocks: Blocks, prompt: tuple[int, ...], new: int = 1) -> tuple[tuple[int, ...], int]:
    """A request from its beginning to its end; its blocks and how many tokens it shared."""
    taken = blocks.take(-(-(len(prompt) + new) // SIZE), prompt)
    assert taken is not None
    blocks.hold(taken[0], prompt, taken[1] // SIZE)
    blocks.release(taken[0])
    return taken


def test_the_same_beginning_is_shared_block_by_block_and_a_token_is_left_to_compute() -> None:
    blocks = Blocks(20, SIZE, reuse=True)
    first, shared = served(blocks, numbers(10))
    assert shared == 0
    assert served(blocks, numbers(10)) == ((*first[:2], *served(blocks, numbers(10))[0][2:]), 8)
    assert served(blocks, numbers(8))[1] == 4  # with all 8 there would be no logits
    assert served(blocks, (*numbers(6), 99, 98, 97))[1] == 4
    assert served(blocks, (99, *numbers(9)))[1] == 0
    assert blocks.available == 20 and blocks.numbers()["reused"] == 2 + 2 + 1 + 1


def test_a_block_in_use_is_shared_too_and_is_free_when_the_last_one_has_ended() -> None:
    blocks = Blocks(5, SIZE, reuse=True)
    first = blocks.take(3, numbers(10))
    assert first is not None
    blocks.hold(first[0], numbers(10))
    second = blocks.take(3, numbers(10))
    assert second is not None and second[0][:2] == first[0][:2] and second[1] == 8
    assert blocks.used == 4 and blocks.take(2, numbers(9, 50)) is None
    blocks.release(first[0])
    assert blocks.used == 3
    blocks.release(second[0])
    assert blocks.used == 0 and blocks.available == 5


def test_what_was_not_told_is_not_shared() -> None:
    blocks = Blocks(9, SIZE, reuse=True)
    first = blocks.take(3, numbers(10))
    assert first is not None
    assert served(blocks, numbers(10))[1] == 0  # the first one has not computed anything yet


def test_the_least_recently_used_goes_first_and_of_a_sequence_its_end() -> None:
    blocks = Blocks(4, SIZE, reuse=True)
    served(blocks, numbers(8), new=0)
    served(blocks, numbers(8, 100), new=0)
    assert served(blocks, numbers(5))[1] == 4  # its end had to go, not the other sequence's beginning
    assert served(blocks, numbers(9, 100))[1] == 8
    assert served(blocks, numbers(9))[1] == 4
    full = blocks.take(4, numbers(16, 200))
    assert full is not None and full[1] == 0 and blocks.available == 0
    blocks.release(full[0])
    assert served(blocks, numbers(9))[1] == 0


def test_an_equal_digest_alone_shares_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if two beginnings had one digest: the tokens are compared."""
    monkeypatch.setattr(Blocks, "_digest", lambda self, tokens, before: b"the same for all")
    blocks = Blocks(9, SIZE, reuse=True)
    assert served(blocks, numbers(6))[1] == 0
    assert served(blocks, numbers(6, 50))[1] == 0
    assert served(blocks, numbers(6))[1] == 4
    assert served(blocks, (*numbers(4), *numbers(6)))[1] == 4  # the same tokens after others are another block


def test_without_reuse_nothing_is_shared() -> None:
    blocks = Blocks(9, SIZE, reuse=False)
    served(blocks, numbers(10))
    assert served(blocks, numbers(10))[1] == 0 and blocks.available == 9


def test_many_requests_share_only_what_they_have_in_common() -> None:
    """Against a plain model: what each block holds, written when it is told."""
    chance = random.Random(4)
    blocks, holds = Blocks(12, SIZE, reuse=True), dict[int, tuple[int, ...]]()
    running: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    for _ in range(3000):
        if running and chance.random() < 0.5:
            owned, prompt = running.pop(chance.randrange(len(running)))
            blocks.release(owned)
            continue
        prompt = tuple(chance.randrange(2) for _ in range(chance.randrange(1, 14)))
        taken = blocks.take(len(prompt) // SIZE + 1, prompt)
        if taken is None:
            continue
        owned, shared = taken
        assert shared % SIZE == 0 and shared < len(prompt)
        for index in range(shared // SIZE):  # the block holds these tokens after all those before them
            assert holds[owned[index]] == prompt[: (index + 1) * SIZE]
        others = {block for blocks_, _ in running for block in blocks_}
        assert not others & set(owned[shared // SIZE :])
        for index in range(shared // SIZE, len(owned)):
            holds[owned[index]] = prompt[: (index + 1) * SIZE]
        blocks.hold(owned, prompt, shared // SIZE)
        running.append((owned, prompt))
    for owned, _ in running:
        blocks.release(owned)
    assert blocks.available == 12 and blocks.reused_tokens > 0
