"""Bounds a connection for as long as it lives, in front of uvicorn's own protocol.

uvicorn parses HTTP. It does not bound how long a head may take, how large it is, what follows a body, how long a client
may leave its answer unread, or how many connections one address has. A Front stands between the loop and uvicorn's
protocol. It looks at bytes, times and the ASGI scope, and parses nothing. The application reports the progress of a
request through `head_done`, `body_done` and `answered`.
"""

from __future__ import annotations

import asyncio
import http
import json
import time
import uuid
from typing import Any, ClassVar

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from scripts.openai import passing
from scripts.openai.shares import client_of
from scripts.openai.wrong import ApiError

# How long a client may take for the head of a request, also between two requests; and how large a head may be
HEAD_SECONDS, MAX_HEAD_BYTES = 10, 64 << 10
# How long a client may leave sent bytes unread
UNREAD_SECONDS = 60
# Bytes of a request's body that may arrive ahead of the application: uvicorn stops reading at 64 KB, and one more piece
# from the socket has at most 256 KB. A chunk of five bytes takes ten.
AHEAD_BYTES, BYTES_PER_BODY_BYTE = 512 << 10, 4
MAX_TRAILERS = 64
# Until a head is complete uvicorn gets at most so many bytes at once,
# so that a flood of requests in one piece is noticed in time
HEAD_PIECE_BYTES = 4096
# A request that comes before the last answer is finished closes the connection; so many bytes may follow a body (an
# empty line of old clients)
AFTER_BYTES = 1024
LOOK_SECONDS = 2.0

HEAD, BODY, ANSWER = range(3)


def plain_answer(error: ApiError) -> bytes:
    """An error as bytes, for a connection that did not reach the application."""
    body = json.dumps(error.body).encode()
    head = f"HTTP/1.1 {error.status} {http.HTTPStatus(error.status).phrase}\r\ncontent-type: application/json\r\n"
    head += "".join(f"{name.lower()}: {value}\r\n" for name, value in error.headers.items())
    head += f"content-length: {len(body)}\r\nx-request-id: req-{uuid.uuid4().hex}\r\nconnection: close\r\n\r\n"
    return head.encode() + body


class Parser(HttpToolsProtocol):
    """uvicorn's protocol, with errors about bad HTTP in OpenAI's shape."""

    def send_400_response(self, msg: str) -> None:
        if self.cycle is None or self.cycle.response_complete:
            passing.here.answered("other", 400)
            self.transport.write(plain_answer(ApiError(400, msg)))
        self.transport.close()


class Fronts:
    """All connections of this worker. most: how many there may be; most_of_one: of one address."""

    def __init__(self, most: int) -> None:
        self.most, self.most_of_one = most, max(1, most // 2)
        self.open: set[Front] = set()
        self.by_client: dict[str, int] = {}
        self.by_name: dict[Any, Front] = {}

    async def watch(self) -> None:
        """Run for ever, and close connections that are too slow."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            now = time.monotonic()
            for front in list(self.open):
                front.look(now)


class Front(asyncio.Protocol):
    """One connection. It has the interface of uvicorn's protocols, and passes everything on to one of them."""

    # set once in each worker
    fronts: ClassVar[Fronts]

    def __init__(self, **of_uvicorn: Any) -> None:
        self.inner = Parser(**of_uvicorn)
        self.transport: Any = None
        self.counted = False
        self.client = ""
        self.phase, self.since, self.bytes, self.body_bytes = HEAD, time.monotonic(), 0, 0
        self.scope: Any = None
        self.headers = 0
        self.unread, self.unread_since = 0, 0.0

    # --- from the loop ---

    def connection_made(self, transport: Any) -> None:
        fronts, self.transport = Front.fronts, transport
        peer = transport.get_extra_info("peername") or ("", 0)
        self.client, self.name = client_of(str(peer[0])), (str(peer[0]), int(peer[1]))
        of_client = fronts.by_client.get(self.client, 0)
        if len(fronts.open) >= fronts.most or of_client >= fronts.most_of_one:
            # it is closed unread, so it costs a descriptor only for a moment
            self.refuse(ApiError(429, "too many connections; try again", code="rate_limit_exceeded", Retry_After="1"))
            return
        self.counted = True
        fronts.open.add(self)
        fronts.by_client[self.client] = of_client + 1
        fronts.by_name[self.name] = self
        self.inner.connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        fronts = Front.fronts
        if not self.counted:
            return
        fronts.open.discard(self)
        fronts.by_client[self.client] -= 1
        if not fronts.by_client[self.client]:
            del fronts.by_client[self.client]
        if fronts.by_name.get(self.name) is self:
            del fronts.by_name[self.name]
        self.inner.connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if not self.counted:
            return
        at = 0
        while at < len(data) and not self.transport.is_closing():
            size = HEAD_PIECE_BYTES if self.phase == HEAD else len(data)
            piece = data[at : at + size] if size < len(data) else data[at:]
            at += len(piece)
            self.bytes += len(piece)
            if self.phase == HEAD and self.bytes > MAX_HEAD_BYTES:
                self.refuse(ApiError(431, f"the head of the request is larger than {MAX_HEAD_BYTES} bytes"))
                return
            if self.phase == ANSWER and self.bytes > AFTER_BYTES:
                self.transport.abort()
                return
            self.inner.data_received(piece)
            cycle = self.inner.cycle
            if (
                self.phase == HEAD
                and cycle is not None
                and not cycle.response_complete
                and cycle.scope is not self.scope
            ):
                # the head is complete: the application will be called with this scope
                self.scope = cycle.scope
                self.headers = len(self.scope["headers"])
                self.phase, self.bytes, self.body_bytes = BODY, 0, 0
            if self.inner.pipeline:
                self.transport.abort()
                return
            if self.phase == BODY and (
                self.bytes > AHEAD_BYTES + BYTES_PER_BODY_BYTE * self.body_bytes
                or len(self.scope["headers"]) > self.headers + MAX_TRAILERS
            ):
                self.transport.abort()
                return

    def eof_received(self) -> bool | None:
        return self.inner.eof_received() if self.counted else None  # type: ignore[func-returns-value]

    def pause_writing(self) -> None:
        if self.counted:
            self.inner.pause_writing()

    def resume_writing(self) -> None:
        self.unread_since = time.monotonic()  # the client has read some of it, even if as much is written at once
        if self.counted:
            self.inner.resume_writing()

    # --- from the application ---

    def body_came(self, size: int, more: bool) -> None:
        """The application has read so many bytes of the body; whether more follow."""
        self.body_bytes += size
        if not more and self.phase == BODY:
            self.phase, self.bytes = ANSWER, 0

    def answered(self) -> None:
        """The answer was written: the next head may come."""
        self.phase, self.since, self.bytes = HEAD, time.monotonic(), 0

    # --- bounds ---

    def look(self, now: float) -> None:
        if self.phase == HEAD and now - self.since > HEAD_SECONDS and not self.transport.is_closing():
            self.transport.close()
        unread = self.transport.get_write_buffer_size()
        if not unread or unread < self.unread or not self.unread:
            self.unread_since = now
        self.unread = unread
        if unread and now - self.unread_since > UNREAD_SECONDS:
            self.transport.abort()

    def refuse(self, error: ApiError) -> None:
        if self.inner.cycle is None or self.inner.cycle.response_complete:
            passing.here.answered("other", error.status)
            self.transport.write(plain_answer(error))
        self.transport.close()
