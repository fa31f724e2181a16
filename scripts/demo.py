"""Serve, ask, stop in one command; the exit status is 0 only if all three went well."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from scripts import reports, serve
from scripts.serving.started import ASK_SECONDS
from scripts.settings import BY_NAME


def main() -> int:
    parser = serve.settings_parser()
    parser.add_argument("--max-tokens", default=BY_NAME["MAX_TOKENS"].default)
    args = parser.parse_args()
    settings = serve.settings_from(args)
    arguments = sys.argv[1:]
    at = next((i for i, word in enumerate(arguments) if word.startswith("--max-tokens")), len(arguments))
    width = 1 if at < len(arguments) and "=" in arguments[at] else 2
    # if we are told to end, the server must end too: SIGTERM becomes an exception, so that `finally` runs
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="bake-") as folder:
        ready = Path(folder) / "ready.json"
        command = [sys.executable, "-m", "scripts.serve", *arguments[:at], *arguments[at + width :]]
        server = subprocess.Popen([*command, "--ready-file", str(ready)], start_new_session=True)
        try:
            while not ready.exists() and server.poll() is None:
                time.sleep(ASK_SECONDS)
            asked = 1
            if ready.exists():
                print(f"\n{os.environ.get('PROMPT', '')}", flush=True)
                ask = [sys.executable, "-m", "scripts.ask", "--host", settings.host, "--max-tokens", args.max_tokens]
                ports = ["--http-port", str(settings.http_port), "--grpc-port", str(settings.grpc_port)]
                asked = subprocess.run([*ask, *ports], check=False).returncode
                print(flush=True)
        finally:
            if server.poll() is None:
                server.send_signal(signal.SIGTERM)
            served = server.wait()
    return served or asked


if __name__ == "__main__":
    reports.run(main)
