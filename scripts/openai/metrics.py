"""The page /metrics: counts of all worker processes in Prometheus' text form, written by its official client.

Names, units and bounds of buckets are vLLM's with another prefix (docker/dashboards/metrics.json). The counts are in
memory that all workers share, made before they are forked: each worker adds to its own row, and the worker that is
scraped adds up the rows. A worker that dies leaves its row to its replacement, so that no counter ever goes back. (The
client's own multiprocess mode keeps a file for each process that ever ran,
and takes a lock and several microseconds per token.)

The engine's own numbers come from Triton's metrics, read at most once a second, however often we are scraped.
"""

from __future__ import annotations

import asyncio
import math
import mmap
import re
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from scripts.openai.passing import Passing

# Paths under which requests are counted, never the text of a client
ROUTES = (
    "/v1/completions", "/v1/chat/completions", "/v1/models", "/v1/models/{model}", "/health", "/health/live", "/metrics",
    "/openapi.json", "/", "other",
)  # fmt: skip
STATUSES = (200, 204, 400, 401, 403, 404, 405, 408, 413, 429, 431, 499, 500, 503)
OTHER_STATUS = len(STATUSES)
# labels that exist from the start with 0: a counter that appears with its first event shows no rate for it
FROM_START = {(route, status) for route in ROUTES[:2] for status in (200, 429, 500, 503)}
REASONS = ("stop", "length", "tool_calls", "content_filter", "other")
_TOKEN = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.4,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
)
_FIRST = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560,
)  # fmt: skip
_WHOLE = (0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
FIRST, TOKEN, WHOLE, QUEUE = range(4)
HISTOGRAMS = (
    ("bake_time_to_first_token_seconds", "From the arrival of a request to its first token", _FIRST),
    ("bake_inter_token_latency_seconds", "Between two tokens of one answer", _TOKEN),
    ("bake_e2e_request_latency_seconds", "From the arrival of a request to the end of its answer", _WHOLE),
    ("bake_request_queue_time_seconds", "From the arrival of a request to its place in the engine", _WHOLE),
)
# Where each histogram begins in a row: its sum, then its buckets and the one without a bound
STARTS = [sum(len(bounds) + 2 for _, _, bounds in HISTOGRAMS[:n]) for n in range(len(HISTOGRAMS) + 1)]
PROMPT, GENERATED, FINISHED = STARTS[-1], STARTS[-1] + 1, STARTS[-1] + 2
ANSWERED = FINISHED + len(REASONS)
COLUMNS = ANSWERED + len(ROUTES) * (len(STATUSES) + 1)

# The greatest age of Triton's numbers and of a page: however often it is scraped, a worker spends one percent on it
FRESH_SECONDS, PAGE_SECONDS = 1.0, 0.1
# How long Triton may take, how many bytes it may send, and how old its numbers may be
ENGINE_SECONDS, ENGINE_BYTES, STALE_SECONDS = 1.0, 4 << 20, 10.0
SAMPLE = re.compile(r"(nv_trt_llm_\w+)\{([^}\n]*)\} (\S+)")
# cells for Triton's last answer: the times of question and answer, then these
ASKED, CAME, ACTIVE, WAITING, USED, MOST = range(6)
SAID = {
    ("nv_trt_llm_request_metrics", "active"): ACTIVE,
    ("nv_trt_llm_request_metrics", "waiting"): WAITING,
    ("nv_trt_llm_kv_cache_block_metrics", "used"): USED,
    ("nv_trt_llm_kv_cache_block_metrics", "max"): MOST,
}


def route_of(path: str) -> str:
    """The template of a path."""
    if path.startswith("/v1/models/"):
        return "/v1/models/{model}"
    return path if path in ROUTES else "other"


class Counts(Passing):
    """The parent makes it; every worker sets `worker` to its own number after the fork."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.cells = memoryview(mmap.mmap(-1, 8 * workers * COLUMNS)).cast("d")
        self.engine = memoryview(mmap.mmap(-1, 8 * 6)).cast("d")
        self.engine[ASKED] = self.engine[CAME] = -math.inf
        self.worker = 0

    @property
    def worker(self) -> int:
        return self._row // COLUMNS

    @worker.setter
    def worker(self, number: int) -> None:
        self._row = number * COLUMNS

    def _observe(self, histogram: int, seconds: float) -> None:
        start = self._row + STARTS[histogram]
        self.cells[start] += seconds
        self.cells[start + 1 + bisect_left(HISTOGRAMS[histogram][2], seconds)] += 1

    def answered(self, route: str, status: int) -> None:
        number = STATUSES.index(status) if status in STATUSES else OTHER_STATUS
        self.cells[self._row + ANSWERED + ROUTES.index(route) * (len(STATUSES) + 1) + number] += 1

    def asked(self, tokens: int) -> None:
        self.cells[self._row + PROMPT] += tokens

    def placed(self, seconds: float) -> None:
        self._observe(QUEUE, seconds)

    def first_token(self, seconds: float, tokens: int) -> None:
        self._observe(FIRST, seconds)
        self.cells[self._row + GENERATED] += tokens

    def token(self, seconds: float, tokens: int) -> None:
        self._observe(TOKEN, seconds)
        self.cells[self._row + GENERATED] += tokens

    def finished(self, reason: str) -> None:
        self.cells[self._row + FINISHED + REASONS.index(reason if reason in REASONS else "other")] += 1

    def whole(self, seconds: float) -> None:
        self._observe(WHOLE, seconds)

    def all(self, column: int) -> float:
        """The sum over all workers."""
        return sum(self.cells[worker * COLUMNS + column] for worker in range(self.workers))


class Page:
    """Makes the page /metrics in one worker.

    model: its name; load: how many answers wait in the endpoint, and how many it has given to the engine; triton: its
    metrics' address, host:port, empty if there is none to ask.
    """

    def __init__(
        self, counts: Counts, model: str, load: Callable[[], tuple[int, int]], slots: int, triton: str
    ) -> None:
        self.counts, self.model, self.load, self.slots, self.triton = counts, model, load, slots, triton
        self.registry = CollectorRegistry()
        self.registry.register(self)
        self.made, self.text = -math.inf, b""

    async def page(self) -> bytes:
        """The page, at most PAGE_SECONDS old."""
        now = time.monotonic()
        if now - self.made > PAGE_SECONDS:
            self.made = now
            await self._ask_triton(now)
            self.text = generate_latest(self.registry)
        return self.text

    async def _ask_triton(self, now: float) -> None:
        said = self.counts.engine
        if not self.triton or now - said[ASKED] < FRESH_SECONDS:
            return
        said[ASKED] = now
        try:
            text = await asyncio.wait_for(fetched(self.triton), ENGINE_SECONDS)
        except (OSError, asyncio.TimeoutError, EOFError):
            return
        found = said_by(text)
        for cell in (ACTIVE, WAITING, USED, MOST):
            said[cell] = found.get(cell, math.nan)
        said[CAME] = now

    def collect(self) -> Iterator[Metric]:
        """The metrics, for the registry of Prometheus' client."""
        counts, model = self.counts, self.model
        for (name, text, bounds), start in zip(HISTOGRAMS, STARTS):
            total, buckets = 0.0, []
            for number, bound in enumerate((*bounds, math.inf)):
                total += counts.all(start + 1 + number)
                buckets.append((str(float(bound)) if bound != math.inf else "+Inf", total))
            histogram = HistogramMetricFamily(name, text, labels=["model_name"])
            histogram.add_metric([model], buckets, sum_value=counts.all(start))
            yield histogram
        for name, text, column in (
            ("bake_prompt_tokens", "Tokens of prompts", PROMPT),
            ("bake_generation_tokens", "Tokens of answers", GENERATED),
        ):
            counter = CounterMetricFamily(name, text, labels=["model_name"])
            counter.add_metric([model], counts.all(column))
            yield counter
        finished = CounterMetricFamily(
            "bake_request_success", "Answers that came to their end", labels=["model_name", "finished_reason"]
        )
        for number, reason in enumerate(REASONS):
            finished.add_metric([model, reason], counts.all(FINISHED + number))
        yield finished
        answers = CounterMetricFamily(
            "bake_http_requests", "HTTP answers by status", labels=["model_name", "status", "route"]
        )
        column = ANSWERED
        for route in ROUTES:
            for status in (*STATUSES, "other"):
                value, column = counts.all(column), column + 1
                if value or (route, status) in FROM_START:
                    answers.add_metric([model, str(status), route], value)
        yield answers
        yield from self._gauges()

    def _gauges(self) -> Iterator[Metric]:
        waiting, given = self.load()
        said = self.counts.engine
        known = time.monotonic() - said[CAME] < STALE_SECONDS
        active = said[ACTIVE] if known and not math.isnan(said[ACTIVE]) else min(given, self.slots)
        if known and not math.isnan(said[WAITING]):
            waiting += int(said[WAITING])
        else:  # TensorRT-LLM counts only the requests that it works on; our other requests are in its queue
            waiting += max(0, given - int(active))
        yield self._gauge("bake_num_requests_running", "Requests that have a place in the engine", active)
        yield self._gauge("bake_num_requests_waiting", "Requests that wait for a place", waiting)
        if known and said[MOST] > 0 and not math.isnan(said[USED]):
            share = said[USED] / said[MOST]
            yield self._gauge("bake_kv_cache_usage_perc", "Share of the key/value cache that is taken, 0 to 1", share)

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        gauge = GaugeMetricFamily(name, text, labels=["model_name"])
        gauge.add_metric([self.model], value)
        return gauge


async def fetched(address: str) -> str:
    """Triton's metrics. Raises OSError and EOFError."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host.strip("[]"), int(port))
    try:
        writer.write(f"GET /metrics HTTP/1.0\r\nHost: {address}\r\nConnection: close\r\n\r\n".encode())
        data = bytearray()
        while piece := await reader.read(1 << 16):
            data += piece
            if len(data) > ENGINE_BYTES:
                raise EOFError
        return data.decode("utf-8", "replace")
    finally:
        writer.close()


def said_by(text: str) -> dict[int, float]:
    """The engine's own numbers: cell -> value, for the model tensorrt_llm."""
    found = {}
    for name, labels, value in SAMPLE.findall(text):
        kind = re.search(r'(?:request_type|kv_cache_block_type)="(\w+)"', labels)
        if kind and 'model="tensorrt_llm"' in labels and (cell := SAID.get((name, kind[1]))) is not None:
            try:
                found[cell] = float(value)
            except ValueError:
                continue
    return found
