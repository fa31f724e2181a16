"""What the image runs: `serve` (its default), `health`, `doctor`, `passport`. Process 1 is the supervisor of
scripts/serve.py itself.

Reads   /srv: the rooms engines and model_repo, passport.json; from the environment HOST, HTTP_PORT, GRPC_PORT,
        METRICS_PORT, OPENAI_PORT, OPENAI_WORKERS, API_KEY_FILE, and those of settings.OPERATING
Needs   only what the image has; writes only to /dev/shm
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, Callable, cast

from scripts import reports, room, serve, settings
from scripts.serving import checks, host, launch, pulse, supervisor, toolbox
from scripts.serving.flag import Flag

SRV = Path("/srv")
# A token takes milliseconds, a full queue seconds. HEALTHCHECK's limit is 20 s, which includes the start of Python.
HEALTH_SECONDS = 15.0
MARKS = {"fine": "✓", "note": "!", "stop": "✗"}


def read_passport(srv: Path) -> dict[str, Any]:
    return cast("dict[str, Any]", json.loads((srv / "passport.json").read_bytes()))


def settings_of(srv: Path) -> launch.Settings:
    """The server's settings: it listens on all addresses of the container, unless the environment says otherwise."""
    parser = serve.settings_parser()
    words = ["--root", str(srv), "--log", "-", "--host", os.environ.get("HOST", "0.0.0.0"), "--shown-host", "127.0.0.1"]
    for name, port in settings.PORTS.items():
        words += [settings.flag(name), os.environ.get(name, str(port))]
    words += [
        "--api-key-file",
        os.environ.get("API_KEY_FILE", ""),
        "--openai-workers",
        os.environ.get("OPENAI_WORKERS", ""),
    ]
    for name in settings.OPERATING:
        if os.environ.get(name):
            words += [f"{settings.flag(name)}={os.environ[name]}"]
    return serve.settings_from(parser.parse_args(words))


def health(srv: Path) -> int:
    """Asks for one token through all ranks; else status 1 with the reason. docker keeps both."""
    url = settings_of(srv).url
    body = json.dumps(supervisor.PROBE).encode()
    try:
        with pulse.LOOPBACK.open(f"{url}/v2/models/ensemble/generate", data=body, timeout=HEALTH_SECONDS) as answer:
            said = json.loads(answer.read())
    except (OSError, ValueError, urllib.error.URLError) as error:
        print(f"no token within {HEALTH_SECONDS:.0f} s: {error}")
        return 1
    if "error" in said or "text_output" not in said:
        print(f"an error instead of a token: {said.get('error', said)}")
        return 1
    print("a token went through all ranks")
    return 0


# --- doctor: can this host serve it? ---


def check_rooms(srv: Path) -> str:
    world_size = host.check_rooms(srv)
    about = read_passport(srv)
    for name in ("engines", "model_repo"):
        if about["rooms"][name]["manifest_sha256"] != room.manifest_sha256(srv / name):
            raise reports.rooms.room_damaged(srv / name, room.MANIFEST, "what the passport says", "another content")
    return f"{about['model']}: {world_size} ranks of {about['engine']['kind']}, {about['engine']['dtype']}; every file has its size"


def check_memory(srv: Path) -> str:
    """On CPUs the torch engine's weights lie in memory, in float32, so float16 files take twice their size."""
    about = read_passport(srv)
    if about["engine"]["kind"] != "torch":
        return "the engines go to the GPUs"
    files = about["rooms"]["engines"]["manifest"]["files"]
    wide = 1 if about["engine"]["dtype"] == "float32" else 2
    needed_bytes = wide * sum(record["size_bytes"] for record in files.values())
    available_bytes = memory_available()
    if available_bytes < needed_bytes:
        raise reports.images.memory_too_small(available_bytes, needed_bytes)
    return f"{room.human_bytes(available_bytes)} available, {room.human_bytes(needed_bytes)} for the weights"


def memory_available() -> int:
    """Memory that the kernel leaves us, and, in a container with a limit, its cgroup."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        return min(free, int(limit) - used) if limit != "max" else free
    except (OSError, ValueError):
        return free


def check_shared_memory(srv: Path) -> str:
    host.check_shared_memory(host.check_rooms(srv))
    stat = os.statvfs("/dev/shm")
    return f"{room.human_bytes(stat.f_bavail * stat.f_frsize)} free in /dev/shm"


def check_temporary(srv: Path) -> str:
    host.check_temporary()
    return "/tmp can be written"


def check_ports(srv: Path) -> str:
    settings = settings_of(srv)
    host.check_ports(settings)
    return f"{', '.join(map(str, settings.ports.values()))} are free on {settings.host}"


def check_host(srv: Path) -> str:
    """The checks of this kind of engine: GPUs, driver, links, a sum over all ranks."""
    toolbox.check_mpirun()
    about = read_passport(srv)
    with tempfile.TemporaryDirectory(prefix="bake-", dir="/dev/shm") as folder:
        tools = toolbox.find_toolbox(Path(folder))
        environment = launch.server_environment(
            os.environ, tools, Path(folder), about["engine"]["world_size"], os.cpu_count() or 1
        )
        checks.check(srv / "engines", environment, Path(folder), Flag(), said_by="doctor")
    if about["engine"]["kind"] == "torch":
        return f"{os.cpu_count()} cores for {about['engine']['world_size']} ranks" + (
            ", and GPUs" if shutil.which("nvidia-smi") else "; no GPU is asked for"
        )
    return f"{about['engine']['world_size']} GPUs as the engines want them"


def check_operating(srv: Path) -> str:
    settings = settings_of(srv)
    host.check_operating(settings)
    return f"keys from {settings.api_key_file or 'no file'}; traces are {settings.operating.traces}"


CHECKS: list[tuple[str, Callable[[Path], str]]] = [
    ("rooms", check_rooms),
    ("memory", check_memory),
    ("shared memory", check_shared_memory),
    ("/tmp", check_temporary),
    ("ports", check_ports),
    ("operating", check_operating),
    ("host", check_host),
]


def doctor(srv: Path) -> int:
    """Every check, cheap ones first; 1 if the server would refuse."""
    stopped = False
    for name, check in CHECKS:
        try:
            print(f"[{MARKS['fine']}] {name:<14} {check(srv)}", flush=True)
        except reports.Problem as problem:
            stopped = True
            print(f"[{MARKS['stop']}] {name:<14} {problem.title}\n\n{problem.report()}\n", flush=True)
        except Exception as error:
            print(f"[{MARKS['note']}] {name:<14} this check itself failed: {type(error).__name__}: {error}", flush=True)
    print("This host cannot serve it yet." if stopped else "Ready.")
    return int(stopped)


def print_passport(srv: Path) -> int:
    sys.stdout.write((srv / "passport.json").read_text())
    return 0


COMMANDS: dict[str, Callable[[Path], int]] = {
    "serve": lambda srv: supervisor.Supervisor(settings_of(srv)).run(),
    "health": health,
    "doctor": doctor,
    "passport": print_passport,
}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="docker run IMAGE", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=list(COMMANDS))
    # in an image, reports end in a docker command, not in a make command
    os.environ["BAKED_IMAGE"] = os.environ.get("BAKED_IMAGE") or "IMAGE"
    return COMMANDS[parser.parse_args().command](SRV)


if __name__ == "__main__":
    reports.run(main)
