"""A collector of traces on loopback, which reads OTLP/HTTP with OpenTelemetry's own protobuf."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Callable
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


class Collector:
    """hangs: it takes a request and says nothing until `release` is set."""

    def __init__(self, hangs: bool = False) -> None:
        self.spans: list[Any] = []
        self.resources: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.came, self.release = threading.Event(), threading.Event()
        collector = self

        class Answer(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                request = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["Content-Length"])))
                collector.headers.append({name.lower(): value for name, value in self.headers.items()})
                for resource in request.resource_spans:
                    collector.resources.append(values_of(resource.resource))
                    for scope in resource.scope_spans:
                        collector.spans += scope.spans
                collector.came.set()
                if hangs:
                    collector.release.wait(120)
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *words: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def of_trace(self, trace: str, until: Callable[[Callable[[], bool]], None]) -> dict[str, Any]:
        """The spans of one trace by their names, once its root, which comes last, is there."""

        def there() -> bool:
            return any(span.kind == span.SPAN_KIND_SERVER for span in self._of(trace))

        until(there)
        return {span.name: span for span in self._of(trace)}

    def _of(self, trace: str) -> list[Any]:
        return [span for span in list(self.spans) if span.trace_id.hex() == trace]

    def close(self) -> None:
        self.release.set()
        self.server.shutdown()
        self.server.server_close()


def values_of(holder: Any) -> dict[str, Any]:
    """Attributes of a span or a resource."""
    return {one.key: value_of(one.value) for one in holder.attributes}


def value_of(value: Any) -> Any:
    kind = value.WhichOneof("value")
    return [value_of(one) for one in value.array_value.values] if kind == "array_value" else getattr(value, kind)
