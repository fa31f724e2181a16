"""Our receiving half of gRPC against grpcio's own server: messages of every size, errors, cancelled calls,
a server that goes away."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from scripts.openai import grpc_link

CANCELLED = threading.Event()


def answers(request: bytes, context: Any) -> Iterator[bytes]:
    """The request's words say what to do: `echo`, `many N`, `fail`, `wait`."""
    word, _, rest = request.partition(b" ")
    if word == b"echo":
        yield rest
    elif word == b"many":
        for n in range(int(rest)):
            yield b"%d" % n * (n % 7)
    elif word == b"fail":
        yield b"one"
        context.abort(grpc.StatusCode.INVALID_ARGUMENT, "100 % wrong: \N{SNOWMAN}")
    elif word == b"wait":
        context.add_callback(CANCELLED.set)
        yield b"here"
        CANCELLED.wait(30)


@pytest.fixture
def server() -> Iterator[tuple[Any, str]]:
    options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    made = grpc.server(ThreadPoolExecutor(40), options=options)
    handler = grpc.stream_stream_rpc_method_handler(lambda requests, context: answers(next(requests), context))
    made.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test", {"Call": handler}),))
    port = made.add_insecure_port("127.0.0.1:0")
    made.start()
    yield made, f"127.0.0.1:{port}"
    made.stop(None)


class Answer:
    """What came for one call."""

    def __init__(self) -> None:
        self.messages: list[bytes] = []
        self.end: tuple[int, str] = (-1, "")
        self.first, self.over = asyncio.Event(), asyncio.Event()

    def message(self, data: bytes) -> None:
        self.messages.append(data)
        self.first.set()

    def finished(self, status: int, details: str) -> None:
        assert not self.over.is_set(), "told once"
        self.end = (status, details)
        self.over.set()


async def ask(link: grpc_link.Link, request: bytes) -> Answer:
    answer = Answer()
    link.call("/test/Call", request, answer)
    await asyncio.wait_for(answer.over.wait(), 30)
    return answer


@pytest.mark.parametrize("size", [0, 1, 16_379, 16_384, 65_535, 70_000, 5_000_000])
def test_messages_of_every_size_go_both_ways(server: tuple[Any, str], size: int) -> None:
    async def run() -> None:
        link = grpc_link.Link(server[1])
        sent = bytes(n % 251 for n in range(1000)) * (size // 1000) + b"x" * (size % 1000)
        answer = await ask(link, b"echo " + sent)
        assert (answer.messages, answer.end) == ([sent], (grpc_link.OK, ""))
        link.close()

    asyncio.run(run())


def test_many_calls_at_once_on_one_connection(server: tuple[Any, str]) -> None:
    async def run() -> None:
        link = grpc_link.Link(server[1])
        expected = [b"%d" % n * (n % 7) for n in range(500)]
        found = await asyncio.gather(*(ask(link, b"many 500") for _ in range(32)))
        assert all(answer.messages == expected and answer.end[0] == grpc_link.OK for answer in found)
        large = await asyncio.gather(*(ask(link, b"echo " + b"y" * 300_000) for _ in range(32)))
        assert all(answer.messages == [b"y" * 300_000] for answer in large)
        link.close()

    asyncio.run(run())


def test_an_error_is_told_with_its_words(server: tuple[Any, str]) -> None:
    async def run() -> None:
        link = grpc_link.Link(server[1])
        answer = await ask(link, b"fail")
        assert (answer.messages, answer.end) == ([b"one"], (3, "100 % wrong: \N{SNOWMAN}"))
        nowhere = Answer()
        link.call("/test/Nothing", b"", nowhere)
        await asyncio.wait_for(nowhere.over.wait(), 30)
        assert nowhere.end[0] == 12  # UNIMPLEMENTED
        link.close()

    asyncio.run(run())


def test_a_cancelled_call_ends_at_the_server_and_says_nothing_more(server: tuple[Any, str]) -> None:
    CANCELLED.clear()

    async def run() -> None:
        link = grpc_link.Link(server[1])
        answer = Answer()
        call = link.call("/test/Call", b"wait", answer)
        await asyncio.wait_for(answer.first.wait(), 30)
        call.cancel()
        assert await asyncio.to_thread(CANCELLED.wait, 30)
        assert (await ask(link, b"echo on")).messages == [b"on"]
        assert answer.end == (-1, "")
        link.close()

    asyncio.run(run())


def test_a_server_that_goes_away_and_comes_back(server: tuple[Any, str]) -> None:
    CANCELLED.clear()

    async def run() -> None:
        link = grpc_link.Link(server[1])
        answer = Answer()
        link.call("/test/Call", b"wait", answer)
        await asyncio.wait_for(answer.first.wait(), 30)
        server[0].stop(None)
        await asyncio.wait_for(answer.over.wait(), 30)
        assert answer.end[0] in (grpc_link.UNAVAILABLE, grpc_link.CANCELLED)
        assert (await ask(link, b"echo x")).end[0] == grpc_link.UNAVAILABLE
        CANCELLED.set()
        again = grpc.server(ThreadPoolExecutor(4))
        handler = grpc.stream_stream_rpc_method_handler(lambda requests, context: answers(next(requests), context))
        again.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test", {"Call": handler}),))
        again.add_insecure_port(server[1])
        again.start()
        try:
            assert (await ask(link, b"echo back")).messages == [b"back"]
        finally:
            again.stop(None)
            link.close()

    asyncio.run(run())
