"""docker/chart lints, fits the strict schemas of Kubernetes and of two operators, and refuses contradictions.
make chart."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from helming import CHART, Helm, Render, case, one, pod_of
from project import ROOT

from scripts import chart, reports, settings
from scripts.nvidia import gpus
from scripts.nvidia import memory as memory_model
from scripts.serving import collector, launch
from scripts.serving.collector import check_collector

CASES = sorted((CHART / "ci").glob("*.yaml"))
# the oldest that the chart takes, the newest that there are schemas for, and two between them
VERSIONS = ["1.27.0", "1.30.0", "1.33.0", "1.37.0"]
DIGEST = "sha256:" + "a" * 64


# --- it lints, and the schemas take it ---


@pytest.mark.parametrize("values", CASES, ids=lambda path: path.stem)
def test_helm_lint_has_nothing_to_say(helm: Helm, values: Path) -> None:
    done = helm("lint", "--strict", "--quiet", str(CHART), "--values", str(values))
    assert done.returncode == 0, done.stdout + done.stderr


def strict(model: Any) -> dict[str, Any]:
    """The JSON schema of a custom resource's model, made to refuse what it does not name."""
    # Go's regular expressions take a flag anywhere, Python's at the start
    text = json.dumps(model.model_json_schema(by_alias=True)).replace('"^(?i)', '"(?i)^')
    schema: dict[str, Any] = json.loads(text)
    for part in (schema, *schema.get("$defs", {}).values()):
        if "properties" in part:
            part.setdefault("additionalProperties", False)
    return schema


@pytest.fixture(scope="session")
def check() -> Callable[[dict[str, Any], str], None]:
    """Raises if a resource is not one, for Kubernetes by its own strict schema, for operators by their models'."""
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="requirements/chart.txt is not installed")
    import jsonschema
    from cloudcoil.models.keda import v1alpha1 as keda
    from cloudcoil.models.prometheus_operator import v1 as prometheus

    custom = {
        model.__name__: strict(model)
        for model in (keda.ScaledObject, prometheus.ServiceMonitor, prometheus.PrometheusRule)
    }

    def run(resource: dict[str, Any], version: str) -> None:
        if resource["kind"] in custom:
            jsonschema.validate(resource, custom[resource["kind"]])
        else:
            kubernetes_validate.validate(resource, version, strict=True)

    return run


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("values", CASES, ids=lambda path: path.stem)
def test_every_resource_fits_the_strict_schema(render: Render, check: Any, values: Path, version: str) -> None:
    resources = render(values, kube_version=version)
    for resource in resources:
        check(resource, version)
    assert len({(resource["kind"], resource["metadata"]["name"]) for resource in resources}) == len(resources)
    assert all(resource["metadata"]["namespace"] == "models" for resource in resources)


def test_all_kinds_are_in_the_cases(render: Render) -> None:
    kinds = {resource["kind"] for values in CASES for resource in render(values)}
    assert kinds == {
        "Deployment", "Service", "NetworkPolicy", "PodDisruptionBudget", "ConfigMap",
        "HorizontalPodAutoscaler", "ScaledObject", "ServiceMonitor", "PrometheusRule",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "place"),
    [("Deployment", "spec"), ("ServiceMonitor", "spec"), ("ScaledObject", "spec"), ("PrometheusRule", "spec")],
)
def test_the_schemas_refuse_a_word_that_is_not_theirs(render: Render, check: Any, kind: str, place: str) -> None:
    resource = one(render(case("keda")), kind)
    resource[place]["replica"] = 1
    with pytest.raises(Exception, match="replica"):
        check(resource, VERSIONS[-1])


def test_the_example_for_more_hosts_has_pods_that_kubernetes_takes(check: Any) -> None:
    [example] = [
        found
        for found in yaml.safe_load_all((ROOT / reports.charts.MULTI_NODE).read_text())
        if found["kind"] == "LeaderWorkerSet"
    ]
    template = example["spec"]["leaderWorkerTemplate"]
    # its custom resource, leaderworkerset.x-k8s.io/v1
    assert set(template) <= {
        "leaderTemplate",
        "workerTemplate",
        "size",
        "restartPolicy",
        "resizePolicy",
        "subGroupPolicy",
    }
    for role in ("leaderTemplate", "workerTemplate"):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {**template[role]["metadata"], "name": role}}
        for version in VERSIONS:
            check({**pod, "spec": template[role]["spec"]}, version)


