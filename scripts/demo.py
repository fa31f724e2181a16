"""Serve, ask, stop in one command; the status is 0 only when all three went well."""

import os
import signal
import subprocess
import sys

from scripts import reports, serve


def main() -> int:
    parser = serve.settings_parser()
    parser.add_argument("--max-tokens", default="48")
    args = parser.parse_args()
    settings = serve.settings_from(args)
    arguments = sys.argv[1:]
    at = next((i for i, word in enumerate(arguments) if word.startswith("--max-tokens")), len(arguments))
    width = 1 if at < len(arguments) and "=" in arguments[at] else 2
    server = subprocess.Popen(
        [sys.executable, "-m", "scripts.serve", *arguments[:at], *arguments[at + width :]],
        stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    # told to end ourselves, the server must not stay: SIGTERM becomes an exception, so that `finally` runs
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        assert server.stdout is not None
        ready = False
        for line in server.stdout:
            print(line, end="", flush=True)
            ready = line.strip().startswith("curl ")
            if ready:
                break
        asked = 1
        if ready:
            print(f"\n{os.environ.get('PROMPT', '')}", flush=True)
            ask = [sys.executable, "-m", "scripts.ask", "--host", settings.host, "--max-tokens", args.max_tokens]
            ports = ["--http-port", str(settings.http_port), "--grpc-port", str(settings.grpc_port)]
            asked = subprocess.run([*ask, *ports], check=False).returncode
            print(flush=True)
    finally:
        if server.poll() is None:
            server.send_signal(signal.SIGTERM)
        for line in server.stdout or ():
            print(line, end="", flush=True)
        served = server.wait()
    return served or asked


if __name__ == "__main__":
    reports.run(main)
