"""A flag that a signal handler may set."""

from __future__ import annotations

import os
import select


class Flag:
    """As threading.Event, without its lock.

    wait() of an Event holds that lock for moments. A handler that runs in such a moment, in the same thread, and calls
    set() waits for the lock for ever: a server that was told to end stayed, and could only be killed.
    """

    def __init__(self) -> None:
        self._is_set = False
        # never read: once something is in it, everyone who waits is told, again and again
        self._reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)

    def __del__(self) -> None:
        os.close(self._reading)
        os.close(self._writing)

    def set(self) -> None:
        self._is_set = True
        try:
            os.write(self._writing, b".")
        except BlockingIOError:  # it is full
            pass

    def is_set(self) -> bool:
        return self._is_set

    def wait(self, timeout_seconds: float) -> bool:
        """Until it is set, at most so long; returns whether it is."""
        poll = select.poll()
        poll.register(self._reading, select.POLLIN)
        poll.poll(timeout_seconds * 1000)
        return self._is_set
