"""The torch engine's code for GPUs gives what plain PyTorch gives; no GPU is needed to know."""

import importlib.util
import subprocess
import sys

import pytest
from project import ROOT


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="the Triton compiler is missing: PyTorch's CPU wheel comes without",
)
@pytest.mark.parametrize(
    ("script", "how", "said"),
    [
        ("check_kernels.py", [], "all kernels agree"),
        ("check_gpu_llama.py", ["packed"], "the same answers"),
        ("check_gpu_llama.py", ["single"], "the same answers"),
    ],
)
def test_without_a_gpu_it_gives_what_pytorch_gives(script, how, said):
    """In a process of its own: Triton interprets all kernels of a process, or none."""
    command = [sys.executable, ROOT / "tests/support" / script, *how]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0 and said in done.stdout, done.stderr
