"""Limits across worker processes: real forks, real deaths."""

from __future__ import annotations

import os
from collections.abc import Callable

from scripts.openai.shares import BODIES, BUCKETS, PLACES, RUNNING, Shares


def forked(work: Callable[[], None]) -> None:
    """Do something in a child, to its end."""
    pid = os.fork()
    if not pid:
        try:
            work()
        finally:
            os._exit(0)
    os.waitpid(pid, 0)


def test_a_client_has_its_share_in_all_workers() -> None:
    shares = Shares(2)
    one, two = shares.bucket("one"), shares.bucket("two")
    assert one != two or BUCKETS == 1

    def other() -> None:
        shares.worker = 1
        assert shares.take(PLACES, one, 6, 10, 15)

    forked(other)
    assert shares.has(PLACES, one) == 6 == shares.all(PLACES)
    assert not shares.take(PLACES, one, 5, 10, 15), "its share"
    assert shares.take(PLACES, one, 4, 10, 15)
    assert not shares.take(PLACES, two, 6, 10, 15), "the whole"
    assert shares.take(PLACES, two, 5, 10, 15)
    shares.give(PLACES, two, 5)
    shares.give(PLACES, one, 4)
    assert (shares.has(PLACES, one), shares.has(PLACES, two), shares.all(PLACES)) == (6, 0, 6)
    assert shares.all(BODIES) == 0


def test_what_a_dead_worker_had_is_given_back() -> None:
    shares = Shares(2)
    bucket = shares.bucket("one")

    def other() -> None:
        shares.worker = 1
        shares.take(PLACES, bucket, 3, 10, 10)
        for _ in range(2):
            shares.turn(bucket)
            shares.give(RUNNING, bucket, -1)

    forked(other)
    turn = shares.turn(bucket)
    assert turn == 2 and not shares.may_start(bucket, turn, 2)
    shares.forget(1)
    assert shares.may_start(bucket, turn, 2) and shares.all(PLACES) == 0 == shares.all(RUNNING)
    shares.over(bucket)


def test_turns_are_in_order_whoever_leaves() -> None:
    shares = Shares(1)
    bucket = shares.bucket("one")
    turns = [shares.turn(bucket) for _ in range(6)]
    started = []
    for turn in turns:
        if shares.may_start(bucket, turn, 2):
            shares.give(RUNNING, bucket, -1)
            started.append(turn)
    assert started == [0, 1]
    for _ in (3, 4, 5):
        shares.over(bucket)  # they left while they waited: that makes no room
    assert not shares.may_start(bucket, 2, 2)
    shares.give(RUNNING, bucket, 1)
    shares.over(bucket)
    assert shares.may_start(bucket, 2, 2)
