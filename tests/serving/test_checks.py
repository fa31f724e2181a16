"""Before TensorRT engines are served, each cause of a hang or crash is found and reported with both values."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import stand_ins

from scripts import reports, room
from scripts.nvidia import gpus
from scripts.serving import checks, launch, ranks, toolbox
from scripts.serving.flag import Flag

V100 = "Tesla V100-SXM2-16GB, 16160, 7.0, 535.104.05"
FACTS: dict[str, Any] = {
    "engine": "tensorrt",
    "world_size": 2,
    "trtllm_version": "0.14.0",
    "trtllm_reported": "0.14.0.dev2024100100",
    "gpu": {"name": "Tesla V100-SXM2-16GB", "compute_capability": "7.0", "driver": "535.104.05"},
    "custom_all_reduce": None,
}
GPU = gpus.Gpu("Tesla V100-SXM2-16GB", 16160 << 20, "7.0", "535.104.05")
FIT = checks.Host(
    Path("build/llama/engines"),
    [GPU, GPU],
    gpus.Links(True, True),
    "0.14.0.dev2024100100",
    8 << 30,
    None,
    None,
    Path("/usr/bin/mpirun"),
)
Check = Callable[[dict[str, Any], checks.Host], None]


def check_driver(facts: dict[str, Any], host: checks.Host) -> None:
    checks.check_driver(facts, host, "525")


CHECKS = [
    checks.check_gpus,
    checks.check_links,
    checks.check_version,
    check_driver,
    checks.check_shared_memory,
    checks.check_mpi,
]


@pytest.mark.parametrize("check", CHECKS)
def test_a_host_like_the_one_they_were_built_on_passes(check: Check) -> None:
    check(FACTS, FIT)
    assert checks.remarks(FACTS, FIT) == []


@pytest.mark.parametrize(
    "check, changed, seen, command",
    [
        (checks.check_gpus, {"gpus": [GPU]}, ("2 ranks", "this machine has 1: "), "make serve TP=1"),
        (checks.check_gpus, {"gpus": []}, ("2 ranks", "this machine has 0."), "make doctor"),
        (
            checks.check_gpus,
            {"gpus": [GPU, gpus.Gpu("NVIDIA A100", 80 << 30, "8.0", "535.1")]},
            ("capability 7.0", "NVIDIA A100 has 8.0"),
            "rm -r build/llama/engines && make engines",
        ),
        (checks.check_version, {"trtllm_version": "1.2.1"}, ("0.14.0.dev2024100100", "1.2.1"), "TOOLCHAIN=0.14.0"),
        (
            checks.check_version,
            {"trtllm_version": "0.14.0"},
            ("0.14.0.dev2024100100", "0.14.0 is installed"),
            "TOOLCHAIN=0.14.0",
        ),
        (check_driver, {"gpus": [replace(GPU, driver="470.82.01")] * 2}, ("470.82.01", "525"), "nvidia-smi"),
        (checks.check_shared_memory, {"shared_memory_bytes": 64 << 20}, ("67 MB", "336 MB"), "/dev/shm"),
        (
            checks.check_mpi,
            {"mpirun": Path("/opt/hpcx/ompi/bin/mpirun")},
            ("not set", "/opt/hpcx"),
            "export OPAL_PREFIX=/opt/hpcx/ompi",
        ),
        (checks.check_mpi, {"opal_prefix": Path("/opt/nowhere")}, ("/opt/nowhere",), "export OPAL_PREFIX=/usr"),
    ],
)
def test_what_does_not_fit_is_named_with_both_values(
    check: Check, changed: dict[str, Any], seen: tuple[str, ...], command: str
) -> None:
    with pytest.raises(reports.Problem) as caught:
        check(FACTS, replace(FIT, **changed))
    report = " ".join(caught.value.report().split())
    assert not [word for word in seen if word not in report] and command in caught.value.command


@pytest.mark.parametrize("peer_access", [False, None])
def test_custom_all_reduce_is_not_served_where_gpus_do_not_reach_each_other(peer_access: bool | None) -> None:
    host = replace(FIT, links=gpus.Links(peer_access, True))
    checks.check_links({**FACTS, "custom_all_reduce": False}, host)
    checks.check_links({**FACTS, "custom_all_reduce": None}, host)  # the version decides at run time
    with pytest.raises(reports.Problem, match="do not reach each other"):
        checks.check_links({**FACTS, "custom_all_reduce": True}, host)


def test_what_stops_nothing_is_a_line() -> None:
    host = replace(
        FIT, memlock_bytes=8 << 20, trtllm_version=None, gpus=[replace(GPU, name="Tesla V100-SXM2-32GB")] * 2
    )
    lines = " ".join(checks.remarks(FACTS, host))
    assert "8.4 MB" in lines and "memlock=-1" in lines and "V100-SXM2-32GB" in lines and "not installed" in lines
    checks.check_version(FACTS, host)


# --- all ranks together ---


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    tools = toolbox.Toolbox(Path("tritonserver"), None, [Path(sys.prefix) / "lib"])
    return launch.server_environment(os.environ, tools, tmp_path, 2, os.cpu_count() or 1)


def with_mpirun(environment: dict[str, str], folder: Path, script: str) -> dict[str, str]:
    stand_ins.on_path(folder, "mpirun", script)
    return {**environment, "PATH": f"{folder}{os.pathsep}{environment['PATH']}"}


def test_ranks_that_reach_each_other_add_up(tmp_path: Path, environment: dict[str, str]) -> None:
    checks.check_all_reduce(2, environment, tmp_path, Flag())
    words = (tmp_path / "all_reduce/log").read_text()
    for rank in range(2):
        assert f"rank {rank}: MPI adds up over 2 ranks" in words and f"rank {rank}: gloo adds up over 2 ranks" in words


def test_one_rank_has_nobody_to_reach(tmp_path: Path) -> None:
    checks.check_all_reduce(1, {}, tmp_path, Flag())
    assert not list(tmp_path.iterdir())


def test_ranks_that_hang_are_ended_at_the_deadline(tmp_path: Path, environment: dict[str, str]) -> None:
    hanging = with_mpirun(
        environment, tmp_path / "bin", f"echo $$ > {tmp_path}/pid; echo NCCL waits; sleep 600; exit 0"
    )
    with pytest.raises(reports.Problem) as caught:
        checks.check_all_reduce(2, hanging, tmp_path, Flag(), seconds=1)
    assert "did not finish within 1 s" in caught.value.seen and "NCCL waits" in caught.value.seen
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}").exists()


def test_ranks_that_fail_are_quoted(tmp_path: Path, environment: dict[str, str]) -> None:
    failing = with_mpirun(
        environment, tmp_path / "bin", "echo 'NCCL WARN Cuda failure: peer access is not supported'; exit 6"
    )
    with pytest.raises(reports.Problem) as caught:
        checks.check_all_reduce(2, failing, tmp_path, Flag())
    assert "status 6" in caught.value.seen and "peer access is not supported" in caught.value.seen


def test_told_to_end_it_ends(tmp_path: Path, environment: dict[str, str]) -> None:
    asked_to_end = Flag()
    asked_to_end.set()
    started = time.monotonic()
    checks.check_all_reduce(2, with_mpirun(environment, tmp_path / "bin", "sleep 600"), tmp_path, asked_to_end)
    assert time.monotonic() - started < 60


def engines(folder: Path, facts: dict[str, Any]) -> Path:
    with room.filling(folder / "engines") as filling:
        filling.write_json("config.json", {})
        filling.facts = facts
    return folder / "engines"


def test_the_manifest_decides_which_checks_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ROOM_ARGS", raising=False)
    (tmp_path / "torch").mkdir()
    stand_ins.nvidia_smi(tmp_path, [V100])
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    environment = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    checks.check(engines(tmp_path / "torch", {"engine": "torch"}), environment, tmp_path, Flag())
    (tmp_path / "tensorrt").mkdir()
    room_of_two = engines(tmp_path / "tensorrt", FACTS)
    with pytest.raises(reports.Problem, match="not enough GPUs"):
        checks.check(room_of_two, environment, tmp_path, Flag())
    assert set(checks.CHECKS) == set(json.loads((ranks.PROJECT / "docker/engines.json").read_text()))
