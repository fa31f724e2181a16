"""Reports of make serve and make ask."""

import os
import shlex
import sys
from pathlib import Path
from typing import Mapping, Sequence

from scripts.reports.problem import PathLike, Problem, make, shown


def ports_equal(ports: Mapping[str, int]) -> Problem:
    seen = ", ".join(f"{name}={port}" for name, port in ports.items())
    return Problem(
        "two ports are the same",
        "Makefile",
        f"Each needs one of its own: {seen}.",
        "For instance:",
        make("serve", **{name: 9000 if name == "OPENAI_PORT" else 8000 + n for n, name in enumerate(ports)}),
    )


def port_not_free(name: str, port: int, host: str, reason: str, free_port: int) -> Problem:
    return Problem(
        f"port {port} cannot be used",
        f"{host}:{port}",
        f"{name} is {port}, and the system says: {reason}. Nothing was loaded.\n\nWho listens there: ss -ltnp 'sport = :{port}'",
        "End it, or take another port (this one is free now):",
        make("serve", **{name: free_port}),
    )


def host_not_here(host: str, reason: str) -> Problem:
    return Problem(
        "not an address of this machine",
        host,
        f"HOST is {host!r}, and the system says: {reason}. A server listens on an address of its own machine. Nothing was loaded.",
        "For this machine only, or for all that reach it (0.0.0.0):",
        make("serve", HOST="127.0.0.1"),
    )


def log_in_use(path: PathLike) -> Problem:
    return Problem(
        "the log is in use",
        path,
        f"Other servers of these rooms write {shown(path)} and the log named after this port.",
        "Take another port:",
        make("serve", HTTP_PORT=8100, GRPC_PORT=8101, METRICS_PORT=8102, OPENAI_PORT=9100),
    )


def program_missing(program: str) -> Problem:
    return Problem(
        f"no {Path(program).name}",
        program,
        f"{program} is neither on PATH nor among the packages of {sys.executable}.",
        "It comes with the pinned packages:",
        f"{sys.executable} -m pip install --no-deps --require-hashes -r requirements/run.txt",
    )


def shared_memory_too_small(free_bytes: int, needed_bytes: int) -> Problem:
    baked = os.environ.get("BAKED_IMAGE")
    return Problem(
        "/dev/shm is too small",
        "/dev/shm",
        f"{free_bytes / 1e6:.0f} MB are free there; {needed_bytes / 1e6:.0f} MB are needed.",
        "Make it larger:" if baked else "Make it larger (in a container: docker run --shm-size=1g ...):",
        f"docker run --shm-size 1g {baked}" if baked else "sudo mount -o remount,size=1g /dev/shm",
    )


def no_temporary_folder(folder: str) -> Problem:
    baked = os.environ.get("BAKED_IMAGE")
    return Problem(
        f"{folder} cannot be written",
        folder,
        f"Triton's Python backend makes a folder in {folder}; user {os.getuid()} cannot. Nothing was loaded.",
        "Give it one:",
        f"docker run --read-only --tmpfs {folder} {baked}" if baked else f"sudo chmod 1777 {folder}",
    )


def rank_failed(rank: int, event: str, when: str, last_lines: Sequence[str]) -> Problem:
    lines = "\n".join(f"    {line[:200]}" for line in last_lines) or "    (it wrote nothing)"
    return Problem(
        f"rank {rank} failed {when}",
        f"rank {rank}",
        f"Rank {rank}: {event}. A model that is split over ranks needs all of them, so everything was ended.\n\n"
        f"The last lines of rank {rank}:\n\n{lines}",
        "When the cause is mended:",
        make("serve"),
    )


def endpoint_failed(event: str, when: str, last_lines: Sequence[str]) -> Problem:
    lines = "\n".join(f"    {line[:200]}" for line in last_lines) or "    (it wrote nothing)"
    return Problem(
        f"the OpenAI endpoint failed {when}",
        "scripts/openai",
        f"The OpenAI-compatible endpoint: {event}. Everything was ended with it.\n\nIts last lines:\n\n{lines}",
        "When the cause is mended:",
        make("serve"),
    )


def no_api_key(path: PathLike, reason: str) -> Problem:
    return Problem(
        "no API key in the file",
        path,
        f"API_KEY_FILE is {shown(path)}: {reason}. With API_KEY_FILE every client of the OpenAI-compatible endpoint needs one of its keys.",
        "Write one into it, or leave API_KEY_FILE unset to ask for none:",
        f"head -c 24 /dev/urandom | base64 > {shlex.quote(str(path))} && {make('serve')}",
    )


def gpu_memory_too_small(rank: int, seen: str) -> Problem:
    """seen: the engine's own line, with the numbers and the settings that would help."""
    return Problem(
        "out of GPU memory",
        f"rank {rank}",
        f"Rank {rank} is {seen}.",
        "For instance:",
        make("serve", MAX_NUM_TOKENS=2048),
    )


def start_too_slow(seconds: float, last_lines: Mapping[int, Sequence[str]]) -> Problem:
    lines = (
        "\n".join(f"    rank {rank}: {line[:180]}" for rank, tail in last_lines.items() for line in tail)
        or "    (nothing)"
    )
    return Problem(
        "the server did not become ready",
        "serve",
        f"After {seconds:.0f} s no token had come through all ranks. A rank that waits for another looks like this, and so does a "
        f"slow disk.\n\nThe last lines of each rank:\n\n{lines}",
        "See the whole log, and what this machine lacks:",
        make("doctor"),
    )


def server_not_there(address: str, reason: str) -> Problem:
    return Problem(
        "no server answers",
        address,
        f"Asking {address} failed: {reason}.",
        "Start it in another terminal, and wait for its line `ready`:",
        make("serve"),
    )


def request_refused(reason: str) -> Problem:
    return Problem(
        "the server refused the request",
        "ask",
        f"It says: {reason}",
        "Ask again, for instance with:",
        make("ask", PROMPT="Once upon a time", MAX_TOKENS=48),
    )


def no_rehearsal_image(seen: str) -> Problem:
    return Problem(
        "no image for the rehearsal",
        "docker/rehearsal",
        f"A docker daemon answers, so the rehearsal runs in it, in an image that mmdebstrap makes of Debian's or Ubuntu's packages. {seen}",
        "Mend that (mmdebstrap is a package of that name), or rehearse without docker:",
        f"REHEARSAL_DOCKER=no {make('demo')}",
    )
