"""ENGINE=tensorrt from weights to streamed text for every supported version, with stand-ins for docker, GPUs and trtllm-build."""

import json
import os
import subprocess
from pathlib import Path
from typing import List

import pytest
from conftest import ROOT, free_ports, make
from test_journey import STORY

VERSIONS: List[str] = list(json.loads((ROOT / "docker/toolchains.json").read_text()))
GPUS = "2x V100-SXM2-16GB"


def rehearse(tree: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    names = ("HTTP_PORT", "GRPC_PORT", "METRICS_PORT")
    ports = [f"{name}={port}" for name, port in zip(names, free_ports(3))]
    return make(tree, *words, "ENGINE=tensorrt", *ports)


@pytest.mark.parametrize("version", VERSIONS)
def test_every_version_serves_text(tree: Path, version: str) -> None:
    gpus = (
        GPUS
        if "7.0" in json.loads((ROOT / "docker/toolchains.json").read_text())[version]["architectures"]
        else "2x A100-80GB"
    )
    done = rehearse(tree, "demo", f"TOOLCHAIN={version}", f"REHEARSAL={gpus}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert any(line.startswith(STORY) for line in done.stdout.splitlines()), done.stdout
    rooms = ("checkpoint", "engines", "model_repo", "serve")
    told = [line for line in done.stdout.splitlines() if line.split(" ")[0] in rooms]
    assert told and all("[rehearsal]" in line for line in told), told
    [engines] = (tree / "build/stories").glob(f"rehearsal-tensorrt-{version}-*/engines")
    facts = json.loads((engines / "manifest.json").read_text())["facts"]
    assert facts["rehearsal"] is True
    assert facts["gpu"]["compute_capability"] == ("7.0" if gpus == GPUS else "8.0")
    log = (engines.parent / "serve.log").read_text()
    assert "rehearsal: the torch engine stands in for TensorRT-LLM" in log
    config = (engines.parent / "model_repo/tensorrt_llm/config.pbtxt").read_text()
    assert 'backend: "tensorrtllm"' in config
    assert [path.name for path in (engines.parent / "model_repo/tensorrt_llm/1").iterdir()] == [".keep"]


def test_the_gpu_decides_which_version_is_rehearsed(tree: Path) -> None:
    done = rehearse(tree, "engines", f"REHEARSAL={GPUS}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tree / "build/stories/rehearsal-tensorrt-0.14.0-tp2-float16/engines/manifest.json").is_file()


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


def stand_in(name: str, *words: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "REHEARSAL_PYTHON": "python3", **variables}
    program = ROOT / "docker/rehearsal" / name
    return subprocess.run(
        [str(program), *words], capture_output=True, text=True, env=environment, timeout=60, check=False
    )


def test_the_stand_ins_take_nothing_but_what_the_tables_have(tmp_path: Path) -> None:
    """A flag that a version does not have ends the rehearsal as it would end the real build."""
    for version in VERSIONS:
        done = stand_in(
            "container/trtllm-build", "--checkpoint_dir", str(tmp_path), "--max_batch", "8", REHEARSAL_TRTLLM=version
        )
        assert done.returncode == 2 and "unrecognized arguments" in done.stderr, done.stderr
    done = stand_in("host/docker", "run", "--rm", "--init", "--privileged", "image", "true")
    assert done.returncode == 2 and "docker run" in done.stderr
    done = stand_in("host/docker", "push", "image")
    assert done.returncode == 1 and "does not know" in done.stderr
