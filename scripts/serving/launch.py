"""The command lines of tritonserver and of mpirun in leader mode, their environment, and the settings of `serve`."""

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
# More time, in which requests that are cut off are told so (openai/worker.py)
CUT_SECONDS = 3
# A client that may register shared memory can name, read and write any shared memory of this host,
# also that of other programs.
CLOSED_TO_CLIENTS = "shared-memory,trace,logging"
# More ranks than cores may run, and none is bound to a core: a rank is tritonserver with all its threads.
MPIRUN = ("mpirun", "--allow-run-as-root", "--bind-to", "none", "--map-by", ":OVERSUBSCRIBE")

# A folder beside the rooms: kernels that the torch engine compiled for this host's GPUs. It is not a room: missing
# kernels are compiled again.
COMPILED = "compiled"


def reached_at(host: str) -> str:
    """The address under which this machine reaches a server that listens on HOST, in a URL's form:
    `[::1]` with brackets."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]" if ":" in host else host


@dataclass(frozen=True)
class Operating:
    """How the server is operated: settings (scripts/settings.py) by their names in small letters."""

    openai_host: str = ""
    drain_seconds: int = DRAIN_SECONDS
    lame_duck_seconds: int = 0
    metrics: str = "on"
    traces: str = "off"
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
    # the address for clients, if it differs from `host`: a container listens on all its addresses,
    # docker publishes one of the host's
    shown_host: str = ""
    # None: no endpoint
    openai_port: int | None = None
    api_key_file: str = ""
    # written when the server is ready, for programs that start it (serving/started.py)
    ready_file: Path | None = None
    # how many worker processes the endpoint has; empty: decided by this machine's cores
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
        """The address at which the port of that name is opened."""
        return self.operating.openai_host or self.host if name == "OPENAI_PORT" else self.host

    @property
    def reached_at(self) -> str:
        """The address under which this machine reaches its own ports, in a URL's form."""
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
    """tritonserver for the folder model_repo. shared_memory:
    how the names of the Python backend's shared memory begin."""
    return [
        str(toolbox.tritonserver),
        "--model-repository=model_repo",
        "--disable-auto-complete-config",
        *([f"--backend-directory={toolbox.backends}"] if toolbox.backends else []),
        f"--backend-config=python,shm-region-prefix-name={shared_memory}",
    ]


def mpirun_command(world_size: int, toolbox: Toolbox, settings: Settings, run: str = "", key: str = "KEY") -> list[str]:
    """NVIDIA's leader mode as one command: rank 0 loads all models and owns the ports,
    the others load tensorrt_llm and open none.

    Differences from the backend's launch_triton_server.py (tensorrtllm_backend v0.8.0):

    - Ranks are not bound to one core each, and there may be more ranks than cores.
    - The other ranks open no port. The address is explicit.
    - The Python backend's shared memory carries the name of this run (run): Triton 2.51 leaves some of it behind, which
      we remove.
    - What only the server's owner may do over the network is closed (CLOSED_TO_CLIENTS). It opens only to a key that no
      client is told (key).
    """
    # Triton's two servers read an IPv6 address differently: gRPC joins address and port with a colon, evhtp wants a
    # prefix (evhtp_bind_socket).
    ipv6 = ":" in settings.host
    bracketed, evhtp = (f"[{settings.host}]", f"ipv6:{settings.host}") if ipv6 else (settings.host, settings.host)
    leader = [
        f"--http-restricted-api={CLOSED_TO_CLIENTS}:bake-key={key}",
        f"--grpc-restricted-protocol={CLOSED_TO_CLIENTS}:bake-key={key}",
        f"--http-address={evhtp}",
        f"--http-port={settings.http_port}",
        f"--grpc-address={bracketed}",
        f"--grpc-port={settings.grpc_port}",
        f"--metrics-address={evhtp}",
        f"--metrics-port={settings.metrics_port}",
        f"--exit-timeout-secs={settings.operating.drain_seconds}",
    ]
    follower = ["--model-control-mode=explicit", "--load-model=tensorrt_llm", "--allow-http=false"]
    follower += ["--allow-grpc=false", "--allow-metrics=false"]
    command = [*MPIRUN]
    command += ["--output", "tag"] if toolbox.open_mpi >= 5 else ["--tag-output"]
    for rank in range(world_size):
        role = leader if rank == 0 else follower
        command += [":"] * (rank > 0) + ["-n", "1", *server_command(toolbox, f"{run}prefix{rank}_"), *role]
    return command


def compiled_kernels(root: Path) -> Path | None:
    """The folder for the torch engine's compiled kernels; None: Triton's default, because nothing can be kept here.

    In an image nothing may be written beside the rooms, and Triton fails if it finds no kernels and may not write. So
    the baked kernels are copied (a few MB), but not to /dev/shm, where a container may not execute files.
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
    """The environment of mpirun and its ranks. root: where the rooms are,
    and what the torch engine compiled at an earlier start."""
    environment = dict(inherited)
    # The Python backend takes its environment from the first python3 on PATH and ignores PYTHONPATH.
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), inherited.get("PATH", os.defpath)])
    libraries = [str(path) for path in toolbox.libraries]
    environment["LD_LIBRARY_PATH"] = os.pathsep.join([*libraries, *filter(None, [inherited.get("LD_LIBRARY_PATH")])])
    # A room is never written into after it is made, not even with compiled Python.
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    # Everything temporary lies in one folder, which is removed when we end.
    environment["TMPDIR"] = str(run_dir)
    if root is not None and (kernels := compiled_kernels(root)) is not None:
        environment["TRITON_CACHE_DIR"] = str(kernels.absolute())
    shared_memory = "sm" if toolbox.open_mpi >= 5 else "vader"
    environment[f"OMPI_MCA_btl_{shared_memory}_backing_directory"] = str(run_dir)
    # All ranks are on this host: shared memory only, no probing of networks.
    environment["OMPI_MCA_pml"] = "ob1"
    environment["OMPI_MCA_btl"] = f"self,{shared_memory}"
    if world_size >= cores:
        # A rank that waits for another one spins. Without a spare core it must yield its core to another rank, or to
        # tritonserver and the text models (2 ranks on 2 cores: a fifth more tokens per second for one stream).
        environment["OMPI_MCA_mpi_yield_when_idle"] = "1"
    return environment
