"""How a server ends: it announces the end, serves on, lets answers finish, and tells the ones that it cuts off;
also behind HAProxy."""

from __future__ import annotations

import http.client
import http.server
import json
import os
import shutil
import signal
import ssl
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from project import ROOT, copy_of_project
from server import Served, end_tree_of, free_ports, serve
from waiting import until

HAPROXY = shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin:/sbin")
needs_haproxy = pytest.mark.skipif(HAPROXY is None, reason="haproxy is not installed: apt-get install haproxy")
ROOMS = ("TP=1", "MAX_BATCH_SIZE=4")
CONFIG = ROOT / "docker" / "haproxy.cfg"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree whose rooms are made once: one rank, two slots."""
    tree = copy_of_project(tmp_path_factory.mktemp("ending") / "tree")
    command = ["make", f"PYTHON={sys.executable}", "model_repo", *ROOMS]
    subprocess.run(command, cwd=tree, check=True, capture_output=True)
    return tree


def begin(tree: Path, *words: str, wait: bool = True) -> Served:
    return serve(tree, *ROOMS, *words, wait=wait)


def health(server: Served, path: str = "/health") -> tuple[int, dict[str, Any]]:
    try:
        with urllib.request.urlopen(server.openai + path, timeout=20) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def asked(port: int, tokens: int, stream: bool, n: int = 1) -> http.client.HTTPResponse:
    link = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    body = {
        "model": "stories",
        "prompt": "Once upon a time",
        "max_tokens": tokens,
        "min_tokens": tokens,
        "temperature": 0,
        "stream": stream,
        "n": n,
    }
    link.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    return link.getresponse()


def test_a_lame_duck_says_so_and_serves_on(small: Path) -> None:
    server = begin(small, "LAME_DUCK_SECONDS=600")
    try:
        assert health(server)[0] == 200
        os.kill(server.supervisor, signal.SIGTERM)
        until(lambda: health(server)[0] == 503)
        assert health(server)[1]["error"]["code"] == "ending" and health(server, "/health/live")[0] == 200
        answer = asked(server.openai_port, 8, stream=False)
        assert (answer.status, answer.headers["connection"]) == (200, "close")
        assert json.loads(answer.read())["usage"]["completion_tokens"] == 8
        assert server.post("ensemble", text_input="Once", max_tokens=1)["status"] == 200, "Triton serves on too"
    finally:
        end_tree_of(server.process)


def test_many_workers_end_without_waiting(small: Path) -> None:
    server = begin(small, "OPENAI_WORKERS=8")
    try:
        assert asked(server.openai_port, 8, stream=False).status == 200
        assert server.end() == 0
        said = "".join(server.lines)
        assert "ended" in said and "cut off" not in said
    finally:
        end_tree_of(server.process)


def test_what_must_be_cut_off_is_told_so(small: Path) -> None:
    """Answers in one piece and streamed, which take much longer than the second that they have."""
    server = begin(small, "DRAIN_SECONDS=1", "METRICS=off")
    statuses: list[tuple[int, bytes]] = []
    try:
        assert health(server, "/metrics")[0] == 404
        streamed = asked(server.openai_port, 400, stream=True, n=16)
        first = streamed.readline()

        def whole() -> None:
            answer = asked(server.openai_port, 400, stream=False, n=16)
            statuses.append((answer.status, answer.read()))

        thread = threading.Thread(target=whole)
        thread.start()
        until(lambda: health(server)[1].get("requests") == 32)
        os.kill(server.supervisor, signal.SIGTERM)
        said = first + streamed.read()
        thread.join(20)
        events = [json.loads(line[6:]) for line in said.decode().splitlines() if line.startswith("data: {")]
        assert "choices" in events[0] and events[-1]["error"]["code"] == "server_ending"
        assert b"[DONE]" not in said
        [(status, body)] = statuses
        assert (status, json.loads(body)["error"]["code"]) == (503, "server_ending")
        assert server.process.wait(40) == 0
    finally:
        end_tree_of(server.process)


# --- behind HAProxy ---


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A certificate for localhost, with its key in one file, as HAProxy reads it."""
    key, own = tmp_path / "key.pem", tmp_path / "own.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost", "-keyout", key, "-out", own,
         "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"], check=True, capture_output=True,
    )  # fmt: skip
    both = tmp_path / "certificate.pem"
    both.write_bytes(own.read_bytes() + key.read_bytes())
    return both


