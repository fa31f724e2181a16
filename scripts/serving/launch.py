"""What is started, as words: tritonserver, mpirun in leader mode, their environment; and what `serve` was asked."""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Mapping

from scripts import reports
from scripts.serving.toolbox import Toolbox
from scripts.settings import BY_NAME, PORTS

# Loading 138 GB of engines from a slow disk takes minutes; NVIDIA's charts wait 15 of them.
STARTUP_SECONDS = 900
DRAIN_SECONDS = int(BY_NAME["DRAIN_SECONDS"].default)
# Beyond it: what is cut off is told so (openai/worker.py)
CUT_SECONDS = 3
# A client that registers shared memory may name any of this host's, another model's or another program's, and read and write it.
CLOSED_TO_CLIENTS = "shared-memory,trace,logging"
# More ranks than cores, and none bound to a core of its own: a rank is tritonserver with all its threads.
MPIRUN = ("mpirun", "--allow-run-as-root", "--bind-to", "none", "--map-by", ":OVERSUBSCRIBE")

# Beside the rooms: kernels that the torch engine compiled for this host's GPUs. Not a room: whatever is missing is compiled again.
COMPILED = "compiled"


def reached_at(host: str) -> str:
    """The address under which this machine reaches a server that listens on HOST, as a URL has it: `[::1]` with brackets."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]" if ":" in host else host


@dataclass(frozen=True)
class Operating:
    """How the server is operated: settings (scripts/settings.py) by their names in small letters."""

    openai_host: str = ""
    drain_seconds: int = DRAIN_SECONDS
    lame_duck_seconds: int = 0
    metrics: str = "on"
    log: str = "text"
    model_aliases: str = ""
    cors_origins: str = ""


@dataclass(frozen=True)
class Settings:
    """What to serve and where to listen. log: a file for the servers' output; None: standard output."""

    root: Path
    host: str
    http_port: int
    grpc_port: int
    metrics_port: int
    log: Path | None = None
    startup_seconds: float = STARTUP_SECONDS
    # where clients find it, when that differs from `host`: a container listens on all its addresses, docker publishes one of the host's
    shown_host: str = ""
    # None: no endpoint
    openai_port: int | None = None
    api_key_file: str = ""
    # written when the server is ready, for programs that start it (serving/started.py)
    ready_file: Path | None = None
    # how many worker processes it has; empty: by this machine's cores
    openai_workers: str = ""
    operating: Operating = Operating()

    def __post_init__(self) -> None:
        ports = self.ports
        for name, port in ports.items():
            if not 1 <= port <= 65535:
                raise reports.settings.bad_setting(
                    name, port, "a port from 1 to 65535", reports.make("serve", **{name: PORTS[name]})
                )
        if len(set(ports.values())) < len(ports):
            raise reports.serving.ports_equal(ports, {name: PORTS[name] for name in ports})

    @property
    def ports(self) -> dict[str, int]:
        """The ports that are opened, by the names of their settings."""
        ports = {"HTTP_PORT": self.http_port, "GRPC_PORT": self.grpc_port, "METRICS_PORT": self.metrics_port}
        return ports if self.openai_port is None else {**ports, "OPENAI_PORT": self.openai_port}

    def host_of(self, name: str) -> str:
        """Where the port of that name is opened."""
        return self.operating.openai_host or self.host if name == "OPENAI_PORT" else self.host

    @property
    def reached_at(self) -> str:
        """The address under which this machine reaches its own ports, as a URL has it."""
        return reached_at(self.host)

    @property
    def url(self) -> str:
        return f"http://{self.reached_at}:{self.http_port}"

    @property
    def openai_url(self) -> str:
        return f"http://{reached_at(self.host_of('OPENAI_PORT'))}:{self.openai_port}"

    @property
    def grpc_address(self) -> str:
        """Where the text models find tensorrt_llm (model_repo_template/tensorrt_llm_bls/1/engine_link.py)."""
        return f"{self.reached_at}:{self.grpc_port}"


