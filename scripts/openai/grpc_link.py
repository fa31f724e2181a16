"""gRPC calls to Triton's own port, without grpcio: HTTP/2 frames come in, whole messages go out.

grpcio takes about 50 microseconds of CPU per received message, however it is used; this takes about 10
(docs/endpoint.md), and an answer has one message per token. The server is our own, on this machine, and every call has
the same shape: one message out, many in. So only that part of HTTP/2 is here. The package hpack decodes headers.

Sources: RFC 9113 (HTTP/2), RFC 7541 (HPACK), gRPC's doc/PROTOCOL-HTTP2.md.
"""

from __future__ import annotations

import asyncio
import struct
import urllib.parse
from collections import deque
from typing import Any, Protocol

import hpack

DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 4, 6, 7, 8, 9
END_STREAM, END_HEADERS, ACK, PADDED, PRIORITY = 1, 4, 1, 8, 32
SETTINGS_ENABLE_PUSH, SETTINGS_MAX_CONCURRENT_STREAMS, SETTINGS_INITIAL_WINDOW_SIZE, SETTINGS_MAX_FRAME_SIZE = (
    2,
    3,
    4,
    5,
)
CANCEL = 8
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DEFAULT_WINDOW, MOST_WINDOW = 65_535, (1 << 31) - 1
# Stream ids end at 2**31; long before that a new connection is opened
LAST_STREAM = 1 << 30
# Codes of gRPC's doc/statuscodes.md
OK, CANCELLED, UNKNOWN, UNAVAILABLE = 0, 1, 2, 14
CONNECT_SECONDS = 5.0
# length (24 bits in two parts), type, flags, stream
FRAME = struct.Struct(">HBBBI")


class Receiver(Protocol):
    """The receiver of a call: it gets each message as it comes, then the end."""

    def message(self, data: bytes) -> None: ...

    def finished(self, status: int, details: str) -> None: ...


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """One frame with its header (RFC 9113, 4.1)."""
    return FRAME.pack(len(payload) >> 8, len(payload) & 255, kind, flags, stream) + payload


class Call:
    """One call on its way. window: how many more bytes the server takes now; unsent: bytes that wait for that."""

    def __init__(self, link: Link, receiver: Receiver, path: str, message: bytes) -> None:
        self.link, self.receiver, self.path = link, receiver, path
        self.unsent = b"\0" + len(message).to_bytes(4, "big") + message
        self.connection: Connection | None = None
        self.stream, self.window = 0, 0
        self.received = b""
        self.over = False

    def cancel(self) -> None:
        """End the call from our side; the receiver gets no more messages."""
        if not self.over:
            self.over = True
            if self.connection is not None:
                self.connection.reset(self)

    def end(self, status: int, details: str) -> None:
        if not self.over:
            self.over = True
            self.receiver.finished(status, details)


