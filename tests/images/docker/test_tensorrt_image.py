"""ENGINE=tensorrt: the same Dockerfile on a stand-in with the layout of NVIDIA's image;
GPUs and engines come from a rehearsal."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from baking import Baked, committed, docker
from project import ROOT, copy_of_project, make

from scripts import build_base, room
from scripts.nvidia import contracts

pytestmark = pytest.mark.timeout(1500)
VERSION = "0.14.0"
REPORTED = contracts.reported(VERSION)
VENV = "/opt/venv-tritonserver"
WORDS = ("ENGINE=tensorrt", f"TOOLCHAIN={VERSION}", "REHEARSAL=2x A100-80GB")
# Python in a virtual environment, as image 26.07 has it; /opt/tritonserver as in NVIDIA's container, mpirun, the Python
# package tensorrt_llm, and an nvidia-smi for the GPUs of REHEARSAL_GPUS
STAND_IN = f"""FROM BASE
COPY project /rehearsal
RUN python3 -m venv --without-pip {VENV}
ENV PATH={VENV}/bin:$PATH
RUN mkdir -p /opt/tritonserver/bin /opt/tritonserver/backends/tensorrtllm \\
 && ln -s /rehearsal/docker/rehearsal/host/nvidia-smi /usr/bin/nvidia-smi \\
 && printf '#!/bin/sh\\n[ "$1" = --version ] && echo "mpirun (Open MPI) 4.1.7" || exit 9\\n' > /usr/bin/mpirun \\
 && printf '#!/bin/sh\\nexit 9\\n' > /opt/tritonserver/bin/tritonserver && chmod +x /usr/bin/mpirun /opt/tritonserver/bin/tritonserver \\
 && site=$(python3 -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && mkdir -p $site/tensorrt_llm-{REPORTED}.dist-info \\
 && printf 'Metadata-Version: 2.1\\nName: tensorrt_llm\\nVersion: {REPORTED}\\n' > $site/tensorrt_llm-{REPORTED}.dist-info/METADATA \\
 && echo 'origin = "the base"' > $site/numpy.py && cp $site/numpy.py $site/tensorrt_llm.py
"""


@pytest.fixture(scope="module")
def stand_in(baked: Baked, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    context = tmp_path_factory.mktemp("stand_in")
    base = build_base.base_tag(room.read_manifest(baked.tree / "build/ground-torch-cpu/base"))
    (context / "Dockerfile").write_text(STAND_IN.replace("BASE", base, 1))
    for part in ("scripts", "docker"):
        shutil.copytree(ROOT / part, context / "project" / part, ignore=shutil.ignore_patterns("__pycache__"))
    docker("build", "--tag", "bake-test/nvidia:1", str(context))
    yield "bake-test/nvidia:1"
    docker("image", "rm", "--force", "bake-test/nvidia:1", check=False)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return committed(copy_of_project(tmp_path_factory.mktemp("tensorrt") / "tree"))


@pytest.fixture(scope="module")
def tag(tree: Path, stand_in: str) -> Iterator[str]:
    done = make(tree, "image", *WORDS, f"BASE_IMAGE={stand_in}", timeout=1200, REHEARSAL_DOCKER="no")
    assert done.returncode == 0, done.stdout + done.stderr
    [described] = tree.glob("build/stories/rehearsal-tensorrt-*/image/layers.json")
    name = json.loads(described.read_text())["tag"]
    yield name
    docker("image", "rm", "--force", name, check=False)


def test_the_engines_are_a_layer_a_rank_and_the_base_stays_as_it_is(tree: Path, tag: str, stand_in: str) -> None:
    ours, base = (json.loads(docker("image", "inspect", name).stdout)[0] for name in (tag, stand_in))
    layers = base["RootFS"]["Layers"]
    assert ours["RootFS"]["Layers"][: len(layers)] == layers
    labels = ours["Config"]["Labels"]
    assert labels["trtllm-bake.engine"] == "tensorrt" and labels["trtllm-bake.rehearsal"] == "yes"
    assert (labels["trtllm-bake.compute_capability"], labels["trtllm-bake.trtllm"]) == ("8.0", REPORTED)
    words = (*WORDS, f"BASE_IMAGE={stand_in}")
    described = json.loads(make(tree, "size", *words, "JSON=1", REHEARSAL_DOCKER="no").stdout)
    assert [layer["instruction"] for layer in described["layers"] if "rank" in layer["instruction"]] == [
        "COPY rank0 /srv/engines",
        "COPY rank1 /srv/engines",
    ]
    # 2 % of what a 7B model's engines take in float16 (13.5 GB), base apart
    assert described["added_bytes"] < 0.02 * 13.5e9, described


def test_its_python_sees_the_bases_packages_and_its_own(tag: str) -> None:
    """A venv made from a venv sees the system's packages, not those of the first:
    the base's numpy and tensorrt_llm would be missing."""
    code = "import numpy, tensorrt_llm, grpc, hpack; print(numpy.__file__, tensorrt_llm.__file__, grpc.__file__, hpack.__file__)"
    said = docker(
        "run", "--rm", "--network", "none", "--entrypoint", "/opt/venv/bin/python", tag, "-c", code
    ).stdout.split()
    assert all(file.startswith(f"{VENV}/") for file in said[:2]) and all(
        file.startswith("/opt/venv/") for file in said[2:]
    ), said


def test_it_says_how_docker_gives_it_gpus(tree: Path, tag: str, stand_in: str) -> None:
    done = make(tree, "image", *WORDS, f"BASE_IMAGE={stand_in}", REHEARSAL_DOCKER="no")
    assert "docker run --rm --gpus all --shm-size 8g" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("gpus", "title"),
    [
        ("1x A100-80GB", "NOT ENOUGH GPUS"),
        ("2x H100-80GB", "ENGINE DOES NOT FIT THIS GPU"),
        ("2x A100-80GB", "/DEV/SHM IS TOO SMALL"),
    ],
)
def test_a_host_that_will_not_do_is_refused_before_anything_is_loaded(tag: str, gpus: str, title: str) -> None:
    done = docker("run", "--rm", "--env", f"REHEARSAL_GPUS={gpus}", tag, check=False)
    assert done.returncode == 1 and title in done.stderr and "Traceback" not in done.stderr, done.stdout + done.stderr


def test_a_base_of_another_tensorrt_llm_is_refused(tree: Path, stand_in: str) -> None:
    words = ("ENGINE=tensorrt", "TOOLCHAIN=1.2.1", "REHEARSAL=2x A100-80GB", f"BASE_IMAGE={stand_in}")
    done = make(tree, "image", *words, timeout=1200, REHEARSAL_DOCKER="no")
    assert done.returncode != 0 and "THE BASE HAS ANOTHER TENSORRT-LLM" in done.stderr, done.stdout + done.stderr
    assert "1.2.1" in done.stderr and REPORTED in done.stderr


def test_a_rehearsal_is_not_released(tree: Path) -> None:
    table = tree / "docker/toolchains.json"
    assert '"digest": null' in table.read_text()
    done = make(tree, "release", *WORDS, "VERSION=1.0.0", "INFERRED=accept", REHEARSAL_DOCKER="no")
    assert done.returncode != 0 and "IS NOT PINNED" in done.stderr
