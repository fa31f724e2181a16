"""Fixtures that tests share: a copy of the project, and one served model. Helpers are in tests/support."""

from __future__ import annotations

import functools
import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from project import ROOT, copy_of_project
from server import Served, alive, processes_below, serve

# `make test-long`: fifty times as many examples
settings.register_profile("long", max_examples=5000, deadline=None)

# fixtures of tests/images/docker, and of the chart's tests
pytest_plugins = ["baking", "helming"]
sys.path.insert(0, str(ROOT))

# A shell that starts this in the background makes it ignore Ctrl-C, and so would every program that a test starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A python3 on PATH may be a shim (pyenv's), which takes ten times as long as what it starts; tests start hundreds.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).resolve().parent), os.environ["PATH"]])

# What `make test` tells its children about itself is not for the makes that tests type, nor for the reports they read.
# And tests start hundreds of Pythons: without bytecode each would compile the same modules again.
for name in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "BAKE_SETTINGS", "BAKE_GOAL", "PROMPT", "PYTHONDONTWRITEBYTECODE"):
    os.environ.pop(name, None)


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project, for tests that only add to it."""
    return copy_of_project(tmp_path_factory.mktemp("project") / "tree")


@pytest.fixture
def own_tree(tmp_path: Path) -> Path:
    """A copy of the project that a test may break."""
    return copy_of_project(tmp_path / "tree")


@pytest.fixture(scope="session")
def served(tree: Path) -> Iterator[Served]:
    """The bundled model at TP=2, served for the whole run; ended by SIGTERM, which must leave nothing behind."""
    running = serve(tree)
    below = processes_below(running.process.pid)
    yield running
    status = running.end()
    left = {pid: name for pid, name in below.items() if alive(pid)}
    assert (status, left) == (0, {}), "".join(running.lines)


@pytest.hookimpl(tryfirst=True)  # before xdist reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With xdist: a module stays on one worker, and all that asks the shared server is one group. That group begins
    first, then modules that start servers or fill rooms, so that the short ones fill the rest of the time."""
    for item in items:
        item.add_marker(pytest.mark.xdist_group("served" if asks_the_shared_server(item) else str(item.path)))
    items.sort(key=lambda item: (not asks_the_shared_server(item), not is_long(item.path)))


def asks_the_shared_server(item: pytest.Item) -> bool:
    return "served" in getattr(item, "fixturenames", ())


@functools.cache
def is_long(path: Path) -> bool:
    """Whether a module starts servers, or types make."""
    return re.search(r"\b(serve|make|begin)\(", path.read_text()) is not None
