"""Strangers attack the endpoint of a real server with two workers: each class of attack once,
while another client is served."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from project import copy_of_project
from server import Pid, Served, alive, end_tree_of, processes_below, serve
from waiting import until

STRANGER = "127.0.0.2"
# computes for half a minute, takes gigabytes, loops: when a message says so
TEMPLATE = (
    "{% set said = messages[0]['content'] %}"
    "{% if said == 'power' %}{{ said | length ** 400000000 }}{% elif said == 'repeat' %}{{ said * 3000000000 }}"
    "{% elif said == 'loop' %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}{% endif %}"
    "{{ said }}"
)
LONG = {"prompt": "Once upon a time", "max_tokens": 400, "min_tokens": 400, "temperature": 1, "stream": True}


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Two slots, two workers, and a chat template from a stranger."""
    tree = copy_of_project(tmp_path_factory.mktemp("door") / "tree")
    (tree / "hostile.jinja").write_text(TEMPLATE)
    running = serve(tree, "TP=1", "MAX_BATCH_SIZE=2", "OPENAI_WORKERS=2", "CHAT_TEMPLATE=hostile.jinja")
    try:
        yield running
        assert running.end() == 0, "".join(running.lines)
        assert "Traceback" not in log_of(running)
    finally:
        end_tree_of(running.process)


def log_of(server: Served) -> str:
    return next(server.tree.glob("build/*/*/serve.log")).read_text()


def ask(
    server: Served, path: str, body: object = None, source: str = "127.0.0.1", seconds: float = 60
) -> tuple[int, dict[str, str], bytes]:
    """One request from an address."""
    link = http.client.HTTPConnection("127.0.0.1", server.openai_port, timeout=seconds, source_address=(source, 0))
    data = body if isinstance(body, bytes) or body is None else json.dumps(body)
    link.request("POST" if body is not None else "GET", path, data, {"Content-Type": "application/json"})
    answer = link.getresponse()
    said = answer.status, dict(answer.headers), answer.read()
    link.close()
    return said


def complete(server: Served, source: str = "127.0.0.1", **more: Any) -> tuple[int, dict[str, str], bytes]:
    body = {"model": "stories", "prompt": "Once upon a time", "max_tokens": 4, "temperature": 0, **more}
    return ask(server, "/v1/completions", body, source)


def connected(server: Served, data: bytes, source: str = STRANGER) -> socket.socket:
    link = socket.socket()
    link.settimeout(60)
    link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    link.bind((source, 0))
    link.connect(("127.0.0.1", server.openai_port))
    link.sendall(data)
    return link


def request(body: object, path: str = "/v1/completions") -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode() + data


@contextmanager
def others_served(server: Served) -> Iterator[None]:
    """Another client is answered all the while."""
    over = threading.Event()
    statuses: list[int] = []

    def other() -> None:
        while not over.is_set():
            statuses.append(complete(server)[0])
            over.wait(0.1)

    thread = threading.Thread(target=other)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    assert statuses and set(statuses) == {200}


def family(server: Served) -> dict[Pid, int]:
    """The endpoint's processes: pid -> its parent."""
    found = {}
    for pid in processes_below(server.process.pid):
        try:
            if b"scripts.openai" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
                found[pid] = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    return found


