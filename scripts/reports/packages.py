"""Reports about Python packages and interpreters."""

from __future__ import annotations

import sys
from typing import Sequence

from scripts.reports.problem import Problem, make

# modules whose package is in another list, not in run.txt or torch.txt
LISTED = {"gguf": ["gguf"], "yaml": ["gguf"], "huggingface_hub": ["fetch"], "obstore": ["fetch"]}


def install(lists: Sequence[str]) -> tuple[str, str]:
    """(advice, command) to install packages. The command installs only into a virtual environment."""
    if sys.prefix == sys.base_prefix:
        return "Leave PYTHON unset; `make` then installs the packages into .venv:", make("serve", PYTHON="")
    words = " ".join(f"-r requirements/{name}.txt" for name in lists)
    return (
        "Install the packages into that Python, or leave PYTHON unset so that make installs them into .venv:",
        f"{sys.executable} -m pip install --no-deps --require-hashes {words}",
    )


def package_missing(module: str) -> Problem:
    lists = LISTED.get(module.partition(".")[0], ["run", "torch"])
    files = ", ".join(f"requirements/{name}.txt" for name in lists)
    return Problem(
        f"no package {module}",
        sys.executable,
        f"The interpreter {sys.executable} lacks the module {module}. The interpreter needs the packages of {files}.",
        *install(lists),
    )


def interpreter_missing(value: str) -> Problem:
    return Problem(
        "no such interpreter",
        value,
        f"PYTHON is {value}, which does not run as Python. It must be a CPython with the packages of "
        "requirements/run.txt and torch.txt.",
        "Leave PYTHON unset; `make` then installs the packages into .venv:",
        make("serve", PYTHON=""),
    )


def verify_package_missing(module: str) -> Problem:
    return Problem(
        f"no package {module}",
        sys.executable,
        f"The interpreter {sys.executable} lacks the module {module}. `make verified` needs it to run Hugging "
        "Face's model. requirements/verify.txt has it.",
        *install(["verify"]),
    )


def no_grpc_client() -> Problem:
    return Problem(
        "no package tritonclient",
        sys.executable,
        f"The interpreter {sys.executable} lacks tritonclient. The text models use its gRPC client to reach the "
        "engine.",
        "With ENGINE=tensorrt, leave BASE_IMAGE and PYTHON unset: make then adds the package to NVIDIA's image. Or "
        "install it yourself:",
        f"{sys.executable} -m pip install --no-deps --require-hashes -r requirements/openai.txt",
    )


def openai_package_missing(module: str) -> Problem:
    return Problem(
        f"no package {module}",
        sys.executable,
        f"The interpreter {sys.executable} lacks {module}. The OpenAI-compatible endpoint needs the packages of "
        "requirements/openai.txt.",
        *install(["openai"]),
    )
