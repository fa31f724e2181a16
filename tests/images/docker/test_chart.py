"""The chart and the image agree: what the chart says about a pod is what the image's labels say and what a container
does."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from baking import Baked, Container, docker
from helming import Helm, Render, one, pod_of
from project import make
from server import free_ports
from waiting import until

from scripts import settings

pytestmark = pytest.mark.timeout(1500)
KEY = "a-key-of-the-test"
PORTS = {name.partition("_")[0].lower(): port for name, port in settings.PORTS.items()}


@pytest.fixture(scope="module")
def values(baked: Baked) -> Path:
    """What `make chart` writes for the bundled model's image."""
    done = make(baked.tree, "chart", "NODE=2x L4")
    assert done.returncode == 0, done.stdout + done.stderr
    written = baked.variant / "chart" / "values.yaml"
    assert f"helm upgrade --install stories docker/chart --values {written.relative_to(baked.tree)}" in done.stdout
    return written


@pytest.fixture(scope="module")
def pod(values: Path, render: Render) -> dict[str, Any]:
    return pod_of(render(values))


@pytest.fixture(scope="module")
def config(baked: Baked) -> dict[str, Any]:
    """The image's own configuration."""
    return dict(json.loads(docker("image", "inspect", baked.tag).stdout)[0]["Config"])


def status(url: str, key: str = "") -> int:
    """The status of a GET; 0 if there is no answer."""
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"} if key else {})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def gibibytes(quantity: str) -> int:
    assert quantity.endswith("Gi"), quantity
    return int(quantity[:-2])


# --- with the image's configuration ---


def test_values_name_the_baked_image(baked: Baked, values: Path, pod: dict[str, Any]) -> None:
    layers = json.loads((baked.variant / "image/layers.json").read_text())
    assert pod["containers"][0]["image"] == f"trtllm-bake/stories@{layers['manifest']}"
    written = yaml.safe_load(values.read_text())
    assert (written["worldSize"], written["gpu"]["count"], written["model"]) == (2, 0, "stories")
    assert not values.with_name("values.yaml.partial").exists()


def test_a_second_make_chart_bakes_nothing(baked: Baked, values: Path) -> None:
    before = values.read_bytes()
    done = make(baked.tree, "chart", "NODE=2x L4", "IMAGE=registry.example/models/stories:1.0")
    assert done.returncode == 0 and "->" not in done.stdout, done.stdout + done.stderr
    assert yaml.safe_load(values.read_text())["image"]["repository"] == "registry.example/models/stories"
    done = make(baked.tree, "chart", "NODE=2x L4")
    assert done.returncode == 0 and values.read_bytes() == before


def test_user_and_writable_folders_are_the_images(config: dict[str, Any], pod: dict[str, Any]) -> None:
    who = pod["securityContext"]
    assert f"{who['runAsUser']}:{who['runAsGroup']}" == config["User"] and who["runAsNonRoot"] is True
    [server] = pod["containers"]
    mounted = {mount["mountPath"] for mount in server["volumeMounts"]}
    assert mounted == {*config["Volumes"], "/dev/shm"} and server["securityContext"]["readOnlyRootFilesystem"] is True


def test_ports_are_the_images(config: dict[str, Any], values: Path, helm: Helm, render: Render, tmp_path: Path) -> None:
    assert [port["containerPort"] for port in pod_of(render(values))["containers"][0]["ports"]] == [9000]
    exposed = tmp_path / "exposed.yaml"
    exposed.write_text(values.read_text() + "triton: {expose: true}\n")
    resources = render(exposed)
    opened = {port["name"]: port["containerPort"] for port in pod_of(resources)["containers"][0]["ports"]}
    assert opened == PORTS and {f"{port}/tcp" for port in opened.values()} == set(config["ExposedPorts"])
    assert {port["name"]: port["port"] for port in one(resources, "Service")["spec"]["ports"]} == PORTS


def test_probes_have_the_patience_of_the_images_health_check(config: dict[str, Any], pod: dict[str, Any]) -> None:
    [server] = pod["containers"]
    startup = server["startupProbe"]
    start_seconds = config["Healthcheck"]["StartPeriod"] / 1e9
    assert startup["periodSeconds"] * startup["failureThreshold"] == start_seconds
    # /health itself waits so long for a token
    from scripts.openai import app

    assert server["readinessProbe"]["timeoutSeconds"] > app.HEALTH_SECONDS
    # the pod names no command: the image's entry point starts the server
    assert "command" not in server and "args" not in server
    assert server["lifecycle"]["preStop"]["exec"]["command"][0] == config["Entrypoint"][0]


