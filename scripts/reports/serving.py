"""Reports of make serve and make ask."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Mapping, Sequence

from scripts.reports.packages import install
from scripts.reports.problem import PathLike, Problem, indented, make, shown


def ports_equal(ports: Mapping[str, int], defaults: Mapping[str, int]) -> Problem:
    seen = ", ".join(f"{name}={port}" for name, port in ports.items())
    return Problem(
        "two ports are the same",
        "Makefile",
        f"Every port must be different: {seen}.",
        "For instance:",
        make("serve", **defaults),
    )


def port_not_free(name: str, port: int, host: str, reason: str, free_port: int) -> Problem:
    return Problem(
        f"port {port} cannot be used",
        f"{host}:{port}",
        f"{name} is {port}; the system says: {reason}. Nothing was loaded.\n\nTo see who listens there: ss -ltnp "
        f"'sport = :{port}'",
        "Stop the program that listens there, or use another port (the one below is free now):",
        make("serve", **{name: free_port}),
    )


def host_not_here(name: str, host: str, reason: str) -> Problem:
    """name: the setting that says where to listen."""
    return Problem(
        "not an address of this machine",
        host,
        f"{name} is {host!r}; the system says: {reason}. A server can only listen on one of its machine's addresses. "
        "Nothing was loaded.",
        "To serve this machine only (0.0.0.0 serves every machine that can reach it):",
        make("serve", **{name: "127.0.0.1"}),
    )


def log_in_use(path: PathLike) -> Problem:
    return Problem(
        "the log is in use",
        path,
        f"A server writes its log to {shown(path)}, or to a log with the server's port in its name. Other servers write "
        "to both now.",
        "Use other ports:",
        make("serve", HTTP_PORT=8100, GRPC_PORT=8101, METRICS_PORT=8102, OPENAI_PORT=9100),
    )


def program_missing(program: str) -> Problem:
    return Problem(
        f"no {Path(program).name}",
        program,
        f"{program} is neither on PATH nor among the packages of {sys.executable}.",
        *install(["run"]),
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
        f"Triton's Python backend needs a folder in {folder}; user {os.getuid()} cannot create one. Nothing was "
        "loaded.",
        "Allow it:",
        f"docker run --read-only --tmpfs {folder} {baked}" if baked else f"sudo chmod 1777 {folder}",
    )


def rank_failed(rank: int, event: str, when: str, last_lines: Sequence[str]) -> Problem:
    return Problem(
        f"rank {rank} failed {when}",
        f"rank {rank}",
        f"Rank {rank}: {event}. A split model needs all its ranks, so the server was ended.\n\n"
        f"The last lines of rank {rank}:\n\n{indented(last_lines)}",
        "Correct the cause, then type:",
        make("serve"),
    )


def endpoint_failed(event: str, when: str, last_lines: Sequence[str]) -> Problem:
    return Problem(
        f"the OpenAI endpoint failed {when}",
        "scripts/openai",
        f"The OpenAI-compatible endpoint: {event}. The server was ended.\n\nIts last lines:\n\n{indented(last_lines)}",
        "Correct the cause, then type:",
        make("serve"),
    )


def no_api_key(path: PathLike, reason: str) -> Problem:
    file = Path(path) / "keys" if Path(path).is_dir() else path
    return Problem(
        "no API key in the file",
        path,
        f"API_KEY_FILE is {shown(path)}: {reason}. With API_KEY_FILE, every client of the OpenAI-compatible endpoint "
        "needs one of its keys.",
        "Write a key into it, or leave API_KEY_FILE unset to serve without keys:",
        f"head -c 24 /dev/urandom | base64 > {shlex.quote(str(file))} && "
        + (make("serve") if file == path else make("serve", API_KEY_FILE=file)),
    )


def bad_collector(name: str, wanted: str, value: str, example: str) -> Problem:
    """value: empty if it may hold a secret."""
    return Problem(
        "no receiver for traces",
        name,
        f"With TRACES=on, {name} must be {wanted}{f'; it is {shown(value)}' if value else ''}.",
        "Correct that variable of the environment, for instance:",
        f"{name}={shlex.quote(example)} {make('serve', TRACES='on')}",
    )


def gpu_memory_too_small(rank: int, seen: str, holders: Sequence[str]) -> Problem:
    """seen: the engine's own line, with the numbers and the settings that would help. holders: the other processes that
    have GPU memory, a line each."""
    others = (
        f"Other processes hold GPU memory:\n\n{indented(holders)}"
        if holders
        else "nvidia-smi names no other process that holds GPU memory. (In a container it does not see those outside.)"
    )
    return Problem(
        "out of GPU memory",
        f"rank {rank}",
        f"Rank {rank} is {seen}.\n\n{others}",
        "End a process that you do not need, or follow the advice above, for instance:" if holders else "For instance:",
        make("serve", MAX_NUM_TOKENS=2048),
    )


def ranks_without_gpu(needed: int, seen: int, visible: str | None) -> Problem:
    """seen: GPUs that PyTorch sees. visible: CUDA_VISIBLE_DEVICES, if it is set."""
    hidden = f", and CUDA_VISIBLE_DEVICES is {shown(visible)}" if visible is not None else ""
    return Problem(
        "not enough GPUs",
        "serve",
        f"The engine has {needed} ranks, and each needs its own GPU. PyTorch sees {seen}{hidden}.",
        "Let it see more, or split the model for as many as there are:",
        make("serve", TP=seen),
    )


def start_too_slow(seconds: float, last_lines: Mapping[int, Sequence[str]]) -> Problem:
    lines = (
        "\n".join(f"    rank {rank}: {line[:180]}" for rank, tail in last_lines.items() for line in tail)
        or "    (nothing)"
    )
    return Problem(
        "the server did not become ready",
        "serve",
        f"No token came through all ranks within {seconds:.0f} s. The cause may be a rank that waits for another, or a "
        f"slow disk.\n\nThe last lines of each rank:\n\n{lines}",
        "The whole log is serve.log, in the folder that holds engines/. See what this machine lacks:",
        make("doctor"),
    )


def server_not_there(address: str, reason: str) -> Problem:
    return Problem(
        "no server answers",
        address,
        f"Asking {address} failed: {reason}.",
        "Start it in another terminal and wait for its line `ready`:",
        make("serve"),
    )


def answer_cut_off(address: str, reason: str) -> Problem:
    """reason: gRPC's words. A GOAWAY with error code 0 means that tritonserver was told to end; mpirun does that when a
    rank has ended."""
    return Problem(
        "the answer stopped in the middle",
        address,
        "The server ended the answer before it was complete: "
        f"{reason.splitlines()[0] if reason else 'no reason given'}\n\n"
        "Usually a rank has failed or the server was ended. The terminal of `make serve` and serve.log say which.",
        "If it does not serve any more, start it again:",
        make("serve"),
    )


def request_refused(reason: str) -> Problem:
    return Problem(
        "the server refused the request",
        "ask",
        f"The server says: {reason}",
        "For instance:",
        make("ask", PROMPT="Once upon a time", MAX_TOKENS=48),
    )


def no_rehearsal_image(seen: str) -> Problem:
    return Problem(
        "no image for the rehearsal",
        "docker/rehearsal",
        "A docker daemon is running, so the rehearsal (ENGINE=tensorrt with stand-ins) uses an image. mmdebstrap makes "
        f"it from Debian's or Ubuntu's packages. {seen}",
        "Install the package mmdebstrap, or rehearse without docker:",
        f"REHEARSAL_DOCKER=no {make('demo')}",
    )
