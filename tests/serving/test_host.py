"""A server on ordinary machines: proxies in the environment, IPv6, two starts at once,
helpers that the kernel kills."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from project import make
from server import Pid, alive, end_tree_of, free_ports, processes_below, serve
from waiting import until

from scripts import reports
from scripts import serve as serve_script
from scripts.serving import host
from scripts.serving.launch import Operating, Settings, mpirun_command, reached_at
from scripts.serving.toolbox import Toolbox


@dataclass
class Proxy:
    """A proxy that refuses everything: its URL, and every request line that it saw."""

    url: str
    seen: list[str]


def settings_on(ports: list[int], address: str = "127.0.0.1") -> Settings:
    http, grpc, metrics = ports
    return Settings(Path("."), address, http, grpc, metrics)


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    seen: list[str] = []

    class Refuses(BaseHTTPRequestHandler):
        def handle_one_request(self) -> None:
            seen.append(self.rfile.readline(1000).decode(errors="replace"))
            self.wfile.write(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")
            self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Refuses)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield Proxy(f"http://127.0.0.1:{server.server_address[1]}", seen)
    server.shutdown()
    server.server_close()


def test_no_call_of_ours_to_loopback_uses_a_proxy(tree: Path, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "grpc_proxy", "all_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, proxy.url)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    running = serve(tree, "TP=1", "HOST=::1")
    try:
        ports = [f"HTTP_PORT={running.http_port}", f"GRPC_PORT={running.grpc_port}"]
        asked = make(tree, "ask", "HOST=::1", *ports, "PROMPT=Once upon a time", "MAX_TOKENS=3")
        assert asked.returncode == 0 and asked.stdout.startswith(", in a"), asked.stdout + asked.stderr
        body = json.dumps(
            {"model": "stories", "prompt": "Once upon a time", "max_tokens": 3, "temperature": 0}
        ).encode()
        url = f"http://[::1]:{running.openai_port}/v1/completions"
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as answer:
            assert json.loads(answer.read())["choices"][0]["text"] == ", in a"
    finally:
        assert running.end() == 0
    assert proxy.seen == []


def test_one_of_two_servers_that_start_at_once_serves_and_the_other_names_the_port(tree: Path) -> None:
    made = make(tree, "model_repo", "TP=1")
    assert made.returncode == 0, made.stderr
    http, grpc, metrics, endpoint = free_ports(4)
    ports = [f"HTTP_PORT={http}", f"GRPC_PORT={grpc}", f"METRICS_PORT={metrics}", f"OPENAI_PORT={endpoint}"]
    command = ["make", f"PYTHON={sys.executable}", "serve", "TP=1", *ports]
    both = [
        subprocess.Popen(
            command, cwd=tree, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        for _ in range(2)
    ]
    try:
        deadline = time.monotonic() + 120
        while all(one.poll() is None for one in both):
            assert time.monotonic() < deadline, "both are still there"
            time.sleep(0.1)
        [loser] = [one for one in both if one.poll() is not None]
        [winner] = [one for one in both if one is not loser]
        said = loser.communicate(timeout=60)[0]
        assert loser.returncode and f"PORT {http} CANNOT BE USED" in said and "Traceback" not in said
        assert winner.stdout is not None
        assert any("ready after" in line for line in winner.stdout)
    finally:
        for one in both:
            end_tree_of(one)
            one.communicate()


def test_a_claimed_port_is_a_report_and_is_free_again_after_the_server() -> None:
    settings = settings_on(free_ports(3))
    claims = host.reserve_ports(settings)
    with pytest.raises(reports.Problem, match=f"port {settings.http_port} cannot be used"):
        host.reserve_ports(settings)
    for claim in claims:
        claim.close()
    for claim in host.reserve_ports(settings):
        claim.close()


def test_a_guard_that_was_killed_is_there_again_and_does_its_work(tree: Path) -> None:
    """The kernel kills small processes too when memory runs out."""
    running = serve(tree, "TP=1")

    def guards() -> list[Pid]:
        found: list[Pid] = []
        for pid in processes_below(running.process.pid):
            try:
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            found += [pid] if b"scripts.serving.processes" in words else []
        return found

    family = processes_below(running.process.pid)
    try:
        [guard] = guards()
        os.kill(guard, signal.SIGKILL)
        until(lambda: len(guards()) == 1 and guards() != [guard], "a new guard")
        family.update(processes_below(running.process.pid))
        os.kill(running.supervisor, signal.SIGKILL)
        ours = [pid for pid in family if pid not in (running.process.pid, running.supervisor)]
        until(lambda: not [pid for pid in ours if alive(pid)], "the end of all ranks")
    finally:
        end_tree_of(running.process)


def test_an_ipv6_address_is_written_as_each_server_reads_it() -> None:
    settings = Settings(Path("."), "::1", 8000, 8001, 8002)
    command = mpirun_command(1, Toolbox(Path("tritonserver"), None, []), settings)
    assert "--grpc-address=[::1]" in command
    assert "--http-address=ipv6:::1" in command and "--metrics-address=ipv6:::1" in command
    assert [reached_at(name) for name in ("0.0.0.0", "::", "::1", "10.1.2.3")] == [
        "127.0.0.1",
        "[::1]",
        "[::1]",
        "10.1.2.3",
    ]


@pytest.mark.parametrize(("openai_host", "name"), [("192.0.2.1", "OPENAI_HOST"), ("", "HOST")])
def test_an_address_of_another_machine_is_a_report_that_changes_the_right_setting(openai_host: str, name: str) -> None:
    asked = replace(
        settings_on(free_ports(3), "127.0.0.1" if openai_host else "192.0.2.1"),
        openai_port=free_ports(1)[0], operating=Operating(openai_host),
    )  # fmt: skip
    with pytest.raises(reports.Problem) as told:
        host.check_ports(asked)
    assert f"{name} is '192.0.2.1'" in told.value.seen and told.value.command.endswith(f" {name}=127.0.0.1")


def test_a_claim_is_on_address_and_port() -> None:
    """Two servers on two addresses of this machine may have the same port."""
    ports = free_ports(3)
    claims = [host.reserve_ports(settings_on(ports, address)) for address in ("127.0.0.1", "127.0.0.2")]
    assert len({claim.getsockname() for one in claims for claim in one}) == 6
    for one in claims:
        for claim in one:
            assert claim.family == socket.AF_UNIX
            claim.close()


def test_a_name_becomes_an_address_that_tritons_http_server_knows() -> None:
    """Given a name it listens on 255.255.255.255, says nothing, and is never ready."""
    assert serve_script.address_of("localhost") in ("127.0.0.1", "::1")
    assert [serve_script.address_of(host) for host in ("127.0.0.2", "::1", "0.0.0.0")] == [
        "127.0.0.2",
        "::1",
        "0.0.0.0",
    ]
    assert serve_script.address_of("no.such.name.invalid") == "no.such.name.invalid"
