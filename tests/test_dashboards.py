"""Dashboard and alerts read metrics that exist, promtool's unit tests pass,
and a real Prometheus answers every panel."""

from __future__ import annotations

import http.server
import json
import re
import shutil
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from project import ROOT
from server import free_ports

DASHBOARDS = ROOT / "docker" / "dashboards"
ALERTS, UNIT_TESTS = DASHBOARDS / "alerts.yaml", DASHBOARDS / "alerts.test.yaml"
DASHBOARD = json.loads((DASHBOARDS / "trtllm-bake.json").read_text())
TABLE = json.loads((DASHBOARDS / "metrics.json").read_text())
METRICS = {metric["name"]: metric for part in TABLE.values() if isinstance(part, dict) for metric in part["metrics"]}
# what Prometheus adds to every metric, and operators of Kubernetes to those of pods
TARGET_LABELS = {"job", "instance", "namespace", "pod", "le"}
PARTS = {"histogram": ("_bucket", "_sum", "_count")}
WORD = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
# what Grafana puts in place of its variables
VARIABLES = {"$__rate_interval": "1m", "$model": ".*", "$instance": ".*"}
SECONDS = 60


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]


def panels() -> list[dict[str, Any]]:
    return [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def expressions() -> list[tuple[str, str]]:
    """(where, PromQL) of every alert and of every panel's queries."""
    found = [(rule["alert"], rule["expr"]) for rule in rules()]
    for panel in panels():
        for target in panel["targets"]:
            text = target["expr"]
            for name, value in VARIABLES.items():
                text = text.replace(name, value)
            found.append((panel["title"], text))
    return found


def promtool(*words: str, cwd: Path = DASHBOARDS) -> subprocess.CompletedProcess[str]:
    if not shutil.which("promtool"):
        pytest.skip("promtool is not installed (Debian's package prometheus)")
    return subprocess.run(["promtool", *words], cwd=cwd, capture_output=True, text=True, timeout=SECONDS, check=False)


def series_of(text: str) -> Iterator[tuple[str, str]]:
    """(metric, matchers) of every selector in a PromQL expression."""
    for match in re.finditer(rf"({WORD.pattern})\s*(?:\{{([^}}]*)\}})?", re.sub(r'"[^"]*"', '""', text)):
        if match[1] in METRICS or match[1].startswith(("bake_", "nv_", "kube_", "up")):
            yield match[1], match[2] or ""


@pytest.mark.parametrize(("where", "text"), expressions())
def test_metrics_and_labels_are_those_of_the_table(where: str, text: str) -> None:
    seen = list(series_of(text))
    assert seen, text
    labels = set(TARGET_LABELS)
    for name, matchers in seen:
        if name == "up":
            continue
        base = re.sub(r"_(bucket|sum|count)$", "", name)
        metric = METRICS.get(name) or METRICS[base]
        assert name == metric["name"] or name[len(base) :] in PARTS.get(metric["type"], ()), name
        assert metric["type"] != "histogram" or name != base, f"{name}: a histogram has no series of its own name"
        assert metric["type"] != "counter" or re.search(rf"(rate|increase|resets)\({name}", text), (
            f"{name} is a counter"
        )
        for label in re.findall(rf"({WORD.pattern})\s*(?:=~|!~|!=|=)", matchers):
            assert label in {*metric["labels"], *TARGET_LABELS, "container"}, f"{name}: {label}"
        labels |= set(metric["labels"])
    for grouped in re.findall(r"by \(([^)]*)\)", text):
        assert {label.strip() for label in grouped.split(",")} <= labels, f"{where}: by ({grouped})"


def test_every_metric_of_the_endpoint_is_on_the_dashboard() -> None:
    text = " ".join(target["expr"] for panel in panels() for target in panel["targets"])
    assert [name for name in METRICS if name.startswith("bake_") and name not in text] == []


def test_the_table_has_the_names_that_were_agreed() -> None:
    """vLLM's names, so that whoever knows its dashboards knows these; the endpoint writes the same."""
    kinds = {"_seconds": "histogram", "_total": "counter"}
    for metric in TABLE["endpoint"]["metrics"]:
        kind = next((kind for end, kind in kinds.items() if metric["name"].endswith(end)), "gauge")
        assert metric["type"] == kind and "model_name" in metric["labels"] and metric["meaning"], metric
        assert not {"user", "key", "client"} & set(metric["labels"]), "per model, never per user"
    assert len(TABLE["endpoint"]["metrics"]) == 11


# --- alerts ---


def test_promtools_unit_tests_pass() -> None:
    done = promtool("check", "rules", "--lint-fatal", ALERTS.name)
    assert done.returncode == 0, done.stdout + done.stderr
    done = promtool("test", "rules", UNIT_TESTS.name)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("alert", [rule["alert"] for rule in rules()])
def test_the_unit_tests_see_an_alert_that_never_fires_and_one_that_always_does(alert: str, tmp_path: Path) -> None:
    shutil.copy2(UNIT_TESTS, tmp_path)
    for broken in ("vector(1) > 2", "vector(1)"):
        changed = yaml.safe_load(ALERTS.read_text())
        for rule in (rule for group in changed["groups"] for rule in group["rules"] if rule["alert"] == alert):
            rule.update(expr=broken)
            rule.pop("for", None)
        (tmp_path / ALERTS.name).write_text(yaml.safe_dump(changed))
        done = promtool("test", "rules", UNIT_TESTS.name, cwd=tmp_path)
        assert done.returncode != 0 and alert in done.stdout + done.stderr, broken


def test_every_alert_says_what_to_do() -> None:
    handbook = (ROOT / "docs" / "operations.md").read_text()
    sections = {title.strip().lower() for title in re.findall(r"^#+ (.+)$", handbook, re.MULTILINE)}
    for rule in rules():
        assert rule["labels"]["severity"] in ("page", "ticket"), rule
        assert rule["annotations"]["runbook"] == f"docs/operations.md#{rule['alert'].lower()}"
        assert rule["alert"].lower() in sections, f"docs/operations.md has no section {rule['alert']}"


# --- the dashboard ---


def test_grafanas_own_model_of_a_dashboard_keeps_every_word_of_it() -> None:
    """Its official library reads it and writes it again: a name that Grafana does not know would be gone."""
    pytest.importorskip("grafana_foundation_sdk", reason="requirements/chart.txt is not installed")
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.cog.plugins import register_default_plugins
    from grafana_foundation_sdk.models.dashboard import Dashboard

    register_default_plugins()
    written = json.loads(JSONEncoder(sort_keys=True).encode(Dashboard.from_json(DASHBOARD)))

    def kept(ours: Any, theirs: Any, where: str) -> None:
        if isinstance(ours, dict):
            for key, value in ours.items():
                assert key in theirs, f"{where}.{key}"
                kept(value, theirs[key], f"{where}.{key}")
        elif isinstance(ours, list):
            assert len(ours) == len(theirs), where
            for number, (value, other) in enumerate(zip(ours, theirs)):
                kept(value, other, f"{where}[{number}]")
        else:
            assert ours == theirs, where

    kept(DASHBOARD, written, "dashboard")


def test_an_import_asks_for_nothing_that_a_grafana_may_lack() -> None:
    """No data source by name, no plugin, panels that have one id each and do not lie on each other."""
    assert DASHBOARD["uid"] and "id" not in DASHBOARD and DASHBOARD["templating"]["list"][0]["type"] == "datasource"
    assert {panel["type"] for panel in DASHBOARD["panels"]} <= {"row", "timeseries", "stat"}
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    cells = [
        (x, y)
        for panel in DASHBOARD["panels"]
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(set(cells)) == len(cells) and max(x for x, _ in cells) < 24
    for panel in panels():
        for place in (panel, *panel["targets"]):
            assert place["datasource"] == {"type": "prometheus", "uid": "${datasource}"}, panel["title"]


# --- both in a real Prometheus ---


def page_of(metrics: list[dict[str, Any]], step: int) -> str:
    """A metrics page like the server's, growing with each step."""
    lines = []
    for metric in metrics:
        name, value = metric["name"], step if metric["type"] != "gauge" else 0.5
        for status in ("200", "429", "503") if "status" in metric["labels"] else ("",):
            given = {
                "status": status,
                "route": "/v1/completions",
                "model": "tensorrt_llm",
                "kv_cache_block_type": "used",
            }
            labels = ",".join(f'{label}="{given.get(label, label)}"' for label in metric["labels"])
            if metric["type"] == "histogram":
                lines += [f'{name}_bucket{{{labels},le="{le}"}} {value}' for le in ("0.1", "1", "+Inf")]
                lines += [f"{name}_sum{{{labels}}} {value}", f"{name}_count{{{labels}}} {value}"]
            else:
                lines.append(f"{name}{{{labels}}} {value}")
    return "\n".join(lines) + "\n"


@contextmanager
def served_pages() -> Iterator[dict[str, int]]:
    """The metrics of the table on two ports, like those of endpoint and Triton: part -> port."""
    servers, ports = [], {}
    for part in ("endpoint", "triton"):

        class Page(http.server.BaseHTTPRequestHandler):
            metrics, steps = TABLE[part]["metrics"], 0

            def do_GET(self) -> None:
                type(self).steps += 1
                data = page_of(self.metrics, self.steps).encode()
                self.send_response(200 if self.path == "/metrics" else 404)
                self.send_header("Content-Type", "text/plain; version=0.0.4")
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        ports[part] = server.server_address[1]
    try:
        yield ports
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()


def test_prometheus_as_compose_starts_it_answers_every_panel(tmp_path: Path) -> None:
    """docker/prometheus.yaml with loopback in place of the container's name: both jobs, the alerts,
    and a number for each query."""
    if not shutil.which("prometheus"):
        pytest.skip("the program prometheus is not installed")
    config = (ROOT / "docker" / "prometheus.yaml").read_text().replace("scrape_interval: 5s", "scrape_interval: 500ms")
    with served_pages() as pages:
        for part, port in pages.items():
            wanted = f"server:{TABLE[part]['port']}"
            assert wanted in config
            config = config.replace(wanted, f"127.0.0.1:{port}")
        (tmp_path / "prometheus.yml").write_text(config)
        shutil.copy2(ALERTS, tmp_path)
        [port] = free_ports(1)
        with open(tmp_path / "log", "w") as log:
            process = subprocess.Popen(
                ["prometheus", "--config.file=prometheus.yml", "--storage.tsdb.path=data", f"--web.listen-address=127.0.0.1:{port}"],
                cwd=tmp_path, stdout=log, stderr=log,
            )  # fmt: skip

        def ask(path: str) -> Any:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v1/{path}", timeout=10) as answer:
                return json.load(answer)["data"]

        def answered(text: str) -> bool:
            try:
                return bool(ask(f"query?query={urllib.parse.quote(text)}")["result"])
            except OSError:
                return False

        try:
            queries = [text for _, text in expressions() if text not in {rule["expr"] for rule in rules()}]
            deadline = time.monotonic() + SECONDS
            while missing := [text for text in queries if not answered(text)]:
                assert process.poll() is None and time.monotonic() < deadline, (missing, (tmp_path / "log").read_text())
                time.sleep(0.5)
            loaded = [rule["name"] for group in ask("rules")["groups"] for rule in group["rules"]]
            assert loaded == [rule["alert"] for rule in rules()]
            targets = {target["labels"]["job"]: target["health"] for target in ask("targets")["activeTargets"]}
            assert targets == {TABLE[part]["job"]: "up" for part in ("endpoint", "triton")}
        finally:
            process.terminate()
            process.wait(30)
