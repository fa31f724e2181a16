"""One way to start `python -m scripts.serve` from another script, know when it is ready, and end it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator

from scripts import reports
from scripts.serving.launch import Settings
from scripts.settings import OPERATING, flag

ASK_SECONDS = 0.05


@dataclass(frozen=True)
class Started:
    """A server that is ready. seconds: from its start until it was ready; endpoint_pid:
    the process of the OpenAI endpoint, if any."""

    process: subprocess.Popen[bytes]
    seconds: float
    endpoint_pid: int | None


@contextmanager
def started(settings: Settings) -> Iterator[Started]:
    """Serve while the block runs; the server's lines go to our standard output.

    A Problem if the server ends before it is ready; its own report is printed above.
    """
    with tempfile.TemporaryDirectory(prefix="bake-") as folder:
        ready = Path(folder) / "ready.json"
        command = [sys.executable, "-m", "scripts.serve", "--root", str(settings.root), "--host", settings.host]
        for name, port in settings.ports.items():
            command += [f"--{name.lower().replace('_', '-')}", str(port)]
        command += ["--openai-workers", settings.openai_workers] if settings.openai_workers else []
        for name in OPERATING:
            command += [f"{flag(name)}={getattr(settings.operating, name.lower())}"]
        server = subprocess.Popen([*command, "--ready-file", str(ready)])
        try:
            while not ready.exists():
                if server.poll() is not None:
                    raise reports.serving.server_not_there(settings.url, "it did not become ready; its report is above")
                time.sleep(ASK_SECONDS)
            about = json.loads(ready.read_bytes())
            yield Started(server, about["seconds"], about["endpoint_pid"])
        finally:
            if server.poll() is None:
                server.send_signal(signal.SIGTERM)
            server.wait()
