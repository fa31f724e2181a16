"""ENGINE=tensorrt from weights to streamed text and the accuracy gate, with stand-ins for docker, GPUs and trtllm-build.
What the servers of all versions say is in tests/test_rehearsed_server.py."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from project import ROOT, make
from rehearsing import verify
from safetensors.torch import load_file, save_file
from server import free_ports
from triton_requests import STORY

GPUS = "2x V100-SXM2-16GB"


def rehearse(tree: Path, *words: str, docker: str = "no") -> subprocess.CompletedProcess[str]:
    names = ("HTTP_PORT", "GRPC_PORT", "METRICS_PORT", "OPENAI_PORT")
    ports = [f"{name}={port}" for name, port in zip(names, free_ports(4))]
    return make(tree, *words, "ENGINE=tensorrt", *ports, REHEARSAL_DOCKER=docker)


def test_a_demo_of_the_version_that_the_gpu_decides(tree: Path) -> None:
    done = rehearse(tree, "demo", f"REHEARSAL={GPUS}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tree / "build/stories/rehearsal-tensorrt-0.14.0-tp2-float16/engines/manifest.json").is_file()
    assert any(line.startswith(STORY) for line in done.stdout.splitlines()), done.stdout
    rooms = ("checkpoint", "engines", "model_repo", "serve")
    told = [line for line in done.stdout.splitlines() if line.split(" ")[0] in rooms]
    assert told and all("[rehearsal]" in line for line in told), told


def test_a_rehearsal_refuses_what_the_gpus_cannot(tree: Path) -> None:
    done = rehearse(tree, "engines", f"REHEARSAL={GPUS}", "TOOLCHAIN=0.14.0", "DTYPE=bfloat16")
    assert done.returncode != 0
    assert "bfloat16" in done.stderr and "V100" in done.stderr


def test_a_rehearsal_with_the_torch_engine_is_a_slip(tree: Path) -> None:
    done = make(tree, "serve", f"REHEARSAL={GPUS}")
    assert done.returncode != 0 and "REHEARSAL" in done.stderr


def test_a_rehearsal_names_its_gpus(tree: Path) -> None:
    done = rehearse(tree, "engines", "REHEARSAL=1")
    assert done.returncode != 0 and "REHEARSAL CANNOT BE 1" in done.stderr and "2x A100-80GB" in done.stderr


def stand_in(name: str, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "REHEARSAL_PYTHON": sys.executable, "REHEARSAL_DOCKER": "no", **variables}
    program = ROOT / "docker/rehearsal" / name
    return subprocess.run(
        [str(program), *words], capture_output=True, text=True, env=environment, timeout=60, check=False
    )


def test_the_stand_ins_take_nothing_but_what_the_tables_have(tmp_path: Path) -> None:
    """A flag that a version does not have ends the rehearsal as it would end the real build."""
    for version in json.loads((ROOT / "docker/toolchains.json").read_text()):
        done = stand_in(
            "container/trtllm-build", "--checkpoint_dir", str(tmp_path), "--max_batch", "8", REHEARSAL_TRTLLM=version
        )
        assert done.returncode == 2 and "unrecognized arguments" in done.stderr, done.stderr
    done = stand_in("host/docker", "run", "--rm", "--init", "--privileged", "image", "true")
    assert done.returncode == 2 and "docker run" in done.stderr
    done = stand_in("host/docker", "push", "image")
    assert done.returncode == 1 and "does not know" in done.stderr


# --- the same through a real docker ---


def docker_says(*words: str) -> str:
    """Empty if docker is missing or its daemon does not answer."""
    if not shutil.which("docker"):
        return ""
    return subprocess.run(["docker", *words], capture_output=True, text=True, timeout=60, check=False).stdout.strip()


def test_a_docker_daemon_runs_what_the_makefile_says(tree: Path) -> None:
    if not docker_says("version", "--format", "{{.Server.Version}}"):
        pytest.skip("no docker daemon answers")
    if not docker_says("images", "--quiet", "trtllm-bake-rehearsal"):
        pytest.skip(f'docker has no trtllm-bake-rehearsal: make demo ENGINE=tensorrt REHEARSAL="{GPUS}" makes it')
    shutil.rmtree(tree / "build/stories/rehearsal-tensorrt-0.14.0-tp2-float16", ignore_errors=True)
    done = rehearse(tree, "demo", "TOOLCHAIN=0.14.0", f"REHEARSAL={GPUS}", docker="yes")
    assert done.returncode == 0, done.stdout + done.stderr
    assert any(line.startswith(STORY) for line in done.stdout.splitlines()), done.stdout
    lines = [line for line in done.stdout.splitlines() if "in place of" in line]
    assert len(lines) >= 4 and all(line.startswith("rehearsal   in docker, ") for line in lines), lines


# a docker that keeps what it is told to run, and can all but what the file `cannot` lists
DOCKER = """#!/bin/sh
here=$(dirname "$0")
while read -r words; do case "$*" in *"$words"*) exit 1 ;; esac; done <"$here/cannot"
[ "$1" != run ] || printf '%s\\n' "$@" >"$here/run"
"""
FLAGS = ["run", "--rm", "--init", "--pull", "never", "--user", "7:8", "--workdir", "/w"]
FLAGS += ["--volume", "/w:/w", "--env", "ROOM_ARGS", "--entrypoint"]


@pytest.fixture
def docker(tmp_path: Path) -> Path:
    """A folder for PATH with that docker and no mmdebstrap."""
    for name in ("dirname", "python3"):
        (tmp_path / name).symlink_to(sys.executable if name == "python3" else str(shutil.which(name)))
    (tmp_path / "docker").write_text(DOCKER)
    (tmp_path / "docker").chmod(0o755)
    (tmp_path / "cannot").touch()
    return tmp_path


def docker_is_told(docker: Path, *words: str, cannot: str = "") -> list[str]:
    """What docker is told when the Makefile says `docker run FLAGS '' words`; without --env and --volume,
    which come with the stand-ins."""
    (docker / "cannot").write_text(cannot)
    done = stand_in("host/docker", *FLAGS, "", *words, PATH=str(docker), REHEARSAL_DOCKER="", REHEARSAL_GPUS=GPUS)
    assert done.returncode == 0 and "in docker" in done.stdout, done.stdout + done.stderr
    [*run] = (docker / "run").read_text().splitlines()
    assert run[: len(FLAGS) + 1] == [*FLAGS, ""]
    rest = run[len(FLAGS) + 1 :]
    added = [i for i, word in enumerate(rest) if word in ("--env", "--volume")]
    assert f"REHEARSAL_GPUS={GPUS}" in rest and all(rest[i + 1].endswith(":ro") for i in added if rest[i] == "--volume")
    return [word for i, word in enumerate(rest) if i not in added and i - 1 not in added]


def test_docker_gets_the_makefiles_flags_but_for_image_and_gpus(docker: Path) -> None:
    limits = ["--shm-size", "8g", "--ulimit", "memlock=-1", "--ulimit", "stack=67108864"]
    *flags, image, python, m, script = docker_is_told(
        docker, "--network", "none", "--gpus", "all", *limits, "nvidia", "python3", "-m", "scripts.x"
    )
    assert flags == ["--network", "none", *limits]
    assert image.startswith("trtllm-bake-rehearsal:") and [python, m, script] == [sys.executable, "-m", "scripts.x"]
    *flags, _, _, host = docker_is_told(docker, "--publish", "127.0.0.1:8:8", "nvidia", "python3", "0.0.0.0")
    assert (flags, host) == (["--publish", "127.0.0.1:8:8"], "0.0.0.0")


def test_docker_without_a_bridge_or_the_right_to_raise_limits_still_rehearses(docker: Path) -> None:
    """As a daemon in a container or a sandbox is. Nothing may listen on more addresses than the user named."""
    cannot = "network inspect bridge\n--ulimit memlock=-1 trtllm\n"
    limits = ["--ulimit", "memlock=-1", "--ulimit", "stack=1"]
    *flags, _, _, host = docker_is_told(
        docker, "--publish", "127.0.0.1:8:8", *limits, "nvidia", "python3", "0.0.0.0", cannot=cannot
    )
    assert flags == ["--publish", "127.0.0.1:8:8", "--ulimit", "stack=1", "--network", "host"]
    assert host == "127.0.0.1"


def test_where_no_image_can_be_made_the_report_knows_the_way_round(docker: Path) -> None:
    (docker / "cannot").write_text("image inspect\n")
    words = [*FLAGS, "", "nvidia", "python3"]
    done = stand_in("host/docker", *words, PATH=str(docker), REHEARSAL_DOCKER="")
    assert done.returncode == 1 and "NO IMAGE FOR THE REHEARSAL" in done.stderr and "mmdebstrap" in done.stderr
    assert done.stderr.strip().splitlines()[-1].strip().startswith("REHEARSAL_DOCKER=no make demo")


# --- the accuracy gate over the engines of a rehearsal ---

VERIFIED = "0.14.0"


def test_the_gate_finds_a_tensor_in_another_ranks_place(tree: Path, tmp_path: Path) -> None:
    words = [f"TOOLCHAIN={VERIFIED}", f"REHEARSAL={GPUS}"]
    assert rehearse(tree, "engines", *words).returncode == 0 and make(tree, "hf").returncode == 0
    engines = tmp_path / "engines"
    shutil.copytree(tree / f"build/stories/rehearsal-tensorrt-{VERIFIED}-tp2-float16/engines", engines)
    ranks = [load_file(engines / f"rank{rank}.engine") for rank in range(2)]
    name = "transformer.layers.3.attention.dense.weight"
    ranks[0][name], ranks[1][name] = ranks[1][name], ranks[0][name]
    for rank, tensors in enumerate(ranks):
        (engines / f"rank{rank}.engine").unlink()
        save_file(tensors, engines / f"rank{rank}.engine")
    done = verify(tree, VERIFIED, GPUS, engines, tmp_path / "verified")
    assert (done.returncode, (tmp_path / "verified").exists()) == (1, False), done.stderr
    report = json.loads((tmp_path / "verified.partial/report.json").read_text())
    assert [check["name"] for check in report["checks"] if not check["passed"]]
    assert "the engine says something else" in done.stderr.lower() and "Traceback" not in done.stderr


def test_the_stand_in_for_the_runtime_takes_nothing_but_what_the_table_has() -> None:
    code = """
from tensorrt_llm.runtime import ModelRunner
for call, given in ((ModelRunner.from_dir, {"engine_dir": ".", "tp": 2}), (ModelRunner.from_dir, {"rank": 0}),
                    (ModelRunner.generate, {"self": None, "batch_input_ids": [], "max_tokens": 5})):
    try:
        call(**given)
    except TypeError as error:
        print(error)
"""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT / "docker/rehearsal/container"),
        "REHEARSAL_TRTLLM": VERIFIED,
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert [line.partition("unknown ")[2] for line in done.stdout.splitlines()] == [
        "['tp'], missing []",
        "[], missing ['engine_dir']",
        "['max_tokens'], missing []",
    ], done.stderr
