"""The OpenAI-compatible endpoint as a process that the supervisor starts and watches."""

import importlib.util
import os
import subprocess
import sys
import threading
from collections import deque
from typing import IO, Deque, List, Mapping, Optional

from scripts import room
from scripts.serving.launch import DRAIN_SECONDS, Settings
from scripts.serving.pulse import SILENT_SECONDS, Pulse
from scripts.serving.ranks import LOG_LINES, PROJECT

# What the endpoint imports that the text models do not (requirements/openai.txt)
OPENAI_MODULES = (
    "starlette",
    "uvicorn",
    "httptools",
    "uvloop",
    "pydantic",
    "jinja2",
    "tritonclient.grpc.aio",
    "tokenizers",
)


class Endpoint:
    """The OpenAI-compatible endpoint: one process, in a session of its own so that signals meant for us do not reach it."""

    def __init__(self, settings: Settings, environment: Mapping[str, str], log: Optional[IO[str]]) -> None:
        name = room.read_manifest(settings.root / "model_repo")["arguments"]["name"]
        command = [
            sys.executable, "-m", "scripts.openai", "--root", str(settings.root.resolve()), "--host", settings.host,
            "--port", str(settings.openai_port), "--grpc", settings.grpc_address, "--name", name,
            "--api-key-file", settings.api_key_file and os.path.abspath(settings.api_key_file),
            "--drain-seconds", str(DRAIN_SECONDS), "--parent", str(os.getpid()),
        ]  # fmt: skip
        self.process = subprocess.Popen(
            command, cwd=PROJECT, env=dict(environment), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, start_new_session=True, text=True, errors="replace",
        )  # fmt: skip
        self.last_lines: Deque[str] = deque(maxlen=LOG_LINES)
        self.pulse = Pulse()
        self.reader = threading.Thread(target=self._read, args=(log,), daemon=True)
        self.reader.start()

    def _read(self, log: Optional[IO[str]]) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.strip():
                self.last_lines.append(line.rstrip("\n"))
                print(f"openai: {line}", end="", file=log or sys.stdout, flush=True)

    def failure(self) -> Optional[str]:
        """What happened to it, as soon as it has ended or no longer answers."""
        if self.process.poll() is not None:
            self.reader.join(timeout=1)
            return f"its process (pid {self.process.pid}) ended with status {self.process.returncode}"
        if self.pulse.silent:
            return f"its port has not answered for {SILENT_SECONDS:.0f} s"
        return None

    def end(self) -> None:
        """At once, if it still runs."""
        self.process.kill()
        self.process.wait()
        self.reader.join(timeout=2)


def openai_lacks() -> List[str]:
    """The endpoint's modules that this interpreter has not."""
    missing = []
    for module in OPENAI_MODULES:
        try:
            found = importlib.util.find_spec(module) is not None
        except ModuleNotFoundError:  # its parent is missing
            found = False
        missing += [] if found else [module.partition(".")[0]]
    return missing
