"""Helpers for tests of the image: one image of the bundled model, baked by make in a separate clone,
and containers that are removed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from project import copy_of_project, make
from waiting import until

IGNORED = "build/\ndist/\n.venv/\n__pycache__/\n*.pyc\n"
PATIENCE_SECONDS = 180


def docker(*words: str, check: bool = True, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(["docker", *words], capture_output=True, text=True, timeout=timeout, check=False)
    assert not check or done.returncode == 0, f"docker {' '.join(words)}: {done.stdout}{done.stderr}"
    return done


@dataclass(frozen=True)
class Baked:
    """What `make image` left: the tree, its words, the image's name and digest."""

    tree: Path
    printed: str
    tag: str
    iid: str

    @property
    def variant(self) -> Path:
        return self.tree / "build/stories/torch-0.8.0-tp2-float16"


@dataclass
class Container:
    """One container for the test, under a name of which there is one only."""

    name: str

    @property
    def logs(self) -> str:
        done = docker("logs", self.name)
        return done.stdout + done.stderr

    def inspect(self) -> dict[str, Any]:
        return dict(json.loads(docker("inspect", self.name).stdout)[0])

    @property
    def health(self) -> str:
        return str(self.inspect()["State"]["Health"]["Status"])

    def wait_until_ready(self) -> None:
        until(lambda: "ready after" in self.logs or not self.inspect()["State"]["Running"], "ready")
        assert "ready after" in self.logs, self.logs

    def wait(self) -> int:
        return int(docker("wait", self.name, timeout=PATIENCE_SECONDS).stdout)

    def python(self, code: str, *flags: str) -> str:
        """Run Python in the container."""
        return docker("exec", *flags, self.name, "/opt/venv/bin/python", "-c", code).stdout


def committed(tree: Path) -> Path:
    """A tree as a fresh clone is: one commit, the same in every test run, and nothing else."""
    (tree / ".gitignore").write_text(IGNORED)
    who = {
        f"GIT_{role}_{what}": value
        for role in ("AUTHOR", "COMMITTER")
        for what, value in (("NAME", "a"), ("EMAIL", "a@example.org"), ("DATE", "2026-01-01T00:00:00Z"))
    }
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "all"]):
        subprocess.run(["git", *words], cwd=tree, check=True, timeout=60, env={**os.environ, **who})
    return tree


def bake(tree: Path, *words: str, **environment: str) -> Baked:
    done = make(tree, "image", *words, timeout=1200, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    described = json.loads((tree / "build/stories/torch-0.8.0-tp2-float16/image/layers.json").read_text())
    return Baked(tree, done.stdout, described["tag"], described["iid"])


@pytest.fixture(scope="session")
def daemon() -> str:
    """docker's version, or no test of the image."""
    if not shutil.which("docker"):
        pytest.skip("docker is not installed")
    done = docker("version", "--format", "{{.Server.Version}}", check=False)
    if done.returncode or not done.stdout.strip():
        pytest.skip("no docker daemon answers")
    if not shutil.which("mmdebstrap"):
        pytest.skip("mmdebstrap is not installed, which makes the image's base")
    return done.stdout.strip()


@pytest.fixture(scope="session")
def baked(daemon: str, tmp_path_factory: pytest.TempPathFactory) -> Baked:
    tree = committed(copy_of_project(tmp_path_factory.mktemp("image") / "tree"))
    return bake(tree, HF_TOKEN=PLANTED, META_URL=f"https://example.org/?{PLANTED}")


# in the environment of the make that bakes; it must not be found in any layer
PLANTED = "hf_planted_5b8e2f0c1d7a"


@pytest.fixture
def run(baked: Baked) -> Iterator[Callable[..., Container]]:
    """docker run in the background; every container goes with the test."""
    started: list[Container] = []

    def start(*flags: str, command: list[str] = [], image: str = "") -> Container:  # noqa: B006
        container = Container(f"bake-test-{uuid.uuid4().hex[:12]}")
        started.append(container)
        docker("run", "--detach", "--name", container.name, *flags, image or baked.tag, *command)
        return container

    yield start
    for container in started:
        docker("rm", "--force", "--volumes", container.name, check=False)
