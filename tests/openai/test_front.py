"""The bounds of a connection, with uvicorn's own server and real sockets;
bounds in seconds are shortened to keep the tests short."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn
import uvloop
from waiting import until

from scripts.openai import front, shares
from scripts.openai.front import Front, Fronts

STRANGER = "127.0.0.2"
SEEN: list[int] = []


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Reads the whole body; /much answers without end."""
    if scope["type"] != "http":
        return
    own = Front.fronts.by_name[tuple(scope["client"])]
    more, size = scope["method"] == "POST", 0
    if not more:
        own.body_came(0, False)
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        more = message["more_body"]
        size += len(message["body"])
        own.body_came(len(message["body"]), more)
    SEEN.append(size)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    while scope["path"] == "/much" and own in Front.fronts.open:
        await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
    await send({"type": "http.response.body", "body": b"whole"})
    own.answered()


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A server with room for eight connections, four of one address."""
    monkeypatch.setattr(front, "HEAD_SECONDS", 1.0)
    monkeypatch.setattr(front, "UNREAD_SECONDS", 1.0)
    monkeypatch.setattr(front, "LOOK_SECONDS", 0.1)
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, http=Front, loop="uvloop", ws="none", lifespan="off", log_config=None)
    server = uvicorn.Server(config)
    started = threading.Event()

    async def run() -> None:
        Front.fronts = Fronts(8)
        watching = asyncio.ensure_future(Front.fronts.watch())
        asyncio.get_running_loop().call_later(0.1, started.set)
        await server.serve(sockets=[listener])
        watching.cancel()

    thread = threading.Thread(target=lambda: uvloop.run(run()))
    thread.start()
    assert started.wait(10)
    yield listener.getsockname()[1]
    server.should_exit = True
    thread.join(10)


def connected(port: int, data: bytes = b"", source: str = "127.0.0.1", receive_buffer: int = 0) -> socket.socket:
    link = socket.socket()
    link.settimeout(20)
    if receive_buffer:
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    link.bind((source, 0))
    link.connect(("127.0.0.1", port))
    link.sendall(data)
    return link


def everything(link: socket.socket) -> bytes:
    """What comes until the other side closes; raises if it does not."""
    said = b""
    try:
        while piece := link.recv(65536):
            said += piece
    except ConnectionError:
        pass
    link.close()
    return said


GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
CHUNKED = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize("begun", [b"", b"\r\n", b"GET / HTTP/1.1\r\nHost:", GET + b"\r\n"], ids=repr)
def test_a_head_that_does_not_come_closes(port: int, begun: bytes) -> None:
    said = everything(connected(port, begun))
    assert said.count(b"HTTP/1.1") == begun.count(b"Host: x")


def test_a_large_head_is_refused(port: int) -> None:
    said = everything(connected(port, b"GET / HTTP/1.1\r\n" + b"X: " + b"a" * 70_000))
    assert said.startswith(b"HTTP/1.1 431") and b"invalid_request_error" in said


def test_what_follows_a_body_is_bounded(port: int) -> None:
    """Trailers were kept without end: 40 MB of them ended the server."""
    link = connected(port, CHUNKED + b"2\r\n{}\r\n0\r\n")
    with pytest.raises(ConnectionError):
        for _ in range(1000):
            link.sendall(b"a: b\r\n" * 10_000)
    until(lambda: not Front.fronts.open)


def test_a_body_in_tiny_chunks_is_a_body(port: int) -> None:
    SEEN.clear()
    link = connected(port, CHUNKED + b"1\r\nx\r\n" * 3000 + b"0\r\n\r\n")
    while b"whole" not in link.recv(65536):
        pass
    assert SEEN == [3000]
    link.close()


def test_requests_ahead_close(port: int) -> None:
    assert everything(connected(port, GET * 5000)).count(b" 200 ") <= 1


def test_one_request_after_another_is_answered(port: int) -> None:
    link = connected(port)
    for _ in range(3):
        link.sendall(CHUNKED + b"2\r\n{}\r\n0\r\n\r\n")
        said = b""
        while b"whole\r\n0\r\n\r\n" not in said:
            said += link.recv(65536)
    link.close()


def test_an_answer_that_is_not_read_is_let_go(port: int) -> None:
    link = connected(port, GET.replace(b"/ ", b"/much "), receive_buffer=2048)
    until(lambda: len(Front.fronts.open) == 1)
    until(lambda: not Front.fronts.open)
    link.close()


def test_an_answer_that_is_read_slowly_is_not(port: int) -> None:
    link, pause = connected(port, GET.replace(b"/ ", b"/much ")), threading.Event()
    until(lambda: any(one.unread for one in list(Front.fronts.open)))  # more than the kernel keeps for both sides
    until_at = time.monotonic() + 3 * front.UNREAD_SECONDS
    while time.monotonic() < until_at:
        assert link.recv(1 << 18)
        pause.wait(0.05)
    assert Front.fronts.open
    link.close()
    until(lambda: not Front.fronts.open)


def test_one_address_has_a_share_of_the_connections(port: int) -> None:
    held = [connected(port, b"GET", STRANGER) for _ in range(4)]
    said = everything(connected(port, GET, STRANGER))
    if said:  # else the connection was reset before it was read
        head, _, body = said.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 429") and b"retry-after: 1" in head
        assert json.loads(body)["error"]["type"] == "rate_limit_error"
    honest = connected(port, GET)
    assert honest.recv(100).startswith(b"HTTP/1.1 200")
    for link in [*held, honest]:
        link.close()
    until(lambda: not Front.fronts.open and not Front.fronts.by_client and not Front.fronts.by_name)


def test_ipv6_customers_are_networks() -> None:
    pairs: list[tuple[str, str]] = [
        ("2001:db8::1", "2001:db8::/64"),
        ("::ffff:10.0.0.1", "10.0.0.1"),
        ("10.0.0.1", "10.0.0.1"),
    ]
    assert [shares.client_of(address) for address, _ in pairs] == [client for _, client in pairs]