class Proxy:
    """HAProxy with the configuration of docker/, its addresses replaced."""

    def __init__(self, folder: Path, certificate: Path, ports: list[int]) -> None:
        assert HAPROXY is not None
        self.port, self.state = free_ports(2)
        text = CONFIG.read_text().replace("/etc/haproxy/certificate.pem", str(certificate))
        for before, after in (
            ("bind :443", f"bind 127.0.0.1:{self.port}"),
            ("bind 127.0.0.1:8404", f"bind 127.0.0.1:{self.state}"),
            ("10.0.0.1:9000", f"127.0.0.1:{ports[0]}"),
            ("10.0.0.2:9000", f"127.0.0.1:{ports[1]}"),
        ):
            assert before in text, before
            text = text.replace(before, after)
        file = folder / "haproxy.cfg"
        file.write_text(text)
        checked = subprocess.run([HAPROXY, "-c", "-f", file], capture_output=True, text=True, check=False)
        assert checked.returncode == 0 and "WARNING" not in checked.stderr, checked.stderr
        self.process = subprocess.Popen(
            [HAPROXY, "-db", "-f", file], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self.tls = ssl.create_default_context(cafile=str(certificate))

    def state_of(self, server: str) -> str:
        """UP, DOWN, ..."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.state}/;csv", timeout=10) as answer:
                rows = [row.split(",") for row in answer.read().decode().splitlines()]
        except OSError:
            return ""
        return next((row[rows[0].index("status")] for row in rows if row[:2] == ["bake", server]), "")

    def link(self) -> http.client.HTTPSConnection:
        return http.client.HTTPSConnection("localhost", self.port, timeout=60, context=self.tls)


@pytest.fixture
def two(small: Path) -> Iterator[list[Served]]:
    servers = [begin(small, "LAME_DUCK_SECONDS=5", wait=False) for _ in range(2)]
    for server in servers:
        assert server.ready.wait(120) and server.process.poll() is None, "".join(server.lines)
    yield servers
    for server in servers:
        end_tree_of(server.process)


def again(server: Served) -> Served:
    """The same server on the same ports."""
    command: Any = server.process.args
    process = subprocess.Popen(
        command, cwd=server.tree, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    fresh = Served(server.tree, process, server.http_port, server.grpc_port, server.metrics_port, server.openai_port)
    fresh.reader = threading.Thread(target=fresh._read, daemon=True)
    fresh.reader.start()
    assert fresh.ready.wait(120)
    return fresh


@needs_haproxy
def test_a_rolling_restart_under_load_loses_nothing(two: list[Served], tmp_path: Path, certificate: Path) -> None:
    """Every answer over TLS is whole, streamed or not, while both servers are replaced, one after the other."""
    proxy = Proxy(tmp_path, certificate, [server.openai_port for server in two])
    over = threading.Event()
    wrong: list[str] = []
    right = [0, 0]

    def load(number: int) -> None:
        link, stream = proxy.link(), number % 2 == 0
        while not over.wait(0.2):  # a load, not a flood: servers have to start beside it
            body = {
                "model": "stories",
                "prompt": "Once",
                "max_tokens": 24,
                "min_tokens": 24,
                "temperature": 0,
                "stream": stream,
            }
            try:
                link.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
                answer = link.getresponse()
                said = answer.read()
                whole = said.endswith(b"data: [DONE]\n\n") if stream else b'"completion_tokens": 24' in said
                if answer.status == 200 and whole:
                    right[number] += 1
                else:
                    wrong.append(f"{answer.status} {said[-300:]!r}")
            except (OSError, http.client.HTTPException) as error:
                wrong.append(repr(error))
                link.close()
            over.wait(0.1)  # clients that think leave the processor to the servers that begin
        link.close()

    try:
        until(lambda: proxy.state_of("one") == proxy.state_of("two") == "UP")
        clients = [threading.Thread(target=load, args=(number,)) for number in range(2)]
        for client in clients:
            client.start()
        for index, name in enumerate(("one", "two")):
            before = sum(right)
            until(lambda before=before: sum(right) > before + 4)  # type: ignore[misc]
            os.kill(two[index].supervisor, signal.SIGTERM)
            until(lambda name=name: proxy.state_of(name) != "UP")  # type: ignore[misc]
            assert two[index].process.wait(60) == 0
            two[index] = again(two[index])
            until(lambda name=name: proxy.state_of(name) == "UP")  # type: ignore[misc]
        before = sum(right)
        until(lambda: sum(right) > before + 4)
    finally:
        over.set()
        for client in clients:
            client.join(60)
        proxy.process.terminate()
        proxy.process.wait(20)
    assert wrong == [] and min(right) > 3


@needs_haproxy
def test_a_stream_through_the_proxy_comes_as_it_is_made(tmp_path: Path, certificate: Path) -> None:
    """The server makes its second event when the client has read the first,
    so a proxy that collects would deliver neither."""
    read_first = threading.Event()

    class Answer(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b'f\r\ndata: {"n":1}\n\n\r\n')
            seen = read_first.wait(30)
            self.wfile.write(b'f\r\ndata: {"n":%d}\n\n\r\n0\r\n\r\n' % (2 if seen else 0))

        def log_message(self, *words: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        proxy = Proxy(tmp_path, certificate, [server.server_port, server.server_port])
        try:
            until(lambda: proxy.state_of("one") == "UP")
            link = proxy.link()
            link.request("POST", "/v1/completions", b"{}", {"Content-Type": "application/json"})
            answer = link.getresponse()
            assert answer.readline() == b'data: {"n":1}\n'
            read_first.set()
            assert answer.read() == b'\ndata: {"n":2}\n\n'
            link.request("GET", "/metrics")
            assert link.getresponse().status == 404, "metrics are not for clients"
        finally:
            read_first.set()
            proxy.process.terminate()
            proxy.process.wait(20)
            server.shutdown()
