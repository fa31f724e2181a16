"""A running `make serve`, and the processes below it."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from project import start


def free_ports(count: int) -> list[int]:
    """Ports on which no process listens now. They are below those that the system gives to clients (32768), and each
    worker of pytest-xdist has its own, so that no other takes them before the server does."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
    first = 12000 + 2000 * (worker % 8)
    ports: list[int] = []
    while len(ports) < count:
        port = first + random.SystemRandom().randrange(2000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        if port not in ports:
            ports.append(port)
    return ports


@dataclass
class Served:
    """A running `make serve`."""

    tree: Path
    process: subprocess.Popen[str]
    http_port: int
    grpc_port: int
    metrics_port: int
    openai_port: int
    lines: list[str] = field(default_factory=list)
    ready: threading.Event = field(default_factory=threading.Event)
    reader: threading.Thread = field(default_factory=threading.Thread)

    @property
    def http(self) -> str:
        return f"http://127.0.0.1:{self.http_port}"

    @property
    def grpc(self) -> str:
        return f"127.0.0.1:{self.grpc_port}"

    @property
    def openai(self) -> str:
        return f"http://127.0.0.1:{self.openai_port}"

    @property
    def supervisor(self) -> int:
        """Process id of scripts.serve: make's child, or make itself when the shell replaced it."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(children[0]) if children else self.process.pid

    def post(self, model: str, how: str = "generate", **body: Any) -> dict[str, Any]:
        """One request over HTTP; the answer's JSON with its status added as `status`."""
        request = urllib.request.Request(f"{self.http}/v2/models/{model}/{how}", data=json.dumps(body).encode())
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return {**json.loads(answer.read()), "status": answer.status}
        except urllib.error.HTTPError as error:
            return {**json.loads(error.read()), "status": error.code}

    def stream(self, model: str, **body: Any) -> list[dict[str, Any]]:
        """The events of one request over generate_stream."""
        request = urllib.request.Request(
            f"{self.http}/v2/models/{model}/generate_stream", data=json.dumps(body).encode()
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return [json.loads(line[6:]) for line in answer.read().decode().splitlines() if line.startswith("data: ")]

    def metric(self, name: str, **labels: str) -> float:
        """The value of the first metric of that name with these labels; 0 before there is one."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        found = (line for line in lines if line.startswith(name) and all(label in line for label in wanted))
        return float(next(found, "0").rsplit(" ", 1)[-1])

    @property
    def active(self) -> float:
        """How many requests the engine works on."""
        return self.metric("nv_trt_llm_request_metrics", request_type="active")

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if line.strip().startswith("curl "):
                self.ready.set()
        self.ready.set()

    def end(self, number: signal.Signals = signal.SIGTERM, timeout: float = 40) -> int:
        """Ask the supervisor to end, as Ctrl-C or a service manager does; returns make's status."""
        if self.process.poll() is None:
            os.kill(self.supervisor, number)
        return self.process.wait(timeout)


def serve(tree: Path, *words: str, wait: bool = True, environment: Mapping[str, str] | None = None) -> Served:
    """`make serve` on free ports, ready unless told not to wait."""
    http_port, grpc_port, metrics_port, openai_port = free_ports(4)
    ports = [f"HTTP_PORT={http_port}", f"GRPC_PORT={grpc_port}", f"METRICS_PORT={metrics_port}"]
    process = start(tree, "serve", f"OPENAI_PORT={openai_port}", *words, *ports, env=environment)
    served = Served(tree, process, http_port, grpc_port, metrics_port, openai_port)
    served.reader = threading.Thread(target=served._read, daemon=True)
    served.reader.start()
    if wait and (not served.ready.wait(120) or not any("ready after" in line for line in served.lines)):
        end_tree_of(process)
        raise AssertionError("make serve did not become ready:\n" + "".join(served.lines))
    return served


class Pid(int):
    """A process by its number and its beginning (proc(5), in clock ticks): the kernel uses numbers again, in minutes."""

    begun: str


def stat_of(pid: int) -> tuple[str, list[str]]:
    """The name of a process, and what follows it in /proc/PID/stat. Raises OSError if it is gone."""
    stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    return stat[stat.index("(") + 1 : stat.rindex(")")], stat[stat.rindex(")") + 2 :].split()


def alive(pid: Pid) -> bool:
    """Whether this process, and not a later one of its number, still runs."""
    try:
        fields = stat_of(pid)[1]
    except OSError:
        return False
    return fields[0] not in "ZX" and fields[19] == pid.begun


def processes_below(pid: int) -> dict[Pid, str]:
    """Every descendant of a process: pid -> name."""
    found: dict[Pid, str] = {}
    parents: dict[int, list[Pid]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                name, fields = stat_of(int(entry.name))
            except OSError:
                continue
            one = Pid(entry.name)
            one.begun = fields[19]
            if fields[0] != "Z":
                parents.setdefault(int(fields[1]), []).append(one)
                found[one] = name
    below: dict[Pid, str] = {}
    queue = [pid]
    while queue:
        for child in parents.get(queue.pop(), []):
            below[child] = found[child]
            queue.append(child)
    return below


def end_tree_of(process: subprocess.Popen[str]) -> None:
    """Kill a process that a test started, with all it started, unless it has ended."""
    if process.poll() is not None:
        return
    for child in processes_below(process.pid):
        if alive(child):
            os.kill(child, signal.SIGKILL)
    process.kill()
