"""TRACES=on without a server: spans of requests that are over, and collectors that are gone or hang."""

from __future__ import annotations

import http.server
import logging
import os
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from collector import Collector, values_of
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes
from opentelemetry.semconv.attributes import error_attributes, http_attributes, url_attributes

from scripts import reports
from scripts.openai import tracing
from scripts.openai.app import Request
from scripts.openai.front import Front, Fronts
from scripts.openai.reader import Asked
from scripts.openai.tracing import Traces
from scripts.serving.collector import check_collector, is_loopback

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
NAMES = {
    value
    for module in (gen_ai_attributes, http_attributes, error_attributes, url_attributes)
    for value in vars(module).values()
    if isinstance(value, str)
} | {"http.response.header.x-request-id"}  # made of a prefix of theirs and a header's name


def request(traceparent: str = f"00-{TRACE}-{PARENT}-01", status: int = 200, path: str = "/v1/completions") -> Request:
    """One that is over: a second ago it came, it had two answers."""
    headers = [(b"traceparent", traceparent.encode()), (b"x-request-id", b"mine"), (b"content-length", b"9")]
    nobody: Any = None
    one = Request({"method": "POST", "path": path, "headers": headers}, nobody, nobody)
    one.began, one.status = time.monotonic() - 1.0, status
    if status == 200:
        one.asked = Asked(n=2, max_tokens=7, prompt_tokens=5, stream=True, own=[b""])
        streams = [(0.3, 0.5, 0.8), (0.2, 0.4, 0.9)]
        choices = [
            SimpleNamespace(
                finish_reason="stop",
                stream=SimpleNamespace(placed=one.began + a, first_token=one.began + b, last_token=one.began + c),
            )
            for a, b, c in streams
        ]
        one.job = SimpleNamespace(id="cmpl-1", choices=choices)  # type: ignore[assignment]
        one.told = {
            "model": "stories",
            "prompt_tokens": 5,
            "completion_tokens": 13,
            "finish_reason": "stop",
            "first_token_seconds": 0.4,
        }
    return one


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment that says nothing of OpenTelemetry, and whose proxy is not there."""
    monkeypatch.setattr(Front, "fronts", Fronts(16), raising=False)
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.fixture
def collector(clean: pytest.MonkeyPatch) -> Iterator[Collector]:
    found = Collector()
    clean.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", found.url)
    yield found
    found.close()


def test_a_request_is_a_span_with_its_parts_below(collector: Collector, clean: pytest.MonkeyPatch) -> None:
    clean.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Bearer%20secret")
    clean.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment=test")
    traces = Traces()
    traces.tell(request())
    traces.tell(request(path="/v1/models"))
    traces.tell(request(status=401))
    traces.end()
    spans = {span.name: span for span in collector.spans}
    assert list(spans) == ["queue", "prompt", "generation", "text_completion stories"]
    root = spans.pop("text_completion stories")
    assert (root.trace_id.hex(), root.parent_span_id.hex(), root.kind) == (TRACE, PARENT, root.SPAN_KIND_SERVER)
    assert all((span.trace_id, span.parent_span_id) == (root.trace_id, root.span_id) for span in spans.values())
    queue, prompt, generation = spans.values()
    times = [
        queue.start_time_unix_nano,
        queue.end_time_unix_nano,
        prompt.end_time_unix_nano,
        generation.end_time_unix_nano,
    ]
    assert root.start_time_unix_nano == times[0] and times[-1] < root.end_time_unix_nano
    assert [round((at - times[0]) / 1e9, 3) for at in times] == [0, 0.2, 0.4, 0.9]
    assert (queue.end_time_unix_nano, prompt.end_time_unix_nano) == (
        prompt.start_time_unix_nano,
        generation.start_time_unix_nano,
    )
    assert values_of(prompt) == {"gen_ai.usage.input_tokens": 5}
    assert values_of(generation) == {"gen_ai.usage.output_tokens": 13}
    assert values_of(root) == {
        "gen_ai.operation.name": "text_completion", "gen_ai.provider.name": "trtllm-bake", "gen_ai.request.model": "stories",
        "gen_ai.response.model": "stories", "gen_ai.response.id": "cmpl-1", "gen_ai.request.max_tokens": 7, "gen_ai.request.stream": True,
        "gen_ai.request.choice.count": 2, "gen_ai.usage.input_tokens": 5, "gen_ai.usage.output_tokens": 13,
        "gen_ai.response.finish_reasons": ["stop", "stop"], "gen_ai.response.time_to_first_chunk": 0.4,
        "http.request.method": "POST", "url.path": "/v1/completions", "http.route": "/v1/completions", "http.response.status_code": 200,
        "http.response.header.x-request-id": ["mine"],
    }  # fmt: skip
    assert set(values_of(root)) <= NAMES, "names of the semantic conventions"
    assert collector.headers[0]["authorization"] == "Bearer secret"
    [resource] = collector.resources
    assert (resource["service.name"], resource["deployment.environment"]) == ("trtllm-bake", "test")


def test_the_clients_tracestate_goes_on_if_it_is_not_too_long(collector: Collector) -> None:
    traces = Traces()
    for state in (b"a=b,c=d", b"a=" + b"x" * 512):
        one = request()
        one.headers[b"tracestate"] = state
        traces.tell(one)
    traces.end()
    assert [span.trace_state for span in collector.spans if span.kind == span.SPAN_KIND_SERVER] == ["a=b,c=d", ""]


def test_what_fails_says_so_and_what_is_not_sampled_is_not_sent(collector: Collector) -> None:
    traces = Traces()
    traces.tell(request(f"00-{TRACE}-{PARENT}-00"))
    traces.tell(request("not one of theirs", 503))
    left = request()
    left.told["finish_reason"] = "left"
    traces.tell(left)
    traces.tell(request(status=429, path="/v1/chat/completions"))
    traces.end()
    failed, gone, refused = [span for span in collector.spans if span.kind == span.SPAN_KIND_SERVER]
    assert (failed.name, failed.parent_span_id, failed.status.code) == (
        "text_completion",
        b"",
        failed.status.STATUS_CODE_ERROR,
    )
    assert values_of(failed)["error.type"] == "503" and failed.trace_id.hex() != TRACE
    assert values_of(gone)["error.type"] == "client_left"
    assert (refused.name, values_of(refused)["http.response.status_code"], refused.status.code) == ("chat", 429, 0)


def test_a_collector_that_hangs_costs_spans_alone(clean: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Requests go on while nothing is taken; what waits is bounded; and a worker that ends does not wait."""
    collector = Collector(hangs=True)
    clean.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    clean.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization=secret-word")
    clean.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "64")
    clean.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "16")
    with caplog.at_level(logging.DEBUG):
        traces = Traces()
        for _ in range(100):
            traces.tell(request())
        assert collector.came.wait(60)
        for _ in range(400):
            traces.tell(request())
        traces.end()
        assert not collector.release.is_set() and len(collector.spans) == 16, "it still hangs, with one batch"
    assert "Queue full, dropping" in caplog.text and len(caplog.text) < 20_000
    assert "secret-word" not in caplog.text
    collector.close()


