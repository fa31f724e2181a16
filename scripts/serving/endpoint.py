"""The OpenAI-compatible endpoint as a process that the supervisor starts and watches."""

from __future__ import annotations

import importlib.util
import os
import select
import signal
import subprocess
import sys
import threading
from collections import deque
from pathlib import Path
from typing import Mapping, Sequence

from scripts import room
from scripts.serving import processes
from scripts.serving.launch import Settings
from scripts.serving.output import Output
from scripts.serving.pulse import SILENT_SECONDS, Pulse
from scripts.serving.ranks import LOG_LINES, PROJECT

# Packages of the endpoint that the text models do not need (requirements/openai.txt)
OPENAI_MODULES = (
    "uvicorn",
    "httptools",
    "uvloop",
    "pydantic",
    "jinja2",
    "hpack",
    "tritonclient.grpc",
    "tokenizers",
    "prometheus_client",
)
# and with TRACES=on
TRACING_MODULES = ("requests", "opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto.http.trace_exporter")


class Endpoint:
    """The OpenAI-compatible endpoint: one process and its children,
    in its own session so that signals meant for us do not reach it.

    It says every second, through a pipe, that it lives. The supervisor does not ask its port,
    because clients may keep that busy.
    """

    def __init__(self, settings: Settings, environment: Mapping[str, str], run_dir: Path, log: Output) -> None:
        name = room.read_manifest(settings.root / "model_repo")["arguments"]["name"]
        operating = settings.operating
        command = [
            sys.executable, "-m", "scripts.openai", "--root", str(settings.root.resolve()), "--host", settings.host_of("OPENAI_PORT"),
            "--port", str(settings.openai_port), "--grpc", settings.grpc_address, "--name", name,
            "--api-key-file", settings.api_key_file and os.path.abspath(settings.api_key_file),
            "--drain-seconds", str(operating.drain_seconds), "--parent", str(os.getpid()), "--workers", settings.openai_workers,
            "--folder", str(run_dir), "--metrics", operating.metrics, "--traces", operating.traces, "--log-form", operating.log,
            "--triton-metrics", f"{settings.reached_at}:{settings.metrics_port}",
            "--model-aliases", operating.model_aliases, "--cors-origins", operating.cors_origins,
        ]  # fmt: skip
        self.alive, saying = os.pipe()
        self.process = subprocess.Popen(
            [*command, "--alive", str(saying)], cwd=PROJECT, env=dict(environment), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, start_new_session=True, text=True, errors="replace", pass_fds=[saying],
        )  # fmt: skip
        os.close(saying)
        self.last_lines: deque[str] = deque(maxlen=LOG_LINES)
        self.pulse = Pulse()
        self.reader = threading.Thread(target=self._read, args=(log,), daemon=True)
        self.reader.start()

    def listen(self) -> None:
        """From now on it must send its sign of life."""
        self.pulse.heard()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while True:
            if not select.select([self.alive], [], [], 1.5)[0]:
                self.pulse.missed += 1
            elif os.read(self.alive, 4096):
                self.pulse.heard()
            else:  # its process has ended; the supervisor sees that
                return

    def _read(self, log: Output) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.strip():
                self.last_lines.append(line.rstrip("\n"))
                # a line of LOG=json must stay one line
                log.line(("" if line.startswith("{") else "openai: ") + line.rstrip("\n"))

    def tell_ending(self) -> None:
        """From now on it answers 503 at /health, and goes on serving."""
        self.process.send_signal(signal.SIGUSR1)

    def failure(self) -> str | None:
        """What happened to the endpoint, once it has ended or no longer answers; else None."""
        if self.process.poll() is not None:
            self.reader.join(timeout=1)
            return f"its process (pid {self.process.pid}) ended with status {self.process.returncode}"
        if self.pulse.silent:
            return f"its process (pid {self.process.pid}) has not run for {SILENT_SECONDS:.0f} s"
        return None

    def end(self) -> None:
        """End it at once, if it still runs."""
        self.process.kill()
        processes.end_session(self.process.pid, timeout_seconds=5)
        self.process.wait()
        self.reader.join(timeout=2)


def openai_lacks(modules: Sequence[str] | None = None) -> list[str]:
    """The endpoint's modules that this interpreter lacks; modules: None for all that it always needs."""
    missing = []
    for module in OPENAI_MODULES if modules is None else modules:
        try:
            found = importlib.util.find_spec(module) is not None
        except ModuleNotFoundError:  # its parent is missing
            found = False
        missing += [] if found else [module.partition(".")[0]]
    return missing
