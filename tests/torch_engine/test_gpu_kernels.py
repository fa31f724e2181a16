"""The torch engine's code for GPUs gives the results of plain PyTorch; the test needs no GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
from drive_engine import MPI_ENVIRONMENT, mpirun
from project import ROOT


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="the Triton compiler is missing: PyTorch's CPU wheel comes without",
)
@pytest.mark.parametrize(
    ("script", "how", "said"),
    [
        ("check_kernels.py", [], "all kernels agree"),
        ("check_gpu_llama.py", ["1"], "the same answers"),
        ("check_gpu_llama.py", ["2"], "the same answers"),
        ("check_gpu_llama.py", ["4"], "the same answers"),
        ("check_gpu_llama.py", ["2", "biased"], "the same answers"),
    ],
)
def test_without_a_gpu_it_gives_what_pytorch_gives(script: str, how: list[str], said: str) -> None:
    """In its own process: Triton interprets all kernels of a process, or none."""
    command = [sys.executable, str(ROOT / "tests/support" / script), *how]
    environment = dict(os.environ)
    if how and how != ["1"]:
        command = mpirun(int(how[0]), *command)
        environment.update(MPI_ENVIRONMENT)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0 and said in done.stdout, done.stderr
