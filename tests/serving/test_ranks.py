"""Which processes of a rank must last, and that the end of each is noticed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.serving import processes
from scripts.serving import ranks as ranks_module
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
    """A busy machine takes its time over a look at /proc: the server is seen before it has its name,
    its child after."""
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


@pytest.mark.parametrize(
    ("said", "finished"),
    [
        ("All models are stopped, unloading models", False),
        ("Timeout 19: Found 2 live models and 0 in-flight non-inference requests", False),
        ("Timeout 18: Found 0 live models and 0 in-flight non-inference requests", True),
    ],
)
def test_running_streams_are_waited_for_until_every_model_is_unloaded(
    log: Output, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, finished: bool
) -> None:
    """Triton 2.51 stops its models at once if answers run over gRPC; a text model is unloaded after its last one."""
    monkeypatch.setattr(ranks_module, "UNLOAD_SECONDS", 0.0)
    script = f"echo '[1,0]<stderr>: I1126 01:26:56.435641 29559 server.cc:345] \"{said}\"'; exec sleep 600"
    ranks = Ranks(["sh", "-c", script], os.environ, tmp_path, tmp_path / "run", log)
    try:
        while not ranks.tail(0):
            pass
        seen(monkeypatch, process(90_001, ranks.mpirun.pid, "tritonserver"))
        assert ranks.drain(0.3) is finished
        monkeypatch.undo()
    finally:
        ranks.end()
