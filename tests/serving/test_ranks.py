"""Which processes of a rank last, and are missed when they go."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.serving import processes
from scripts.serving.output import Output, open_log
from scripts.serving.processes import Process
from scripts.serving.ranks import Ranks


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Output]:
    made = open_log(tmp_path / "log", 8000)
    yield made
    made.close()


@pytest.fixture
def ranks(log: Output, tmp_path: Path) -> Iterator[Ranks]:
    """Over a program that waits; what the kernel says of it is made up in each test."""
    made = Ranks(["sleep", "600"], os.environ, tmp_path, tmp_path / "run", log)
    yield made
    made.end()


def seen(monkeypatch: pytest.MonkeyPatch, *there: Process) -> None:
    monkeypatch.setattr(processes, "of_session", lambda session, dead=False: {p.identity: p for p in there})


def process(pid: int, parent: int, name: str, rank: int | None = 0) -> Process:
    return Process(pid, started=pid, parent=parent, session=1, state="S", name=name, rank=rank)


def test_what_a_server_starts_for_a_moment_is_not_taken_for_the_server(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A busy machine takes its time over a look at /proc: the server is seen before it has its name, its child after."""
    mpirun = ranks.mpirun.pid
    child = process(90_002, 90_001, "tritonserver")
    seen(monkeypatch, process(90_001, mpirun, "prterun", None), child)
    assert ranks.failure() is None
    seen(monkeypatch, process(90_001, mpirun, "tritonserver"))
    assert ranks.failure() is None
    seen(monkeypatch, process(90_001, mpirun, "tritonserver"), child, process(90_003, 90_001, "bash"))
    assert ranks.failure() is None
    seen(monkeypatch, process(90_001, mpirun, "tritonserver"))
    assert ranks.failure() is None and ranks.settled_failure() is None


def test_a_server_and_its_models_are_missed(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    servers = [process(90_001 + rank, ranks.mpirun.pid, "tritonserver", rank) for rank in range(2)]
    model = process(90_005, 90_002, "triton_python_b", 1)
    seen(monkeypatch, *servers, model)
    assert ranks.failure() is None
    seen(monkeypatch, *servers)
    assert ranks.settled_failure() == (1, "its process triton_python_b (pid 90005) ended")
    assert ranks.model_lost
    seen(monkeypatch, servers[0], model)
    assert ranks.settled_failure() == (1, "its process tritonserver (pid 90002) ended")
