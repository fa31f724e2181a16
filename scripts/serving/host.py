"""Checks of this host and of the rooms before anything is loaded; `make doctor` runs them too."""

from __future__ import annotations

import errno
import json
import os
import resource
import socket
from pathlib import Path

from scripts import reports, room
from scripts.openai import keys
from scripts.serving import collector
from scripts.serving.launch import Settings
from scripts.settings import PORTS

# Every Python model takes 1 MB of shared memory at start, and more later; MPI takes some per rank.
SHARED_MEMORY_BYTES_PER_RANK = 24 << 20
# tritonserver puts a request's pieces on the stack (server issue 5840):
# with the usual 8 MB one HTTP request of 5 MB crashed it.
STACK_BYTES = 1 << 30


def check_ports(settings: Settings) -> None:
    """Every port must be free on its address before anything is loaded."""
    for name, port in settings.ports.items():
        try:
            host = settings.host_of(name)
            family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((host, port))
        except OSError as error:
            if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
                setting = "OPENAI_HOST" if name == "OPENAI_PORT" and settings.operating.openai_host else "HOST"
                raise reports.serving.host_not_here(setting, host, error.strerror or str(error)) from None
            raise reports.serving.port_not_free(
                name, port, host, error.strerror or str(error), _free_port(host)
            ) from None


def reserve_ports(settings: Settings) -> list[socket.socket]:
    """Claim the ports for this server among our servers, before they are bound and until it ends;
    a report if another has one.

    Two servers that start at the same moment both find the ports free. Each claim is a name in Linux' abstract socket
    namespace, which the kernel takes back when the process ends, however it ends.
    """
    claims = []
    for name, port in settings.ports.items():
        claims.append(socket.socket(socket.AF_UNIX))
        try:
            claims[-1].bind(f"\0trtllm-bake-{settings.host_of(name)}-{port}")
        except OSError:
            raise reports.serving.port_not_free(
                name,
                port,
                settings.host_of(name),
                "another server is starting with it",
                _free_port(settings.host_of(name)),
            ) from None
    return claims


def check_api_keys(settings: Settings) -> None:
    """A Problem for an API_KEY_FILE without keys: the endpoint would be open to all, or closed to all."""
    path = settings.api_key_file
    try:
        if path:
            keys.checked(path)
    except (OSError, ValueError) as error:
        raise reports.serving.no_api_key(path, getattr(error, "strerror", None) or str(error)) from None


def check_operating(settings: Settings) -> None:
    """What the endpoint reads from outside of the rooms: the keys of its clients, and where traces go."""
    check_api_keys(settings)
    if settings.operating.traces == "on":
        collector.check_collector()


def _free_port(host: str) -> int:
    try:
        with socket.socket() as probe:
            probe.bind((host, 0))
            return int(probe.getsockname()[1])
    except OSError:
        return PORTS["HTTP_PORT"]


def check_temporary() -> None:
    """Triton's Python backend aborts (status 134) if it cannot make a folder in /tmp,
    which is fixed in its code (2.51)."""
    if not os.access("/tmp", os.W_OK | os.X_OK):
        raise reports.serving.no_temporary_folder("/tmp")


def check_shared_memory(world_size: int) -> None:
    """Triton's Python backend and MPI talk through /dev/shm."""
    stat = os.statvfs("/dev/shm")
    free_bytes, needed_bytes = stat.f_bavail * stat.f_frsize, SHARED_MEMORY_BYTES_PER_RANK * world_size
    if free_bytes < needed_bytes:
        raise reports.serving.shared_memory_too_small(free_bytes, needed_bytes)


def check_rooms(root: Path) -> int:
    """engines and model_repo are whole and belong together. Returns the world size (ranks)."""
    room.read_manifest(root / "engines")
    model_repo = room.read_manifest(root / "model_repo")
    actual = room.manifest_sha256(root / "engines")
    if model_repo["reads"]["engines"] != actual:
        raise reports.rooms.room_damaged(
            root / "model_repo", "manifest.json", f"engines {model_repo['reads']['engines'][:12]}", actual[:12]
        )
    config = root / "engines" / "config.json"
    if room.sha256_of(config) != room.record_of(room.read_manifest(root / "engines"), config.name):
        raise reports.rooms.room_damaged(root / "engines", config.name, "another sha256", "changed content")
    return int(json.loads(config.read_bytes())["pretrained_config"]["mapping"]["world_size"])


def raise_stack_limit() -> None:
    """Raise it for this process and its children, up to the hard limit. A stack takes memory only as it is used."""
    soft, hard = resource.getrlimit(resource.RLIMIT_STACK)
    wanted = STACK_BYTES if hard == resource.RLIM_INFINITY else min(STACK_BYTES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_STACK, (wanted, hard))
