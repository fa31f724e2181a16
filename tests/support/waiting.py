"""The one way that tests wait: ask until the condition holds, and yield the CPU in between."""

from __future__ import annotations

import time
from collections.abc import Callable

# Much longer than anything takes on a busy machine: it only ends what would hang
PATIENCE_SECONDS = 180.0
PAUSE_SECONDS = 0.03
# A fault loses a race against the engine every time; a busy machine does not lose so many, one after the other
RACES = 6


def until(condition: Callable[[], object], what: str = "it did not come about") -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"never came: {what}"
        time.sleep(PAUSE_SECONDS)


def wins_a_race(attempt: Callable[[], object]) -> bool:
    """Whether one of several attempts at something that must be faster than the engine succeeds."""
    return any(attempt() for _ in range(RACES))