# --- what is in a pod ---


def test_the_image_is_named_by_digest_alone(render: Render, helm: Helm) -> None:
    [server] = pod_of(render(case("cpu")))["containers"]
    assert re.fullmatch(r"trtllm-bake/stories@sha256:[0-9a-f]{64}", server["image"])
    for changes in ("image.digest=latest", "image.repository=stories:1.0", "image.tag=1.0"):
        done = helm("template", "x", str(CHART), "--values", str(case("cpu")), "--set", changes)
        assert done.returncode != 0 and "image" in done.stderr, changes
    done = helm("template", "x", str(CHART))
    assert done.returncode != 0 and "make chart MODEL=" in done.stderr


def test_a_pod_may_do_no_more_than_serve(render: Render) -> None:
    for path in CASES:
        pod = pod_of(render(path))
        [server] = pod["containers"]
        assert server["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert (
            pod["securityContext"]["runAsNonRoot"]
            and pod["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault"
        )
        assert pod["automountServiceAccountToken"] is False
        # a Service called `openai` would otherwise set OPENAI_PORT=tcp://..., which the server reads
        assert pod["enableServiceLinks"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)


def test_gpus_follow_the_ranks_and_their_product(render: Render) -> None:
    pod = pod_of(render(case("keda")))
    [server] = pod["containers"]
    assert server["resources"]["limits"]["nvidia.com/gpu"] == server["resources"]["requests"]["nvidia.com/gpu"] == 8
    [term] = pod["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    wanted = {each["key"]: each["values"] for each in term["matchExpressions"]}
    assert wanted == {
        "nvidia.com/gpu.product": ["NVIDIA-H100-80GB-HBM3"],
        "nvidia.com/gpu.compute.major": ["9"],
        "nvidia.com/gpu.compute.minor": ["0"],
    }
    assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in pod["tolerations"]
    pod = pod_of(render(case("cpu")))
    assert "affinity" not in pod and "tolerations" not in pod and "nvidia" not in json.dumps(pod)


def test_a_pod_has_time_for_all_that_ending_takes(render: Render) -> None:
    """The hook, the lame duck, the drain, and 20 s beyond it: what docker/compose.yaml leaves the server too."""
    pod = pod_of(render(case("cpu")))
    [server] = pod["containers"]
    grace = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())["services"]["server"]["stop_grace_period"]
    grace = re.sub(r"\$\{STOP_SECONDS:-(\d+)\}", r"\1", grace)
    assert pod["terminationGracePeriodSeconds"] == 5 + 5 + int(grace.rstrip("s"))
    environment = {each["name"]: each["value"] for each in server["env"]}
    assert environment["DRAIN_SECONDS"] == str(launch.DRAIN_SECONDS)
    pod = pod_of(render(case("keda")))
    assert pod["terminationGracePeriodSeconds"] == 5 + 10 + 60 + 20


def test_triton_stays_on_loopback(render: Render) -> None:
    """HOST and OPENAI_HOST apart."""
    [server] = pod_of(render(case("cpu")))["containers"]
    environment = {each["name"]: each["value"] for each in server["env"]}
    assert environment["HOST"] == "127.0.0.1"
    assert environment["OPENAI_HOST"] == "0.0.0.0"


def test_nobody_but_the_endpoint_is_reachable(render: Render) -> None:
    resources = render(case("cpu"))
    assert one(resources, "NetworkPolicy")["spec"]["ingress"] == [{"ports": [{"protocol": "TCP", "port": 9000}]}]
    assert one(resources, "NetworkPolicy")["spec"]["egress"] == []
    assert [port["port"] for port in one(resources, "Service")["spec"]["ports"]] == [9000]
    opened = one(render(case("keda")), "NetworkPolicy")["spec"]["ingress"]
    assert [[port["port"] for port in rule["ports"]] for rule in opened] == [[9000], [8000, 8001, 8002]]
    assert all(rule["from"] for rule in opened)


def test_keys_come_from_a_secret_as_a_folder(render: Render) -> None:
    """A subPath would keep the file that was there at the start; a folder follows the Secret."""
    pod = pod_of(render(case("keda")))
    [server] = pod["containers"]
    [mount] = [each for each in server["volumeMounts"] if each["name"] == "keys"]
    assert mount == {"name": "keys", "mountPath": "/run/keys", "readOnly": True}
    assert {"name": "API_KEY_FILE", "value": "/run/keys/keys"} in server["env"]
    assert [each["secret"]["defaultMode"] for each in pod["volumes"] if each["name"] == "keys"] == [0o440]


def test_traces_go_to_a_collector_and_its_token_comes_from_a_secret(render: Render) -> None:
    """Values that the server takes: what each variable says is checked as the server checks it."""
    [server] = pod_of(render(case("keda")))["containers"]
    given = {each["name"]: each for each in server["env"]}
    assert given["TRACES"]["value"] == "on"
    check_collector({name: each["value"] for name, each in given.items() if "value" in each})
    headers = given["OTEL_EXPORTER_OTLP_HEADERS"]
    assert headers["valueFrom"] == {"secretKeyRef": {"name": "collector", "key": "headers"}} and "value" not in headers
    assert "TRACES" not in {each["name"] for each in pod_of(render(case("cpu")))["containers"][0]["env"]}


def test_every_variable_of_a_pod_is_one_that_the_server_reads(render: Render) -> None:
    """The chart's own, with values that fit the settings' table."""
    for path in CASES:
        [server] = pod_of(render(path))["containers"]
        for each in server["env"]:
            if each["name"] in settings.BY_NAME:
                assert settings.fits(settings.BY_NAME[each["name"]], each["value"]), each
            else:
                assert each["name"] in collector.NAMES, each


def test_probes_volumes_and_spreading_are_as_the_manual_says(render: Render) -> None:
    """docs/operations.md, Probes; numbers that a rollout lives on."""
    pod = pod_of(render(case("cpu")))
    [server] = pod["containers"]
    asked = [
        (server[f"{kind}Probe"]["httpGet"], server[f"{kind}Probe"]["periodSeconds"])
        for kind in ("startup", "readiness", "liveness")
    ]
    token, alive = {"path": "/health", "port": "openai"}, {"path": "/health/live", "port": "openai"}
    assert asked == [(token, 5), (token, 5), (alive, 10)]
    startup = server["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] == launch.STARTUP_SECONDS
    # /health itself waits 5 s for a token (HEALTH_SECONDS)
    assert min(startup["timeoutSeconds"], server["readinessProbe"]["timeoutSeconds"]) > 5
    assert server["lifecycle"]["preStop"]["exec"]["command"][-1] == "import time; time.sleep(5)"
    volumes = {each["name"]: each["emptyDir"] for each in pod["volumes"]}
    assert volumes == {"tmp": {"sizeLimit": "1Gi"}, "shm": {"medium": "Memory", "sizeLimit": "1Gi"}}
    assert {each["mountPath"] for each in server["volumeMounts"]} == {"/tmp", "/dev/shm"}
    assert {each["topologyKey"] for each in pod["topologySpreadConstraints"]} == {
        "kubernetes.io/hostname",
        "topology.kubernetes.io/zone",
    }
    budget = one(render(case("cpu")), "PodDisruptionBudget")["spec"]
    assert (budget["maxUnavailable"], budget["unhealthyPodEvictionPolicy"]) == (1, "AlwaysAllow")
    pod = pod_of(render(case("keda")))
    assert {"key": "dedicated", "operator": "Equal", "value": "llm", "effect": "NoSchedule"} in pod["tolerations"]
    assert pod["nodeSelector"] == {"pool": "gpu"} and pod["runtimeClassName"] == "nvidia"


def test_a_canary_is_reached_through_its_groups_service_and_belongs_to_its_own_deployment(render: Render) -> None:
    canary = render(case("canary"), release="stories-canary")
    labels = one(canary, "Deployment")["spec"]["template"]["metadata"]["labels"]
    stable = render(case("cpu"))
    assert one(stable, "Service")["spec"]["selector"].items() <= labels.items()
    assert not [found for found in canary if found["kind"] == "Service"]
    for kind, place in (
        ("Deployment", "selector"),
        ("NetworkPolicy", "podSelector"),
        ("PodDisruptionBudget", "selector"),
    ):
        own = one(stable, kind)["spec"][place]["matchLabels"]
        assert not own.items() <= labels.items(), f"{kind} of the stable release takes the canary's pods"


def test_autoscalers_own_the_number_of_replicas(render: Render) -> None:
    assert one(render(case("cpu")), "Deployment")["spec"]["replicas"] == 1
    for name, kind in (("keda", "ScaledObject"), ("hpa", "HorizontalPodAutoscaler")):
        resources = render(case(name))
        assert "replicas" not in one(resources, "Deployment")["spec"]
        scaler = one(resources, kind)
        assert scaler["spec"]["scaleTargetRef"]["name"] == one(resources, "Deployment")["metadata"]["name"]
        assert "bake_num_requests_waiting" in json.dumps(scaler) and "bake_num_requests_running" in json.dumps(scaler)


def test_alerts_and_dashboard_are_those_of_docker_dashboards(render: Render) -> None:
    resources = render(case("keda"))
    alerts = yaml.safe_load((ROOT / "docker/dashboards/alerts.yaml").read_text())
    assert one(resources, "PrometheusRule")["spec"] == alerts
    [board] = one(resources, "ConfigMap")["data"].values()
    assert json.loads(board) == json.loads((ROOT / "docker/dashboards/trtllm-bake.json").read_text())


def test_metrics_are_scraped_where_the_table_says(render: Render) -> None:
    table = json.loads((ROOT / "docker/dashboards/metrics.json").read_text())
    resources = render(case("keda"))
    monitor, service = one(resources, "ServiceMonitor")["spec"], one(resources, "Service")
    ports = {port["name"]: port["port"] for port in service["spec"]["ports"]}
    scraped = {ports[each["port"]]: each["path"] for each in monitor["endpoints"]}
    assert scraped == {table[part]["port"]: table[part]["path"] for part in ("endpoint", "triton")}
    # the alerts ask for up{job=...}
    assert service["metadata"]["labels"][monitor["jobLabel"]] == table["endpoint"]["job"]
    assert monitor["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("gpu.count=16", "docs/operations.md"),
        ("gpu.count=4", "each rank has a GPU"),
        ("autoscaling.min=9", "autoscaling.max"),
        ("autoscaling.prometheus=", "KEDA has to know"),
        ("autoscaling.min=0", "/autoscaling/min"),
        ("rollout.maxUnavailable=0", "no pod could ever be replaced"),
        ("service.enabled=false", "group"),
        ("group=x,service.enabled=false", "serviceMonitor"),
        ("drainSecond=10", "drainSecond"),
        ("drainSeconds=soon", "drainSeconds"),
        ("drainSeconds=0", "drainSeconds"),
        ("env.HOST=1.2.3.4", "HOST"),
        ("env.METRICS=off", "live on /metrics"),
        ("env.OTEL_EXPORTER_OTLP_HEADERS=secret", "OTEL_EXPORTER_OTLP_HEADERS"),
        ("traces.endpoint=", "traces.headersSecret"),
        ("traces.endpoint=http://user:secret@collector:4318", "/traces/endpoint"),
        ("networkPolicy.egress=[]", "docs/operations.md, 'Traces'"),
        ("env.API_KEY_FILE=/tmp/keys", "API_KEY_FILE"),
        ("networkPolicy.tritonFrom=[]", "tritonFrom"),
    ],
)
def test_values_that_cannot_be_are_refused_with_the_reason(helm: Helm, change: str, said: str) -> None:
    flag = "--set-json" if change.endswith("[]") else "--set"
    done = helm("template", "x", str(CHART), "--values", str(case("keda")), flag, change)
    assert done.returncode != 0 and said in done.stderr, done.stderr


# --- make chart: from a passport to values ---


def config_of(tp_size: int = 2, **changes: Any) -> dict[str, Any]:
    """The engines' config.json of Llama 2 70B, as TensorRT-LLM writes the parts that count."""
    model = {
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8, "vocab_size": 32000, "head_size": 128, "dtype": "float16", "quantization": {"quant_algo": None},
        "mapping": {"world_size": tp_size, "tp_size": tp_size, "pp_size": 1}, **changes,
    }  # fmt: skip
    built = {"max_batch_size": 16, "max_input_len": 2048, "max_seq_len": 4096, "max_num_tokens": 4096}
    return {"pretrained_config": model, "build_config": built}


def passport_of(kind: str = "tensorrt", target: str = "", gpu: str = "NVIDIA H100 80GB HBM3") -> dict[str, Any]:
    built = {"name": gpu, "memory_bytes": 81559 << 20, "compute_capability": "9.0", "driver": "580.1"}
    return {
        "model": "Llama-2-70B Chat",
        "revision": "0123456",
        "engine": {"kind": kind, "gpu": built if kind == "tensorrt" else None},
        "rooms": {"wheels": {"manifest": {"arguments": {"target": target} if target else {}}}},
    }


def found(passport: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    return chart.values(passport, chart.engine_of(config), "registry.example/llama", DIGEST, 8)


def test_tensorrt_engines_go_where_they_were_built(render: Render, check: Any, tmp_path: Path) -> None:
    values = found(passport_of(), config_of(8))
    assert values["gpu"]["count"] == values["worldSize"] == 8 and values["gpu"]["products"] == ["NVIDIA-H100-80GB-HBM3"]
    assert values["gpu"]["computeCapability"] == "9.0" and values["sharedMemory"] == "8Gi"
    # as make plan counts them: all engines pass through the host's memory
    engine_bytes = memory_model.checkpoint_bytes(chart.engine_of(config_of(8)))
    assert int(values["resources"]["limits"]["memory"][:-2]) << 30 > engine_bytes > 137e9
    assert values["autoscaling"] == {"waitingPerPod": 8, "runningPerPod": 12}
    written = tmp_path / "values.yaml"
    written.write_text(chart.as_yaml(values, ["a comment"]))
    assert yaml.safe_load(written.read_text()) == values
    for resource in render(written):
        check(resource, VERSIONS[-1])


def test_the_torch_engine_takes_any_gpu_that_is_large_enough() -> None:
    values = found(passport_of("torch", "cuda"), config_of(8))
    assert values["gpu"]["products"] == [] and values["gpu"]["computeCapability"] == ""
    # 138 GB of weights among 8 ranks, and room for one request of 4096 tokens
    assert 17_000 < values["gpu"]["memoryMiB"] < 30_000
    assert found(passport_of("torch", "cpu"), config_of(8))["gpu"]["count"] == 0


def test_memory_on_a_cpu_is_what_make_plan_says() -> None:
    engine = chart.engine_of(config_of(2))
    memory = int(found(passport_of("torch", "cpu"), config_of(2))["resources"]["requests"]["memory"][:-2]) << 30
    programs = memory - memory_model.torch_host_bytes(engine)
    assert 1 << 30 < programs < 4 << 30


@pytest.mark.parametrize(
    ("kind", "target", "tp_size"), [("tensorrt", "", 8), ("torch", "cuda", 4), ("torch", "cpu", 2)]
)
def test_memory_is_make_plans_and_what_lies_in_shared_memory(kind: str, target: str, tp_size: int) -> None:
    """The plan's row `serve`, whole GiB."""
    values = found(passport_of(kind, target), config_of(tp_size))
    engine, on_gpus = chart.engine_of(config_of(tp_size)), target != "cpu"
    planned = memory_model.serve_bytes(engine, on_gpus) + memory_model.program_bytes(engine.world_size, on_gpus)
    shared = int(values["sharedMemory"][:-2]) << 30
    asked = int(values["resources"]["requests"]["memory"][:-2]) << 30
    assert 0 <= asked - planned - shared < 1 << 30


def refusal(tp_size: int, node: str, **passport: Any) -> reports.Problem:
    host = gpus.assumed(node) if node else []
    with pytest.raises(reports.Problem) as raised:
        chart.check_host(passport_of(**passport), chart.engine_of(config_of(tp_size)), node, host)
    return raised.value


def test_more_ranks_than_a_host_has_gpus_are_refused_with_fewer() -> None:
    problem = refusal(8, "4x H100-80GB")
    assert (
        "one host cannot hold" in problem.title and "8 ranks (TP 8)" in problem.seen and "a host has 4" in problem.seen
    )
    assert problem.report().splitlines()[-1].split() == ["make", "chart", "TP=4"]


def test_a_model_that_no_number_of_ranks_brings_onto_a_host_is_shown_the_way_to_more_hosts() -> None:
    problem = refusal(8, "2x L4", kind="torch", target="cuda")
    last = problem.report().splitlines()[-1].strip()
    assert last == f"less {reports.charts.MULTI_NODE}" and (ROOT / reports.charts.MULTI_NODE).is_file()
    problem = refusal(2, "2x L4", kind="torch", target="cuda")
    assert "for a single request of 4096 tokens; a L4 has" in problem.seen


def test_without_a_host_eight_gpus_are_the_most() -> None:
    assert "a host has 8" in refusal(16, "").seen
    chart.check_host(passport_of(), chart.engine_of(config_of(8)), "", [])
    chart.check_host(passport_of(), chart.engine_of(config_of(8)), "8x H100-80GB", gpus.assumed("8x H100-80GB"))
    chart.check_host(passport_of("torch", "cpu"), chart.engine_of(config_of(16)), "", [])


def test_a_host_whose_gpus_are_not_known_is_a_report() -> None:
    assert chart.host_of("") == [] and len(chart.host_of("2x L4")) == 2
    with pytest.raises(reports.Problem) as raised:
        chart.host_of("eight H100s")
    assert "NODE is 'eight H100s'" in raised.value.seen
    assert raised.value.report().splitlines()[-1].strip() == "make chart NODE='8x H100-80GB'"


def test_engines_for_another_generation_are_refused() -> None:
    assert "8.0" in refusal(8, "8x A100-80GB").seen


@pytest.mark.parametrize(
    ("image", "name", "digest"),
    [
        ("stories", "stories", DIGEST),
        ("stories:1.0", "stories", DIGEST),
        ("registry.example:5000/models/llama:1.0", "registry.example:5000/models/llama", DIGEST),
        ("localhost:5000/llama", "localhost:5000/llama", DIGEST),
        (f"registry.example/llama@sha256:{'b' * 64}", "registry.example/llama", f"sha256:{'b' * 64}"),
    ],
)
def test_an_images_name_loses_its_tag_and_keeps_its_digest(helm: Helm, image: str, name: str, digest: str) -> None:
    assert chart.named(image, DIGEST) == (name, digest)
    done = helm("template", "x", str(CHART), "--values", str(case("cpu")), "--set", f"image.repository={name}")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("image", ["", "Stories", "a b", "-x", "a//b", "x@sha256:12", "$(id)", "a:b:c"])
def test_what_is_not_an_images_name_is_refused(image: str) -> None:
    with pytest.raises(reports.Problem, match="not the name of an image"):
        chart.named(image, DIGEST)


@pytest.mark.parametrize(
    ("model", "name"),
    [("Llama-2-70B Chat", "llama-2-70b-chat"), ("__", "model"), ("a" * 60, "a" * 53), ("x." * 40, "x-" * 26 + "x")],
)
def test_release_names_are_such_that_helm_takes_them(model: str, name: str) -> None:
    assert chart.release_name(model) == name


def run_chart(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "scripts.chart", *words]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False, env={**os.environ, **environment}
    )


def test_a_release_that_was_not_pushed_and_an_image_that_was_not_baked_are_reported(tmp_path: Path) -> None:
    words = ("--root", str(tmp_path), "--output", str(tmp_path / "values.yaml"))
    done = run_chart(*words, "--release", str(tmp_path / "dist/stories-1.2.3"))
    assert done.returncode == 1 and "THE RELEASE IS NOT PUSHED" in done.stderr and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].strip().startswith("make push VERSION=1.2.3 IMAGE=")
    done = run_chart(*words)
    assert done.returncode == 1 and "Traceback" not in done.stderr and "make" in done.stderr.strip().splitlines()[-1]
    assert not list(tmp_path.iterdir())
