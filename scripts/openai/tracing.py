"""TRACES=on: a span for each request to the model, with queue, prompt and generation below it,
sent to a collector over OTLP/HTTP.

OpenTelemetry's SDK makes and sends them, and reads its own variables: OTEL_EXPORTER_OTLP_ENDPOINT,
OTEL_EXPORTER_OTLP_HEADERS, OTEL_TRACES_SAMPLER, OTEL_BSP_* and so on; scripts/serving/host.py has checked them. Names
of attributes are those of OpenTelemetry's semantic conventions for generative AI and for HTTP. Nothing of a prompt or
an answer is in a span, nor who asked.

A span is made when its request is over, from times that are noted anyway, so a token costs nothing more. It waits in a
bounded queue (OTEL_BSP_MAX_QUEUE_SIZE) for the thread that sends it.
A collector that is gone or hangs only costs spans.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING, Any

import requests
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import SpanKind, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from scripts.serving.collector import collector_of, is_loopback

if TYPE_CHECKING:
    from scripts.openai.app import Request

log = logging.getLogger("openai")

SERVICE = "trtllm-bake"
# requests that have spans, with OpenTelemetry's name of their operation
OPERATIONS = {"/v1/chat/completions": "chat", "/v1/completions": "text_completion"}
HEADERS = (b"traceparent", b"tracestate")
# W3C's recommendation asks everyone to pass on this much; each span that waits keeps it
MOST_HEADER_BYTES = 512
# How long the rest of the queue may take when a worker ends
LAST_SECONDS = 1.0


class Link(requests.Session):
    """One connection per batch; only the head of an answer is read,
    so a collector that never stops sending costs nothing."""

    def request(self, *words: Any, **more: Any) -> requests.Response:
        answer = super().request(*words, **{**more, "stream": True})
        answer.close()
        return answer


def exporter_of(endpoint: str) -> OTLPSpanExporter:
    """Sends to the collector, without the host's proxies for loopback."""
    link = Link()
    link.trust_env = not is_loopback(endpoint)
    return OTLPSpanExporter(session=link)


class Traces:
    """The spans of one worker. The worker makes it after the fork, because it starts a thread.

    exporter: sends the spans; None: the one that the environment describes.
    """

    def __init__(self, exporter: SpanExporter | None = None) -> None:
        resource = Resource.create()
        if str(resource.attributes[SERVICE_NAME]).startswith(
            "unknown_service"
        ):  # neither OTEL_SERVICE_NAME nor an attribute
            resource = resource.merge(Resource({SERVICE_NAME: SERVICE}))
        self.provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self.provider.add_span_processor(BatchSpanProcessor(exporter or exporter_of(collector_of())))
        self.tracer = self.provider.get_tracer("trtllm-bake")
        self.propagator = TraceContextTextMapPropagator()

    def tell(self, request: Request) -> None:
        """The spans of a request that is over. Clients with an unknown key have none."""
        operation = OPERATIONS.get(request.route)
        if operation is None or request.method != "POST" or request.status == 401:
            return
        given = {name.decode(): request.headers.get(name, b"") for name in HEADERS}
        carrier = {name: data.decode("latin-1") for name, data in given.items() if 0 < len(data) <= MOST_HEADER_BYTES}
        now, wall = time.monotonic(), time.time_ns()

        def at(moment: float) -> int:
            """A time of time.monotonic(), in nanoseconds since 1970."""
            return wall - int((now - moment) * 1e9)

        told = request.told
        name = f"{operation} {told['model']}" if "model" in told else operation
        span = self.tracer.start_span(
            name,
            self.propagator.extract(carrier),
            SpanKind.SERVER,
            self._attributes(request, operation),
            start_time=at(request.began),
        )
        if not span.is_recording():
            return
        if request.status >= 500 or told.get("finish_reason") == "error":
            span.set_status(StatusCode.ERROR)
        below = set_span_in_context(span)
        for part, begins, ends, attributes in parts_of(request):
            own = self.tracer.start_span(part, below, attributes=attributes, start_time=at(begins))
            own.end(at(ends))
        span.end(wall)

    @staticmethod
    def _attributes(request: Request, operation: str) -> dict[str, Any]:
        told, asked, job = request.told, request.asked, request.job
        found: dict[str, Any] = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": SERVICE,
            "http.request.method": request.method,
            "url.path": request.route,
            "http.route": request.route,
            "http.response.header.x-request-id": [request.id],
        }
        if request.status != 499:  # nothing was answered: the client had left
            found["http.response.status_code"] = request.status
        why = told.get("finish_reason")
        if request.status >= 400:
            found["error.type"] = "client_left" if request.status == 499 else str(request.status)
        elif why in ("left", "error"):
            found["error.type"] = {"left": "client_left", "error": "answer_cut_off"}[why]
        if asked is not None and job is not None:
            found |= {
                "gen_ai.request.model": told["model"],
                "gen_ai.response.model": told["model"],
                "gen_ai.response.id": job.id,
                "gen_ai.request.max_tokens": asked.max_tokens,
                "gen_ai.request.stream": asked.stream,
                "gen_ai.usage.input_tokens": asked.prompt_tokens,
                "gen_ai.usage.output_tokens": told["completion_tokens"],
            }
            if asked.n != 1:
                found["gen_ai.request.choice.count"] = asked.n
            if reasons := [choice.finish_reason for choice in job.choices if choice.finish_reason is not None]:
                found["gen_ai.response.finish_reasons"] = reasons
            if "first_token_seconds" in told:
                found["gen_ai.response.time_to_first_chunk"] = told["first_token_seconds"]
        return found

    def end(self) -> None:
        """Send what waits, if the collector takes it in time."""
        ending = threading.Thread(target=self.provider.shutdown, daemon=True)
        ending.start()
        ending.join(LAST_SECONDS)


def parts_of(request: Request) -> list[tuple[str, float, float, dict[str, Any]]]:
    """The parts of a request's time: (name, beginning, end, attributes), as far as it came. For several answers: the
    first one that has a place, the first token of any, and the last token of all."""
    job = request.job
    streams = [choice.stream for choice in job.choices] if job is not None else []
    placed = min((stream.placed for stream in streams if stream.placed), default=0.0)
    first = min((stream.first_token for stream in streams if stream.first_token), default=0.0)
    last = max((stream.last_token for stream in streams), default=0.0)
    found: list[tuple[str, float, float, dict[str, Any]]] = []
    if placed:
        found.append(("queue", request.began, placed, {}))
    if first:
        found.append(("prompt", placed, first, {"gen_ai.usage.input_tokens": request.told["prompt_tokens"]}))
        found.append(("generation", first, last, {"gen_ai.usage.output_tokens": request.told["completion_tokens"]}))
    return found
