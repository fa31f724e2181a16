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
        f"The interpreter {sys.executable} lacks the module {module}. It needs the packages of {', '.join(files)}.",
        "Install them there, or leave PYTHON unset so that make installs them into .venv:",
        f"{sys.executable} -m pip install --no-deps --require-hashes {' '.join(f'-r {file}' for file in files)}",
    )


def interpreter_missing(value: str) -> Problem:
    return Problem(
        "no such interpreter",
        value,
        f"PYTHON is {value}, which does not run as Python. It must be a CPython with the packages of requirements/run.txt and torch.txt.",
        "Leave PYTHON unset, and make installs the packages into .venv:",
        make("serve", PYTHON=""),
    )


def verify_package_missing(module: str) -> Problem:
    return Problem(
        f"no package {module}",
        sys.executable,
        f"The interpreter {sys.executable} lacks the module {module}, which `make verified` uses to ask Hugging Face's model. "
        "requirements/verify.txt has it.",
        "Install it there, or leave PYTHON unset so that make installs it into .venv:",
        f"{sys.executable} -m pip install --no-deps --require-hashes -r requirements/verify.txt",
    )


def openai_package_missing(module: str) -> Problem:
    return Problem(
        f"no package {module}",
        sys.executable,
        f"The interpreter {sys.executable} lacks {module}. The OpenAI-compatible endpoint needs the packages of requirements/openai.txt.",
        "Install it there, or leave PYTHON unset so that make installs it into .venv:",
        f"{sys.executable} -m pip install --no-deps --require-hashes -r requirements/openai.txt",
    )
