"""Which request has which blocks of the key/value cache, and which blocks hold what a later request may begin with.

Keys and values of a token depend only on that token and on those before it. So two requests that begin with the same
tokens may read the same blocks. A block is known by a digest of its tokens and of the block before it (a chain, as in
vLLM and TensorRT-LLM). Its tokens are compared as well, so that an equal digest alone gives no request another one's
data. Blocks without a request stay until room is needed. The least recently used one goes first; within a sequence, the
last one.
"""

from __future__ import annotations

import hashlib
import secrets
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Tokens = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Known:
    """What a full block holds: its tokens, after those of `before` (None: it begins a sequence)."""

    digest: bytes
    tokens: Tokens
    before: Known | None

    def begins_as(self, tokens: Tokens, before: Known | None) -> bool:
        """Whether this is the block of these tokens after that block, compared token by token."""
        return self.tokens == tokens and self.before is before


class Blocks:
    """The blocks 1 to `count` of `size` tokens each (block 0 is the model's own). Nothing here is safe for several
    threads.

    reuse: whether requests share blocks; without it every request has its own.
    """

    def __init__(self, count: int, size: int, reuse: bool) -> None:
        self.count, self.size, self.reuse = count, size, reuse
        self.reused_tokens = 0  # since the start
        self._free = list(range(1, count + 1))
        self._users: dict[int, int] = {}  # requests that have a block
        self._known: dict[int, Known] = {}
        self._by_digest: dict[bytes, int] = {}
        self._unused: OrderedDict[int, None] = OrderedDict()  # known blocks that no request has, the next to go first
        # A client that does not know it cannot make two prompts with the same digest.
        self._key = secrets.token_bytes(32)

    @property
    def available(self) -> int:
        """Blocks that a request could get now."""
        return len(self._free) + len(self._unused)

    @property
    def used(self) -> int:
        return len(self._users)

    def numbers(self) -> dict[str, int]:
        """How many blocks there are, under the names of NVIDIA's metrics; reused: how often one served another request,
        since the start."""
        return {
            "max": self.count,
            "free": self.available,
            "used": self.used,
            "tokens_per": self.size,
            "reused": self.reused_tokens // self.size,
        }

    def take(self, count: int, prompt: Sequence[int]) -> tuple[tuple[int, ...], int] | None:
        """(blocks of a new request, how many of its first tokens they hold already), or None when there are too few.

        At least one token of the prompt is left to compute, because its logits give the first token of the answer. Pass
        an empty prompt to share nothing.
        """
        shared: list[int] = []
        before: Known | None = None
        for begin in range(0, len(prompt) - self.size, self.size) if self.reuse else ():
            tokens = tuple(prompt[begin : begin + self.size])
            block = self._by_digest.get(self._digest(tokens, before))
            if block is None or not self._known[block].begins_as(tokens, before):
                break
            before = self._known[block]
            shared.append(block)
        if count - len(shared) > self.available - sum(block in self._unused for block in shared):
            return None
        for block in shared:
            self._unused.pop(block, None)
        blocks = shared + [self._new() for _ in range(count - len(shared))]
        for block in blocks:
            self._users[block] = self._users.get(block, 0) + 1
        self.reused_tokens += len(shared) * self.size
        return tuple(blocks), len(shared) * self.size

    def hold(self, blocks: Sequence[int], tokens: Sequence[int], first: int = 0) -> None:
        """From now on a request's blocks hold these tokens; the first `first` blocks are known already.

        If another block has the same content already, this block is not shared.
        """
        if not self.reuse:
            return
        for index in range(first, len(tokens) // self.size):
            before = self._known.get(blocks[index - 1]) if index else None
            if index and before is None:
                return  # its beginning is another block's, so no search would find it
            piece = tuple(tokens[index * self.size : (index + 1) * self.size])
            digest = self._digest(piece, before)
            if digest not in self._by_digest and blocks[index] not in self._known:
                self._known[blocks[index]] = Known(digest, piece, before)
                self._by_digest[digest] = blocks[index]

    def release(self, blocks: Sequence[int]) -> None:
        """A request has ended. What its blocks hold stays for others while there is room."""
        for block in reversed(blocks):  # a sequence's last block is useless without those before it
            self._users[block] -= 1
            if self._users[block]:
                continue
            del self._users[block]
            if block in self._known:
                self._unused[block] = None
            else:
                self._free.append(block)

    def _new(self) -> int:
        if self._free:
            return self._free.pop()
        block, _ = self._unused.popitem(last=False)
        del self._by_digest[self._known.pop(block).digest]
        return block

    def _digest(self, tokens: Tokens, before: Known | None) -> bytes:
        chain = before.digest if before else b""
        return hashlib.blake2b(chain + np.array(tokens, dtype="<i4").tobytes(), key=self._key, digest_size=16).digest()
