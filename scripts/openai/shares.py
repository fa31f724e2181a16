"""Limits across worker processes: each client's share of what there is for all.

The numbers are in memory that all workers share, made before they are forked. Each worker writes its own rows, so that
what a worker had is known, and given back, when it dies. A client is a bucket: a keyed hash of its API key, else of its
address. Two clients in one bucket have one share together; the hash's key is new at every start.
"""

from __future__ import annotations

import fcntl
import hashlib
import ipaddress
import mmap
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

BUCKETS = 1024
# rows of one worker: bytes of bodies that are being read, answers that wait or run, turns that were taken, answers in
# the engine, and requests of keys that may have so many at once
BODIES, PLACES, TURNS, RUNNING, REQUESTS = range(5)
KINDS = 5
# rows of all workers together: turns that were given out, and those that are over; when a key's minute began,
# and its tokens since
TAKEN, OVER, SINCE, SPENT = range(4)
ROWS = 4
MINUTE = 60


def client_of(address: str) -> str:
    """The client behind an address: an IPv6 customer has at least a /64; on a socket for both,
    IPv4 is written as IPv6."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if parsed.version == 4:
        return str(parsed)
    return str(parsed.ipv4_mapped or ipaddress.ip_network((parsed, 64), strict=False))


class Shares:
    """The parent makes it; every worker sets `worker` to its own number after the fork."""

    def __init__(self, workers: int) -> None:
        self.workers, self.worker = workers, 0
        columns = BUCKETS + 1  # the last one is for all clients
        self.cells = memoryview(mmap.mmap(-1, 8 * columns * (ROWS + workers * KINDS))).cast("q")
        self.columns = columns
        # how often each worker's loop has run
        self.beats = memoryview(mmap.mmap(-1, 8 * workers)).cast("q")
        # 1: the server is ending
        self.flags = memoryview(mmap.mmap(-1, 8)).cast("q")
        # which key has which bucket
        self.owners = memoryview(mmap.mmap(-1, 8 * BUCKETS)).cast("Q")
        self.lock_file = os.memfd_create("turns")
        self.secret = os.urandom(16)

    def bucket(self, client: str) -> int:
        digest = hashlib.blake2b(client.encode("utf-8", "replace"), digest_size=4, key=self.secret).digest()
        return int.from_bytes(digest, "big") % BUCKETS

    def bucket_of_key(self, digest: bytes) -> int:
        """The bucket of a key, its own in all workers as long as there are any, so that its limits are exact."""
        owner = int.from_bytes(digest[:8], "little") or 1
        first = owner % BUCKETS
        bucket: int
        for bucket in (*range(first, BUCKETS), *range(first)):
            if self.owners[bucket] == owner:
                return bucket
            if not self.owners[bucket]:
                with self._locked():
                    if self.owners[bucket] in (0, owner):
                        self.owners[bucket] = owner
                        return bucket
        return first

    @property
    def ending(self) -> bool:
        return bool(self.flags[0])

    def end(self) -> None:
        """From now on the server says that it is ending."""
        self.flags[0] = 1

    # --- tokens of a minute ---

    def spend(self, bucket: int, tokens: int) -> tuple[int, int]:
        """Count tokens of a key's minute, which begins with its first ones. Returns how many there were before, and the
        seconds to its end."""
        with self._locked():
            now, since, spent = int(time.monotonic()), SINCE * self.columns + bucket, SPENT * self.columns + bucket
            if now - self.cells[since] >= MINUTE or not self.cells[spent]:
                self.cells[since], self.cells[spent] = now, 0
            before = self.cells[spent]
            self.cells[spent] = before + tokens
            return before, max(1, self.cells[since] + MINUTE - now)

    def has(self, kind: int, bucket: int) -> int:
        """What a client has of this kind, in all workers."""
        return sum(self.cells[self._cell(worker, kind, bucket)] for worker in range(self.workers))

    def all(self, kind: int) -> int:
        """What all clients have, in all workers."""
        return self.has(kind, BUCKETS)

    def take(self, kind: int, bucket: int, count: int, most: int, most_of_all: int) -> bool:
        """Count it if neither the client's share nor the whole is exceeded. It counts first and checks then: two
        workers at once may both refuse, but never both exceed."""
        self.give(kind, bucket, -count)
        if self.has(kind, bucket) <= most and self.all(kind) <= most_of_all:
            return True
        self.give(kind, bucket, count)
        return False

    def give(self, kind: int, bucket: int, count: int) -> None:
        """Give back what was taken."""
        self.cells[self._cell(self.worker, kind, bucket)] -= count
        self.cells[self._cell(self.worker, kind, BUCKETS)] -= count

    # --- turns: the answers of one client go into the engine in the order in which they were asked for,
    # in whatever worker ---

    def turn(self, bucket: int) -> int:
        with self._locked():
            taken = self.cells[TAKEN * self.columns + bucket]
            self.cells[TAKEN * self.columns + bucket] = taken + 1
            self.give(TURNS, bucket, -1)
        return taken

    def may_start(self, bucket: int, turn: int, most: int) -> bool:
        """Whether this turn may start: fewer than `most` answers of the client are in the engine,
        and all earlier turns were started."""
        return turn < self.cells[OVER * self.columns + bucket] + most and self.has(RUNNING, bucket) < most

    def over(self, bucket: int) -> None:
        """A turn has ended, started or not."""
        with self._locked():
            self.cells[OVER * self.columns + bucket] += 1
            self.give(TURNS, bucket, 1)

    @property
    def load(self) -> tuple[int, int]:
        """How many answers of all workers wait for their turn, and how many are in the engine."""
        given = self.all(RUNNING)
        return max(0, self.all(TURNS) - given), given

    def forget(self, worker: int) -> None:
        """A worker has died: take back everything that it counted."""
        with self._locked():
            for bucket in range(self.columns):
                self.cells[OVER * self.columns + bucket] += self.cells[self._cell(worker, TURNS, bucket)]
                for kind in range(KINDS):
                    self.cells[self._cell(worker, kind, bucket)] = 0

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """A record lock: the kernel gives it back when its holder dies."""
        fcntl.lockf(self.lock_file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.lockf(self.lock_file, fcntl.LOCK_UN)

    def _cell(self, worker: int, kind: int, bucket: int) -> int:
        return (ROWS + worker * KINDS + kind) * self.columns + bucket