class Connection(asyncio.Protocol):
    """One HTTP/2 connection. It passes messages on while it parses."""

    def __init__(self, authority: str) -> None:
        self.authority = authority
        self.transport: Any = None
        self.calls: dict[int, Call] = {}
        self.waiting: deque[Call] = deque()
        self.next_stream, self.usable = 1, True
        self.window, self.stream_window, self.frame_bytes, self.most_calls = (
            DEFAULT_WINDOW,
            DEFAULT_WINDOW,
            16_384,
            1 << 31,
        )
        self.encoder, self.decoder = hpack.Encoder(), hpack.Decoder()
        self.rest = b""
        self.consumed = 0
        self.block: tuple[int, int, bytes] | None = None  # an unfinished header block: stream, flags, its bytes so far

    # --- from the loop ---

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        settings = struct.pack(">HIHI", SETTINGS_ENABLE_PUSH, 0, SETTINGS_INITIAL_WINDOW_SIZE, MOST_WINDOW)
        grown = struct.pack(">I", MOST_WINDOW - DEFAULT_WINDOW)
        transport.write(PREFACE + frame(SETTINGS, 0, 0, settings) + frame(WINDOW_UPDATE, 0, 0, grown))

    def connection_lost(self, error: Exception | None) -> None:
        self.usable = False
        calls, self.calls = self.calls, {}
        for call in [*calls.values(), *self.waiting]:
            call.end(UNAVAILABLE, "the connection to the model server was lost")

    def data_received(self, data: bytes) -> None:
        data = self.rest + data if self.rest else data
        at, end = 0, len(data)
        calls = self.calls
        while end - at >= 9:
            high, low, kind, flags, stream = FRAME.unpack_from(data, at)
            behind = at + 9 + (high << 8 | low)
            if behind > end:
                break
            payload = data[at + 9 : behind]
            at = behind
            if kind == DATA:
                self.consumed += len(payload)
                call = calls.get(stream)
                if call is not None:
                    self._data(call, payload[1 : len(payload) - payload[0]] if flags & PADDED else payload)
                    if flags & END_STREAM:
                        self._finish(call, UNKNOWN, "the call ended without a status")
            else:
                self._other(kind, flags, stream, payload)
        self.rest = data[at:]
        if self.consumed > MOST_WINDOW // 2:
            self.transport.write(frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", self.consumed)))
            self.consumed = 0

    # --- calls ---

    def start(self, call: Call) -> None:
        call.connection = self
        self.waiting.append(call)
        self._start_waiting()

    def _start_waiting(self) -> None:
        while self.waiting and len(self.calls) < self.most_calls:
            call = self.waiting.popleft()
            if call.over:
                continue
            call.stream, call.window = self.next_stream, self.stream_window
            self.next_stream += 2
            self.usable = self.usable and self.next_stream < LAST_STREAM
            self.calls[call.stream] = call
            head = [(":method", "POST"), (":scheme", "http"), (":path", call.path), (":authority", self.authority)]
            head += [("te", "trailers"), ("content-type", "application/grpc")]
            self.transport.write(frame(HEADERS, END_HEADERS, call.stream, self.encoder.encode(head)))
            self._send(call)

    def _send(self, call: Call) -> None:
        """Send what the windows allow; the last byte closes our side."""
        while call.unsent and not call.over:
            size = min(len(call.unsent), call.window, self.window, self.frame_bytes)
            if size <= 0:
                return
            piece, call.unsent = call.unsent[:size], call.unsent[size:]
            call.window -= size
            self.window -= size
            self.transport.write(frame(DATA, 0 if call.unsent else END_STREAM, call.stream, piece))

    def reset(self, call: Call) -> None:
        if self.calls.pop(call.stream, None) is not None:
            self.transport.write(frame(RST_STREAM, 0, call.stream, struct.pack(">I", CANCEL)))
            self._start_waiting()

    def _finish(self, call: Call, status: int, details: str) -> None:
        if self.calls.pop(call.stream, None) is not None:
            call.end(status, details)
            self._start_waiting()

    # --- frames ---

    def _data(self, call: Call, payload: bytes) -> None:
        """gRPC's messages: a byte that says whether the message is compressed (we never allow it), four bytes of
        length, then the message."""
        data = call.received + payload if call.received else payload
        while len(data) >= 5:
            behind = 5 + int.from_bytes(data[1:5], "big")
            if len(data) < behind:
                break
            message, data = data[5:behind], data[behind:]
            call.receiver.message(message)
        call.received = data

    def _other(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == HEADERS:
            payload = payload[1 : len(payload) - payload[0]] if flags & PADDED else payload
            payload = payload[5:] if flags & PRIORITY else payload
            self._headers(stream, flags, payload)
        elif kind == CONTINUATION and self.block is not None:
            self._headers(self.block[0], self.block[1] | flags, self.block[2] + payload)
        elif kind == RST_STREAM:
            if call := self.calls.get(stream):
                self._finish(call, UNAVAILABLE, f"the model server reset the call ({int.from_bytes(payload, 'big')})")
        elif kind == SETTINGS and not flags & ACK:
            self._settings(payload)
        elif kind == PING and not flags & ACK:
            self.transport.write(frame(PING, ACK, 0, payload))
        elif kind == WINDOW_UPDATE:
            grown = int.from_bytes(payload, "big") & MOST_WINDOW
            if stream == 0:
                self.window += grown
                for call in list(self.calls.values()):
                    self._send(call)
            elif call := self.calls.get(stream):
                call.window += grown
                self._send(call)
        elif kind == GOAWAY:
            self.usable = False

    def _headers(self, stream: int, flags: int, block: bytes) -> None:
        if not flags & END_HEADERS:
            self.block = (stream, flags, block)
            return
        self.block = None
        # always decoded, because the next block depends on it
        fields: dict[Any, Any] = dict(self.decoder.decode(block))
        call = self.calls.get(stream)
        if call is not None and flags & END_STREAM:
            status = str(fields.get("grpc-status", UNKNOWN))
            details = urllib.parse.unquote(str(fields.get("grpc-message", f"HTTP status {fields.get(':status')}")))
            self._finish(call, int(status) if status.isdigit() else UNKNOWN, details)

    def _settings(self, payload: bytes) -> None:
        for name, value in struct.iter_unpack(">HI", payload):
            if name == SETTINGS_INITIAL_WINDOW_SIZE:
                for call in self.calls.values():
                    call.window += value - self.stream_window
                self.stream_window = value
            elif name == SETTINGS_MAX_FRAME_SIZE:
                self.frame_bytes = value
            elif name == SETTINGS_MAX_CONCURRENT_STREAMS:
                self.most_calls = value
        self.transport.write(frame(SETTINGS, ACK, 0))
        for call in list(self.calls.values()):
            self._send(call)
        self._start_waiting()


class Link:
    """Calls to one address, on one connection, which is opened when it is needed and opened again after it was lost."""

    def __init__(self, address: str) -> None:
        """address: host:port, an IPv6 host in brackets."""
        self.address = address
        host, _, port = address.rpartition(":")
        self.host, self.port = host.strip("[]"), int(port)
        self.connection: Connection | None = None
        self.opening: asyncio.Task[None] | None = None
        self.waiting: list[Call] = []

    def call(self, path: str, message: bytes, receiver: Receiver) -> Call:
        """Start a call. `receiver` gets everything, also the failure to connect."""
        call = Call(self, receiver, path, message)
        if self.connection is not None and self.connection.usable:
            self.connection.start(call)
        else:
            self.waiting.append(call)
            if self.opening is None:
                self.opening = asyncio.ensure_future(self._open())
        return call

    async def _open(self) -> None:
        failure = ""
        try:
            opened = asyncio.get_running_loop().create_connection(
                lambda: Connection(self.address), self.host, self.port
            )
            _, self.connection = await asyncio.wait_for(opened, CONNECT_SECONDS)
        except (OSError, asyncio.TimeoutError) as error:
            failure = f"no connection to {self.address}: {error or 'it took too long'}"
        self.opening = None
        waiting, self.waiting = self.waiting, []
        for call in waiting:
            if failure or self.connection is None:
                call.end(UNAVAILABLE, failure)
            elif not call.over:
                self.connection.start(call)

    def close(self) -> None:
        if self.opening is not None:
            self.opening.cancel()
        if self.connection is not None and self.connection.transport is not None:
            self.connection.transport.close()