def server_command(toolbox: Toolbox, shared_memory: str) -> list[str]:
    """tritonserver over the folder model_repo. shared_memory: what the names of the Python backend's begin with."""
    return [
        str(toolbox.tritonserver),
        "--model-repository=model_repo",
        "--disable-auto-complete-config",
        *([f"--backend-directory={toolbox.backends}"] if toolbox.backends else []),
        f"--backend-config=python,shm-region-prefix-name={shared_memory}",
    ]


def mpirun_command(world_size: int, toolbox: Toolbox, settings: Settings, run: str = "", key: str = "KEY") -> list[str]:
    """NVIDIA's leader mode as one command: rank 0 loads all models and owns the ports, the others load tensorrt_llm and open none.

    Differences from the backend's launch_triton_server.py (tensorrtllm_backend v0.8.0), each for a reason: ranks are not bound
    to one core each and may be more than the cores; the other ranks open no port; the address is explicit; the Python backend's
    shared memory carries the name of this run (run), because Triton 2.51 leaves some of it behind and we take it away; what only the
    server's owner may do over the network is closed (CLOSED_TO_CLIENTS), and opens to a key that nobody is told (key).
    """
    # An IPv6 address, as each of Triton's two servers reads it: gRPC joins address and port with a colon, evhtp knows it by a prefix
    # (evhtp_bind_socket).
    ipv6 = ":" in settings.host
    bracketed, evhtp = (f"[{settings.host}]", f"ipv6:{settings.host}") if ipv6 else (settings.host, settings.host)
    leader = [
        f"--http-restricted-api={CLOSED_TO_CLIENTS}:bake-key={key}",
        f"--grpc-restricted-protocol={CLOSED_TO_CLIENTS}:bake-key={key}",
        f"--http-address={evhtp}", f"--http-port={settings.http_port}",
        f"--grpc-address={bracketed}", f"--grpc-port={settings.grpc_port}",
        f"--metrics-address={evhtp}", f"--metrics-port={settings.metrics_port}",
        f"--exit-timeout-secs={settings.operating.drain_seconds}",
    ]  # fmt: skip
    follower = [
        "--model-control-mode=explicit", "--load-model=tensorrt_llm",
        "--allow-http=false", "--allow-grpc=false", "--allow-metrics=false",
    ]  # fmt: skip
    command = [*MPIRUN]
    command += ["--output", "tag"] if toolbox.open_mpi >= 5 else ["--tag-output"]
    for rank in range(world_size):
        role = leader if rank == 0 else follower
        command += [":"] * (rank > 0) + ["-n", "1", *server_command(toolbox, f"{run}prefix{rank}_"), *role]
    return command


def compiled_kernels(root: Path) -> Path | None:
    """Where the torch engine's compiled kernels are found and kept; None: wherever Triton keeps them, as nothing can be kept here.

    In an image nothing may be written beside the rooms, and Triton ends where it finds nothing and may not write. So what was baked in
    is copied (a few MB); not to /dev/shm, where nothing may be executed in a container.
    """
    kept = root / COMPILED
    if os.access(kept if kept.is_dir() else root, os.W_OK):
        return kept
    if not kept.is_dir():
        return None
    copy = Path(tempfile.mkdtemp(prefix="bake-compiled-"))
    atexit.register(shutil.rmtree, copy, ignore_errors=True)
    shutil.copytree(kept, copy, dirs_exist_ok=True)
    return copy


def server_environment(
    inherited: Mapping[str, str],
    toolbox: Toolbox,
    run_dir: Path,
    world_size: int,
    cores: int,
    root: Path | None = None,
) -> dict[str, str]:
    """The environment of mpirun and its ranks. root: where the rooms are, and what the torch engine compiled at an earlier start."""
    environment = dict(inherited)
    # The Python backend takes its environment from the first python3 on PATH and ignores PYTHONPATH.
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), inherited.get("PATH", os.defpath)])
    libraries = [str(path) for path in toolbox.libraries]
    environment["LD_LIBRARY_PATH"] = os.pathsep.join([*libraries, *filter(None, [inherited.get("LD_LIBRARY_PATH")])])
    # A room is never written into after it is made, not even with compiled Python.
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    # Everything temporary lies in one folder that goes when we go.
    environment["TMPDIR"] = str(run_dir)
    if root is not None and (kernels := compiled_kernels(root)) is not None:
        environment["TRITON_CACHE_DIR"] = str(kernels.absolute())
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
