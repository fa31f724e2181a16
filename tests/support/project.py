"""A copy of the project in which tests run make."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# What the project is made of; build/, .venv/ and caches stay behind.
PARTS = (
    "Makefile",
    "LICENSE",
    "README.md",
    "docker",
    "docs",
    "models",
    "model_repo_template",
    "requirements",
    "scripts",
    "pyproject.toml",
)


def copy_of_project(target: Path) -> Path:
    """A tree like a fresh clone: typing make there touches nothing of ours."""
    for part in PARTS:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, target / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            target.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target / part)
    return target


def make(tree: Path, *words: str, timeout: float = 240, **environment: str) -> subprocess.CompletedProcess[str]:
    """Type make with the interpreter that runs the tests."""
    command = ["make", f"PYTHON={sys.executable}", *words]
    return subprocess.run(
        command,
        cwd=tree,
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **environment},
        check=False,
    )


def start(tree: Path, *words: str, **options: Any) -> subprocess.Popen[str]:
    """Type make, which goes on in a session of its process. options: of Popen."""
    return subprocess.Popen(
        ["make", f"PYTHON={sys.executable}", *words],
        cwd=tree,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        **options,
    )
