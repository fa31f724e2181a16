"""Supervisor: serves a model repository in leader mode (one tritonserver per rank under one mpirun) and the
OpenAI-compatible endpoint (scripts/openai); it ends all of them together.

Reads   engines/ and model_repo/ under --root
Needs   mpirun; tritonserver, from NVIDIA's container or from the wheel nvidia-pytriton

Ready means that a token went through all ranks. If a rank dies or stops, all end and the exit status is not 0. SIGTERM
and Ctrl-C let running requests finish (DRAIN_SECONDS), leave no process behind and exit 0.
"""

from __future__ import annotations

import argparse
import socket
from pathlib import Path
from typing import Any

from scripts import reports, settings
from scripts.serving.launch import STARTUP_SECONDS, Operating, Settings
from scripts.serving.supervisor import Supervisor


def settings_parser() -> argparse.ArgumentParser:
    """The command line, shared with demo.py."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--shown-host", default="", help="the address clients use (default: HOST)")
    for name in ("HTTP_PORT", "GRPC_PORT", "METRICS_PORT"):
        parser.add_argument(settings.flag(name), default=str(settings.PORTS[name]))
    parser.add_argument(
        "--openai-port", default="", help="port of the OpenAI-compatible endpoint (default: none is opened)"
    )
    parser.add_argument(
        "--api-key-file", default="", help="API keys of its clients, one a line (default: none is asked for)"
    )
    parser.add_argument("--openai-workers", default="", help="its worker processes (default: by this machine's cores)")
    parser.add_argument(
        "--log", type=Path, help="file for the servers' output (default: ROOT/serve.log; - is standard output)"
    )
    parser.add_argument("--ready-file", type=Path, help="written as JSON when the server is ready (default: none is)")
    for name in settings.OPERATING:
        parser.add_argument(
            settings.flag(name), default=settings.BY_NAME[name].default, help=settings.BY_NAME[name].text
        )
    parser.add_argument("--startup-seconds", type=float, default=STARTUP_SECONDS)
    return parser


def operating_from(args: argparse.Namespace) -> Operating:
    """The values of the options in settings.OPERATING; an impossible value is a report."""
    found: dict[str, Any] = {}
    for name in settings.OPERATING:
        value = getattr(args, settings.flag(name)[2:].replace("-", "_"), "") or settings.BY_NAME[name].default
        if not settings.fits(settings.BY_NAME[name], value):
            setting = settings.BY_NAME[name]
            raise reports.settings.bad_setting(
                name,
                value,
                setting.says,
                reports.make("serve", **settings.repair(name, {name: value, "ENGINE": "", "QUANT": ""})),
            )
        found[name.lower()] = int(value) if name.endswith("_SECONDS") else value
    return Operating(**found)


def address_of(host: str) -> str:
    """The address of a name such as localhost. Triton's HTTP server knows numbers only:
    for a name it listens on 255.255.255.255, without an error. An unknown name stays as it is, and is refused later."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return host
    return str(sorted(found, key=lambda one: one[0] != socket.AF_INET)[0][4][0])


def settings_from(args: argparse.Namespace) -> Settings:
    """argparse's result -> Settings."""
    ports = {}
    for name in settings.PORTS:
        value = getattr(args, name.lower(), "")
        if name == "OPENAI_PORT" and value == "":
            continue
        if not (value.isascii() and value.isdigit()):
            raise reports.settings.bad_setting(
                name,
                value,
                "a port from 1 to 65535",
                reports.make("serve", **{name: settings.PORTS[name]}),
            )
        ports[name.lower()] = int(value)
    host = address_of(args.host)
    log = args.root / "serve.log" if args.log is None else None if str(args.log) == "-" else args.log
    shown_host = getattr(args, "shown_host", "")
    return Settings(
        args.root, host, ports["http_port"], ports["grpc_port"], ports["metrics_port"], log, args.startup_seconds,
        shown_host, ports.get("openai_port"), getattr(args, "api_key_file", ""),
        getattr(args, "ready_file", None),
        getattr(args, "openai_workers", ""), operating_from(args),
    )  # fmt: skip


def main() -> int:
    return Supervisor(settings_from(settings_parser().parse_args())).run()


if __name__ == "__main__":
    reports.run(main)
