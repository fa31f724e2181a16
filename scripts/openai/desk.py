"""A worker's side of its readers: each client's bodies wait in their own line, and the lines are served in turn.

So one client's expensive requests delay only that client. A line has a limit, beyond which the answer is 429.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections import deque
from dataclasses import dataclass
from typing import Any

from scripts.openai.reader import LENGTH, Asked, too_much, unpacked
from scripts.openai.wrong import ApiError, busy

# How many requests of one client wait to be read in a worker, and of all
MAX_LINE, MAX_LINES = 64, 512
# CPU time bounds a reader; this bounds one that waits without using CPU time
WAIT_SECONDS = 60.0


@dataclass
class Work:
    """A body on its way. client: the client in whose line it waits."""

    client: int
    chat: bool
    data: bytes
    answer: asyncio.Future[Asked]


class Desk:
    """Where readers come for work. path: of its Unix socket."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.lines: dict[int, deque[Work]] = {}
        self.idle: list[ReaderLink] = []
        self.server: asyncio.Server | None = None

    async def open(self) -> None:
        loop = asyncio.get_running_loop()
        self.server = await loop.create_unix_server(lambda: ReaderLink(self), self.path)

    def close(self) -> None:
        if self.server is not None:
            self.server.close()

    async def read(self, client: int, chat: bool, data: bytes) -> Asked:
        """Let a reader read a body. Raises ApiError."""
        line = self.lines.get(client, ())
        if len(line) >= MAX_LINE or sum(map(len, self.lines.values())) >= MAX_LINES:
            raise busy("too many requests wait to be read; try again")
        work = Work(client, chat, data, asyncio.get_running_loop().create_future())
        self.lines.setdefault(client, deque()).append(work)
        self.serve()
        return await work.answer

    def serve(self) -> None:
        """Give idle readers the first body of the line whose turn it is;
        that line then waits until the others have had a turn."""
        while self.idle and self.lines:
            client = next(iter(self.lines))
            line = self.lines.pop(client)
            work = line.popleft()
            if line:
                self.lines[client] = line
            if not work.answer.done():  # otherwise the client has left
                self.idle.pop().give(work)


class ReaderLink(asyncio.Protocol):
    """Serves the connection of one reader as long as it lives."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self.transport: Any = None
        self.pid = 0
        self.received = bytearray()
        self.work: Work | None = None
        self.late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def give(self, work: Work) -> None:
        self.work = work
        self.late = asyncio.get_running_loop().call_later(WAIT_SECONDS, self._kill)
        self.transport.write(LENGTH.pack(len(work.data)) + bytes([work.chat]))
        self.transport.write(work.data)

    def data_received(self, data: bytes) -> None:
        self.received += data
        if not self.pid and len(self.received) >= LENGTH.size:
            self.pid = LENGTH.unpack_from(self.received)[0]
            del self.received[: LENGTH.size]
            self._is_idle()
        size = LENGTH.unpack_from(self.received)[0] if len(self.received) >= LENGTH.size else 0
        if self.work is None or not size or len(self.received) < LENGTH.size + size:
            return
        answer = bytes(self.received[LENGTH.size : LENGTH.size + size])
        self.received.clear()
        work, self.work = self.work, None
        if not work.answer.done():
            try:
                work.answer.set_result(unpacked(answer))
            except ApiError as error:
                work.answer.set_exception(error)
        self._is_idle()

    def connection_lost(self, exc: Exception | None) -> None:
        if self.late is not None:
            self.late.cancel()
        if self in self.desk.idle:
            self.desk.idle.remove(self)
        if self.work is not None and not self.work.answer.done():
            self.work.answer.set_exception(too_much("its process was ended"))

    def _is_idle(self) -> None:
        if self.late is not None:
            self.late.cancel()
        self.desk.idle.append(self)
        self.desk.serve()

    def _kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