def test_a_collector_that_is_gone_or_endless_costs_spans_alone(clean: pytest.MonkeyPatch) -> None:
    """An answer without end: no more of it than its head is read."""
    let_go = threading.Event()

    class Endless(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(200)
            self.end_headers()
            try:
                while True:
                    self.wfile.write(b"x" * (1 << 20))
            except OSError:
                let_go.set()

        def log_message(self, *words: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Endless) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        clean.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", f"http://localhost:{server.server_port}/v1/traces")
        traces = Traces()
        traces.tell(request())
        traces.end()
        assert let_go.wait(60)
        server.shutdown()
    gone = Traces()
    gone.tell(request())
    gone.end()


def test_loopback_is_reached_without_a_proxy() -> None:
    for near in ("http://localhost:4318", "http://127.0.0.9:1", "http://[::1]:4318/v1/traces"):
        exporter: Any = tracing.exporter_of(near)
        assert is_loopback(near) and not exporter._client._transport._session.trust_env
    assert not is_loopback("https://collector.example") and not is_loopback("http://127.0.0.1.example")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "collector:4317"), ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://user:secret@host:4318"),
        ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "ftp://host"), ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://host:99999"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"), ("OTEL_TRACES_EXPORTER", "zipkin"), ("OTEL_TRACES_SAMPLER", "sometimes"),
        ("OTEL_TRACES_SAMPLER_ARG", "10%"), ("OTEL_BSP_MAX_QUEUE_SIZE", "many"), ("OTEL_BSP_MAX_QUEUE_SIZE", "100"),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "100000000"), ("OTEL_EXPORTER_OTLP_CERTIFICATE", "/not/there"), ("OTEL_EXPORTER_OTLP_TIMEOUT", "0"),
    ],
)  # fmt: skip
def test_what_the_environment_cannot_say_is_a_report(name: str, value: str) -> None:
    with pytest.raises(reports.Problem) as told:
        check_collector({name: value})
    report = told.value.report()
    assert "OTEL_" in report and "secret" not in report
    name, _, better = told.value.command.partition(" ")[0].partition("=")
    if "CERTIFICATE" not in name:
        check_collector(
            {**({} if "BATCH" not in name else {"OTEL_BSP_MAX_QUEUE_SIZE": "100"}), name: better.strip("'")}
        )


def test_a_good_environment_is_none() -> None:
    check_collector({})
    check_collector(
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "https://collector.example:4318/base", "OTEL_TRACES_SAMPLER_ARG": "0.25"}
    )