def listening(pid: int, port: int) -> bool:
    """Whether a process holds the port."""
    rows = [row.split() for row in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    inodes = {f"socket:[{row[9]}]" for row in rows if row[1].endswith(f":{port:04X}") and row[3] == "0A"}
    try:
        return any(os.readlink(file) in inodes for file in Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return False


def workers(server: Served) -> list[int]:
    """Those of its processes that listen, without their parent."""
    found = family(server)
    return sorted(pid for pid, parent in found.items() if parent in found and listening(pid, server.openai_port))


def test_both_workers_answer_and_one_that_dies_is_replaced(door: Served) -> None:
    before = workers(door)
    assert len(before) == 2
    held = [connected(door, request({"model": "stories", **LONG, "n": 4}), "127.0.0.1") for _ in range(2)]
    until(lambda: door.active > 0)
    os.kill(before[0], signal.SIGKILL)
    until(lambda: len(workers(door)) == 2 and before[0] not in workers(door))
    for link in held:
        link.close()
    assert all(complete(door, "127.0.0.3")[0] == 200 for _ in range(8)), "connections go to both"
    # what the dead worker had counted as its clients' places is free again
    until(lambda: complete(door, n=18, max_tokens=1)[0] == 200)
    assert re.search(r"worker \d \(pid \d+\) ended with status -9; another takes its place", log_of(door))


@pytest.mark.parametrize("said", ["power", "repeat", "loop"])
def test_a_hostile_template_keeps_nobody_waiting(door: Served, said: str) -> None:
    body = {"model": "stories", "messages": [{"role": "user", "content": said}], "max_tokens": 1}
    with others_served(door):
        status, _, answer = ask(door, "/v1/chat/completions", body, STRANGER)
    assert status == 400 and json.loads(answer)["error"]["type"] == "invalid_request_error", answer
    body["messages"] = [{"role": "user", "content": "Once"}]
    assert ask(door, "/v1/chat/completions", body, STRANGER)[0] == 200


def test_a_client_that_takes_all_its_places_leaves_the_others_theirs(door: Served) -> None:
    held = [connected(door, request({"model": "stories", **LONG, "n": 9})) for _ in range(2)]
    for link in held:  # counted, or the next request would be in the line before them
        assert link.recv(12) == b"HTTP/1.1 200"
    began = time.monotonic()
    status, headers, body = complete(door, STRANGER)
    assert (status, headers["retry-after"], json.loads(body)["error"]["code"]) == (429, "1", "rate_limit_exceeded")
    assert time.monotonic() - began < 10, "it is told at once, not when there is room"
    assert complete(door)[0] == 200, "behind one of its answers, not behind all"
    assert door.active > 0
    for link in held:
        link.close()
    until(lambda: door.active == 0)


def test_bodies_without_end_leave_others_room(door: Served) -> None:
    size = (256 << 10) - 10
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {size}\r\n\r\n"
    )
    with others_served(door):
        links = []
        for _ in range(100):
            try:
                links.append(connected(door, head.encode() + b"{" + b" " * (size - 2)))
            except ConnectionError:  # refused while it was being sent
                continue
        answers = []
        for link in links:
            try:
                answers.append(link.recv(12))
            except ConnectionError:
                answers.append(b"")
            link.close()
    assert answers.count(b"HTTP/1.1 429") + answers.count(b"") > 0, "more than its share was not taken"
    assert answers.count(b"HTTP/1.1 408") > 0, "and what was taken has an end"


def test_a_flood_of_what_is_no_http_is_not_a_flood_in_the_log(door: Served) -> None:
    before = log_of(door).count("\n")
    for _ in range(500):
        link = connected(door, b"FOO BAR\r\n\r\n")
        assert link.recv(12) == b"HTTP/1.1 400"
        link.close()
    assert log_of(door).count("\n") - before < 50
    assert complete(door)[0] == 200


def test_large_bodies_of_mistakes_are_cheap(door: Served) -> None:
    keys = ",".join(f'"{n:x}":1' for n in range(20_000))
    bodies = [
        f'{{"model":"stories","prompt":"x",{keys}}}',
        f'{{"model":"stories","prompt":"x","logit_bias":{{{keys}}}}}',
    ]
    with others_served(door):
        for body in bodies:
            for _ in range(10):
                status, _, answer = ask(door, "/v1/completions", body.encode(), STRANGER)
                assert status == 400 and len(answer) < 500


def test_a_parent_that_does_not_run_ends_the_server(tmp_path: Path) -> None:
    """Busy is not dead; stopped is."""
    running = serve(copy_of_project(tmp_path / "tree"), "TP=1")
    try:
        found = family(running)
        [parent] = [pid for pid, above in found.items() if above not in found]
        os.kill(parent, signal.SIGSTOP)
        assert running.process.wait(60) != 0
        running.reader.join(5)
        said = "".join(running.lines)
        assert "THE OPENAI ENDPOINT FAILED WHILE SERVING" in said and "has not run for 8 s" in said
        until(lambda: not any(alive(pid) for pid in found))
    finally:
        end_tree_of(running.process)
