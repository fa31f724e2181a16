"""docker/serving.Dockerfile on stand-ins for NVIDIA's images: Python of the system (24.02, 24.10),
and in a venv (26.07)."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from baking import docker
from project import ROOT

from scripts import build_base

pytestmark = pytest.mark.timeout(1200)
VENV = "/opt/venv-tritonserver"
INCLUDE = "python3-pip,python3-venv,python3-minimal,libpython3-stdlib,libstdc++6,ca-certificates"
# What NVIDIA's images have: numpy below 2, tensorrt_llm, pip, and their own tokenizers,
# which transformers there needs as it is.
STAND_IN = """FROM {base}
COPY certificates.crt /etc/ssl/certs/ca-certificates.crt
COPY pip.conf /etc/pip.conf
{venv}
RUN python3 -m pip install --no-cache-dir numpy==1.26.4 {system} \\
 && site=$(python3 -c 'import numpy, os; print(os.path.dirname(os.path.dirname(numpy.__file__)))') \\
 && mkdir -p $site/tensorrt_llm-1.2.1.dist-info $site/tensorrt_llm $site/tokenizers-0.19.1.dist-info $site/tokenizers \\
 && touch $site/tensorrt_llm/__init__.py $site/tokenizers/__init__.py \\
 && printf 'Metadata-Version: 2.1\\nName: tensorrt_llm\\nVersion: 1.2.1\\n' > $site/tensorrt_llm-1.2.1.dist-info/METADATA \\
 && printf 'Metadata-Version: 2.1\\nName: tokenizers\\nVersion: 0.19.1\\n' > $site/tokenizers-0.19.1.dist-info/METADATA
"""
KINDS = {
    "system": {"venv": "", "system": "--break-system-packages"},
    "venv": {"venv": f"RUN python3 -m venv {VENV}\nENV PATH={VENV}/bin:$PATH", "system": ""},
}
SEEN = """import importlib.metadata as m, json, sys
def found(name):
    try: return getattr(__import__(name), "__file__", "") or ""
    except ImportError: return None
names = ("numpy", "tensorrt_llm", "tokenizers", "tritonclient", "grpc", "hpack", "uvicorn", "httptools", "uvloop", "jinja2")
print(json.dumps({"files": {n: found(n) for n in names}, "tokenizers": m.version("tokenizers"), "trtllm": m.version("tensorrt_llm")}))"""


@pytest.fixture(scope="module")
def debian(daemon: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Debian with pip and venv."""
    tar = tmp_path_factory.mktemp("debian") / "base.tar"
    words = ["mmdebstrap", "--quiet", "--variant=essential", f"--include={INCLUDE}", build_base.SUITE, str(tar)]
    subprocess.run(words, check=True, timeout=600, stdin=subprocess.DEVNULL)
    docker("import", str(tar), "bake-test/debian:1")
    yield "bake-test/debian:1"
    docker("image", "rm", "--force", "bake-test/debian:1", check=False)


def pip_conf() -> str:
    """This machine's way to a package index, for pip in a container: what is not a path of this machine."""
    done = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    found = {line.split("=")[0].split(".")[-1]: line.split("=", 1)[1].strip("'") for line in done.stdout.splitlines()}
    kept = {key: value for key, value in found.items() if key in ("index-url", "trusted-host", "default-timeout")}
    return "[global]\n" + "".join(f"{key} = {value}\n" for key, value in kept.items())


@pytest.fixture(scope="module", params=KINDS)
def images(
    debian: str, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[tuple[str, str, str]]:
    """(kind, the stand-in for NVIDIA's image, what serving.Dockerfile makes of it)."""
    kind: str = request.param
    context = tmp_path_factory.mktemp(kind)
    shutil.copyfile("/etc/ssl/certs/ca-certificates.crt", context / "certificates.crt")
    (context / "pip.conf").write_text(pip_conf() + "cert = /etc/ssl/certs/ca-certificates.crt\n")
    (context / "Dockerfile").write_text(STAND_IN.format(base=debian, **KINDS[kind]))
    base, serving = f"bake-test/nvidia-{kind}:1", f"bake-test/serving-{kind}:1"
    docker("build", "--network", "host", "--tag", base, str(context), timeout=600)
    words = ["build", "--network", "host", "--file", str(ROOT / "docker/serving.Dockerfile"), "--target", "serving"]
    words += ["--tag", serving]
    docker(*words, "--build-arg", f"BASE={base}", str(ROOT / "requirements"), timeout=600)
    yield kind, base, serving
    docker("image", "rm", "--force", base, serving, check=False)


def seen(image: str, python: str = "python3") -> dict[str, Any]:
    said = docker("run", "--rm", "--network", "none", "--entrypoint", "", image, python, "-c", SEEN).stdout
    return dict(json.loads(said))


def test_serving_sees_its_own_packages_and_those_of_the_image(images: tuple[str, str, str]) -> None:
    kind, base, serving = images
    found, before = seen(serving), seen(base)
    assert None not in found["files"].values(), found
    assert found["trtllm"] == "1.2.1" and found["files"]["numpy"] == before["files"]["numpy"]
    assert found["files"]["numpy"].startswith(VENV) == (kind == "venv")
    ours = {name for name, file in found["files"].items() if file.startswith("/opt/bake/")}
    assert ours == set(found["files"]) - {"numpy", "tensorrt_llm"}
    # the text models and the tokenizer room use one tokenizers, whatever the image has
    [wanted] = [
        line.split()[0]
        for line in (ROOT / "requirements/openai.txt").read_text().splitlines()
        if line.startswith("tokenizers==")
    ]
    assert f"tokenizers=={found['tokenizers']}" == wanted


def test_nothing_that_the_image_holds_is_replaced(images: tuple[str, str, str]) -> None:
    kind, base, serving = images
    python = f"{VENV}/bin/python3" if kind == "venv" else "/usr/bin/python3"
    assert seen(serving, python) == seen(base, python)