# --- with a container ---


def flags_of(pod: dict[str, Any], secret: Path) -> list[str]:
    """docker's words for what the pod's specification says of its one container."""
    [server] = pod["containers"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    who = pod["securityContext"]
    memory = gibibytes(server["resources"]["limits"]["memory"]) << 30
    flags = ["--user", f"{who['runAsUser']}:{who['runAsGroup']}", "--memory", str(memory)]
    flags += ["--read-only", "--security-opt", "no-new-privileges"]
    flags += [word for name in server["securityContext"]["capabilities"]["drop"] for word in ("--cap-drop", name)]
    flags += [word for each in server["env"] for word in ("--env", f"{each['name']}={each['value']}")]
    for mount in server["volumeMounts"]:
        volume, place = volumes[mount["name"]], mount["mountPath"]
        if "secret" in volume:
            flags += ["--volume", f"{secret}:{place}:ro"]
        elif place == "/dev/shm":
            flags += ["--shm-size", f"{gibibytes(volume['emptyDir']['sizeLimit'])}g"]
        else:
            flags += ["--tmpfs", f"{place}:uid={who['runAsUser']},gid={who['fsGroup']},mode=0770"]
    return flags


LISTENING = """
import pathlib
lines = [line.split() for name in ("tcp", "tcp6") for line in pathlib.Path("/proc/net", name).read_text().splitlines()[1:]]
found = {(fields[1].split(":")[0], int(fields[1].split(":")[1], 16)) for fields in lines if fields[3] == "0A"}
print(sorted({port for address, port in found if not address.endswith("0100007F")}))
"""


def test_a_container_run_as_the_chart_says_answers_its_probes_and_ends_in_its_time(
    values: Path, run: Callable[..., Container], render: Render, tmp_path: Path
) -> None:
    wanted = tmp_path / "values.yaml"
    # and with traces, though no collector is there
    more = "keys: {secret: stories-keys}\ntriton: {expose: true}\nnetworkPolicy: {egress: [{}]}\n"
    wanted.write_text(values.read_text() + more + "traces: {endpoint: 'http://127.0.0.1:4318'}\n")
    pod = pod_of(render(wanted))
    [server] = pod["containers"]
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "keys").write_text(f"{KEY}\n")
    (secret / "keys").chmod(0o444)
    secret.chmod(0o755)
    ports = dict(zip(PORTS, free_ports(len(PORTS))))
    publish = [f"--publish=127.0.0.1:{ports[port['name']]}:{port['containerPort']}" for port in server["ports"]]
    container = run(*flags_of(pod, secret), *publish)

    def answers(probe: str) -> int:
        asked = server[probe]["httpGet"]
        return status(f"http://127.0.0.1:{ports[asked['port']]}{asked['path']}")

    until(lambda: answers("startupProbe") == 200 or not container.inspect()["State"]["Running"], container.logs)
    assert container.inspect()["State"]["Running"], container.logs
    # as the kubelet asks: without a key
    assert {probe: answers(probe) for probe in ("readinessProbe", "livenessProbe")} == {
        "readinessProbe": 200,
        "livenessProbe": 200,
    }
    models = f"http://127.0.0.1:{ports['openai']}/v1/models"
    assert (status(models), status(models, KEY)) == (401, 200)
    assert "--traces\0on" in container.python(
        "import pathlib; print(*(p.read_text() for p in pathlib.Path('/proc').glob('[0-9]*/cmdline')))"
    )
    # mpirun opens two ports more, of any number; no Service and no NetworkPolicy lets anybody reach them
    assert {port["containerPort"] for port in server["ports"]} <= set(json.loads(container.python(LISTENING)))
    assert container.python("import os; print(os.getuid())").strip() == str(pod["securityContext"]["runAsUser"])
    hook = server["lifecycle"]["preStop"]["exec"]["command"]
    docker("exec", container.name, *hook)
    assert answers("readinessProbe") == 200, "the hook must not end the server"
    docker("stop", "--time", str(pod["terminationGracePeriodSeconds"]), container.name)
    assert container.inspect()["State"]["ExitCode"] == 0 and "serve       ended" in container.logs, container.logs
