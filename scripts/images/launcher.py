"""Which files of this project are in an image: what its entry points import or start,
and the tables that these read."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Iterator

from scripts.making import ingredients

ROOT = ingredients.ROOT
# The image's program. It and its imports name the programs that they start in the form of `-m`:
# "scripts.serving.processes".
ENTRY = "scripts.images.entry"
DATA = (
    "scripts/openai/page.html",
    "scripts/openai/vendored/LICENSES.txt",
    "scripts/openai/vendored/markdown-it.umd.min.js",
    "docker/toolchains.json",
    "docker/gpus.json",
)
# Reports may name any module; they start none.
STARTS_NOTHING = "scripts.reports"
PACKAGE = re.compile(r"scripts(\.\w+)+")


def path_of(module: str) -> Path:
    """The path of a module: its file, or its package's; for what is not a module, a path that does not exist."""
    place = ROOT / module.replace(".", "/")
    return place / "__init__.py" if place.is_dir() else place.with_suffix(".py")


def named_in(module: str) -> Iterator[str]:
    """The project's modules that a module imports or starts as programs. For a package, those of its __init__."""
    for node in ast.walk(ast.parse(path_of(module).read_bytes())):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and str(node.module).partition(".")[0] == "scripts":
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("scripts."))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and PACKAGE.fullmatch(node.value):
            yield from () if module.startswith(STARTS_NOTHING) else (node.value, f"{node.value}.__main__")


def modules(entry: str = ENTRY) -> list[str]:
    """An entry point, its needs, and the packages that contain these; as module names, sorted."""
    found: set[str] = set()
    queue = [entry]
    while queue:
        module = queue.pop()
        if module not in found and path_of(module).is_file():
            found.add(module)
            parts = module.split(".")
            queue += [".".join(parts[:n]) for n in range(1, len(parts))]
            queue += named_in(module)
    return sorted(found)


def files() -> list[str]:
    """Everything of this project that is in an image, relative to it; each is noted as an ingredient by its bytes."""
    found = [*(path_of(module).relative_to(ROOT).as_posix() for module in modules()), *DATA]
    for file in found:
        ingredients.note_content(file)
    return found
