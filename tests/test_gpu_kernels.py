"""The kernels of the torch engine compute what plain PyTorch computes; no GPU is needed to know."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="the Triton compiler is missing: PyTorch's CPU wheel comes without",
)
def test_every_kernel_agrees_with_pytorch():
    """In a process of its own: Triton interprets all kernels of a process, or none."""
    script = Path(__file__).with_name("check_kernels.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0 and "all kernels agree" in done.stdout, done.stderr
