"""Reports about Python packages and interpreters."""

import sys

from scripts.reports.problem import Problem, make


def package_missing(module: str) -> Problem:
    # what only some weights need has a lock file of its own
    special = {"gguf": ["gguf"], "yaml": ["gguf"], "huggingface_hub": ["fetch"], "obstore": ["fetch"]}
    locks = special.get(module, ["run", "torch"])
    files = [f"requirements/{name}.txt" for name in locks]
    return Problem(
        f"no package {module}",
        sys.executable,
        f"The interpreter {sys.executable} lacks the module {module}; needed is what these pin: {', '.join(files)}.",
        "Install them there, or leave PYTHON unset so that make installs them into .venv:",
        f"{sys.executable} -m pip install --no-deps --require-hashes {' '.join(f'-r {file}' for file in files)}",
    )


def interpreter_missing(value: str) -> Problem:
    return Problem(
        "no such interpreter",
        value,
        f"PYTHON is {value}: no Python answers there. It has to be a CPython that has what requirements/run.txt and torch.txt pin.",
        "Leave PYTHON away, and make installs one into .venv:",
        make("serve", PYTHON=""),
    )


def verify_package_missing(module: str) -> Problem:
    return Problem(
        f"no package {module}",
        sys.executable,
        f"The interpreter {sys.executable} lacks the module {module}, with which Hugging Face's side of `make verified` is asked; "
        "requirements/verify.txt pins it.",
        "Install it there, or leave PYTHON unset so that make installs it into .venv:",
        f"{sys.executable} -m pip install --no-deps --require-hashes -r requirements/verify.txt",
    )


def openai_package_missing(module: str) -> Problem:
    return Problem(
        f"no package {module}",
        sys.executable,
        f"The interpreter {sys.executable} lacks {module}; the OpenAI-compatible endpoint needs what requirements/openai.txt pins.",
        "Install it there, or leave PYTHON unset so that make installs it into .venv:",
        f"{sys.executable} -m pip install --no-deps --require-hashes -r requirements/openai.txt",
    )
