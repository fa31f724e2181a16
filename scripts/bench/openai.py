"""`make bench-openai`: what the OpenAI-compatible endpoint costs, against gRPC straight to tensorrt_llm,
in one run on this machine.

Streams have exactly --tokens tokens; 1 and --streams of them run at once, both ways in turn; the best of three counts.
cpu      microseconds of all the endpoint's processes for each streamed token (their own clocks, whatever else the
         machine does)
guided   tokens a second of answers that follow a JSON schema, over those of answers that follow none: the two in turn,
         the median of --rounds rounds' ratios (MAX_BATCH_SIZE=16 for 16 streams that run together). If other programs
         use the machine, the same ratio of CPU time is more stable (TP=1: ranks use CPU while they wait for each other)

With --compare-traces (BENCH=--compare-traces): what TRACES=on costs. Two servers side by side, one with traces, are
asked in turn, --rounds times. Each answer has a trace, which goes to a collector in this process.
"""

from __future__ import annotations

import argparse
import functools
import http.client
import http.server
import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from scripts import reports, serve
from scripts.openai.__main__ import GUIDES
from scripts.serving import launch, processes
from scripts.serving.started import started

PROMPT = "Once upon a time"
# how often each of two servers is asked before the other's turn
TURNS = 4
# an object that never ends within a measured answer: a list of things with a text, a number and a choice
GUIDE = {
    "type": "array", "minItems": 1000,
    "items": {
        "type": "object", "additionalProperties": False, "required": ["name", "age", "kind", "notes"],
        "properties": {"name": {"type": "string", "maxLength": 24}, "age": {"type": "integer", "minimum": 0, "maximum": 150},
                       "kind": {"enum": ["cat", "dog", "bird"]}, "notes": {"type": "array", "items": {"type": "string"}, "maxItems": 3}},
    },
}  # fmt: skip


def over_grpc(settings: launch.Settings, ids: list[int], tokens: int) -> float:
    """One answer of tensorrt_llm; seconds until its first token."""
    from tritonclient.utils import InferenceServerException

    from scripts.serving import triton_client as triton

    began, first = time.monotonic(), 0.0
    asked = {
        "input_ids": triton.ints(*ids), "input_lengths": triton.ints(len(ids)), "request_output_len": triton.ints(tokens),
        "end_id": triton.ints(-1), "streaming": triton.yes(),
    }  # fmt: skip
    with closing(triton.Stream(f"{settings.reached_at}:{settings.grpc_port}", 600)) as stream:
        try:
            stream.send("tensorrt_llm", outputs=("output_ids", "sequence_length"), **asked)
            for _ in stream.until_final():
                first = first or time.monotonic() - began
        except InferenceServerException as error:
            raise reports.serving.request_refused(str(error)) from None
    return first


def key_of(settings: launch.Settings) -> dict[str, str]:
    """The header with the first of the endpoint's keys, if it has keys (API_KEY_FILE, BAKE_API_KEY)."""
    file = settings.api_key_file
    lines = Path(file).read_text(encoding="utf-8-sig") if file else os.environ.get("BAKE_API_KEY", "")
    return {"Authorization": f"Bearer {lines.split()[0]}"} if lines.split() else {}


def served_name(settings: launch.Settings) -> str:
    """The endpoint's name of the model: if MODEL is a folder, its rooms have another name."""
    connection = http.client.HTTPConnection(settings.reached_at, settings.openai_port, timeout=60)
    connection.request("GET", "/v1/models", headers=key_of(settings))
    answer = connection.getresponse()
    said = answer.read()
    if answer.status != 200:
        raise reports.serving.request_refused(said[-300:].decode(errors="replace"))
    return str(json.loads(said)["data"][0]["id"])


# Every stream has all its tokens.
ALL_TOKENS: Mapping[str, Any] = {"ignore_eos": True}


def over_openai(
    settings: launch.Settings, ids: list[int], tokens: int, model: str, more: Mapping[str, Any] = ALL_TOKENS
) -> float:
    """The same answer through the endpoint; seconds until its first token."""
    asked = {"model": model, "prompt": ids, "max_tokens": tokens, "temperature": 0, "stream": True}
    connection = http.client.HTTPConnection(settings.reached_at, settings.openai_port, timeout=600)
    body = json.dumps({**asked, **more, "stream_options": {"include_usage": True}})
    began = time.monotonic()
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json", **key_of(settings)})
    answer = connection.getresponse()
    first = answer.read1()
    seconds = time.monotonic() - began
    whole = first + answer.read()
    if answer.status != 200 or f'"completion_tokens":{tokens}'.encode() not in whole:
        raise reports.serving.request_refused(whole[-300:].decode(errors="replace"))
    return seconds


def together(
    one: Callable[..., float], settings: launch.Settings, ids: list[int], tokens: int, count: int
) -> dict[str, float]:
    """Tokens per second of `count` answers at once, and the median time to the first token. If one fails,
    its Problem is raised."""
    firsts: list[float] = []
    failures: list[BaseException] = []

    def ask() -> None:
        try:
            firsts.append(one(settings, ids, tokens))
        except (reports.Problem, OSError, http.client.HTTPException) as failure:
            failures.append(failure)

    threads = [threading.Thread(target=ask) for _ in range(count)]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        failed = next((one for one in failures if isinstance(one, reports.Problem)), None)
        raise failed or reports.serving.server_not_there("the OpenAI-compatible endpoint", str(failures[0]))
    seconds = time.monotonic() - began
    return {"tokens_per_second": count * tokens / seconds, "first_token_ms": 1000 * float(np.median(firsts))}


def guided(
    settings: launch.Settings, ids: list[int], tokens: int, count: int, rounds: int, model: str, server: int
) -> dict[str, float]:
    """The cost of following a schema: `count` answers at once with one and without, in turn. Other programs may use the
    machine, so the ratio of each round counts; the result is their median. server: the process that started all of the server's."""
    ways: dict[str, Mapping[str, Any]] = {"plain": ALL_TOKENS, "guided": {"guided_json": GUIDE}}
    ask = {way: functools.partial(over_openai, model=model, more=more) for way, more in ways.items()}
    together(ask["guided"], settings, ids, tokens, count)  # warm
    runs: dict[str, list[float]] = {way: [] for way in ways}
    used: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(rounds):
        for way in sorted(ways, reverse=bool(number % 2)):
            before = cpu_below(server)
            runs[way].append(together(ask[way], settings, ids, tokens, count)["tokens_per_second"])
            used[way].append(cpu_below(server) - before)
    speeds = [one / other for one, other in zip(runs["guided"], runs["plain"])]
    tick = 1 / os.sysconf("SC_CLK_TCK")
    costs = [max(other, tick) / max(one, tick) for one, other in zip(used["guided"], used["plain"])]
    found = {f"{way} tokens_per_second, {count} at once": float(np.median(speeds)) for way, speeds in runs.items()}
    for name, shares in (("tokens_per_second", speeds), ("tokens for a second of CPU", costs)):
        name = f"guided / plain, {name}"
        found.update({name: float(np.median(shares)), f"{name}, least": min(shares), f"{name}, most": max(shares)})
    return found


def cpu_below(pid: int) -> float:
    """CPU seconds of a process and of all that live below it."""
    ticks: dict[int, int] = {}
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rsplit(") ", 1)[1].split()
            except OSError:
                continue  # it has ended
            children.setdefault(int(fields[1]), []).append(int(entry.name))
            ticks[int(entry.name)] = int(fields[11]) + int(fields[12])
    total, found = 0, [pid]
    while found:
        total += ticks.get(found[-1], 0)
        found += children.get(found.pop(), [])
    return total / os.sysconf("SC_CLK_TCK")


def cpu_seconds(pid: int) -> float:
    """CPU time of the endpoint and all its processes, also of those that have ended."""
    ticks = 0
    for process in processes.of_session(pid).values():
        fields = Path(f"/proc/{process.pid}/stat").read_text().rsplit(") ", 1)[1].split()
        ticks += sum(map(int, fields[11 : 15 if process.pid == pid else 13]))
    return ticks / os.sysconf("SC_CLK_TCK")


def measure(settings: launch.Settings, streams: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Serve, measure, end."""
    result: dict[str, Any] = {}
    with started(settings) as serving:
        if serving.endpoint_pid is None:
            raise reports.serving.server_not_there("the OpenAI-compatible endpoint", "its process is not there")
        endpoint = serving.endpoint_pid
        ids, model = [1, 403, 407, 261, 378], served_name(settings)
        ways: dict[str, Callable[..., float]] = {
            "grpc": over_grpc,
            "openai": functools.partial(over_openai, model=model),
        }
        for one in ways.values():
            together(one, settings, ids, tokens, streams)  # warm
        for count in (1, streams):
            runs: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
            used = 0.0
            for _ in range(3):
                for way, one in ways.items():
                    before = cpu_seconds(endpoint)
                    runs[way].append(together(one, settings, ids, tokens, count))
                    used += cpu_seconds(endpoint) - before if way == "openai" else 0.0
            best = {way: max(of, key=lambda run: run["tokens_per_second"]) for way, of in runs.items()}
            for way, run in best.items():
                result.update({f"{way} {name}, {count} at once": value for name, value in run.items()})
            share = best["openai"]["tokens_per_second"] / best["grpc"]["tokens_per_second"]
            result[f"openai / grpc, {count} at once"] = share
            result[f"cpu microseconds a token, {count} at once"] = 1e6 * used / (3 * count * tokens)
        if rounds and (settings.root / GUIDES).is_file():
            result.update(guided(settings, ids, tokens, streams, rounds, model, serving.process.pid))
    return result


class Deaf(http.server.BaseHTTPRequestHandler):
    """A collector that accepts everything and keeps nothing."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *words: object) -> None:
        pass


def measure_traces(settings: launch.Settings, streams: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Two servers, asked in turn: tokens per second, CPU per token, and the ratios of with traces to without."""
    moved = [port + 100 for port in settings.ports.values()]
    other = replace(
        settings, http_port=moved[0], grpc_port=moved[1], metrics_port=moved[2], openai_port=moved[3],
        operating=replace(settings.operating, traces="on"),
    )  # fmt: skip
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Deaf) as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = f"http://127.0.0.1:{collector.server_port}"
        with started(settings) as plain, started(other) as traced:
            servers = {"off": (settings, plain.endpoint_pid), "on": (other, traced.endpoint_pid)}
            found: dict[str, list[tuple[float, float]]] = {name: [] for name in servers}
            for number in range(rounds + 1):
                for name, (one, pid) in list(servers.items())[:: 1 if number % 2 else -1]:
                    ask = functools.partial(over_openai, model=served_name(one))
                    before = cpu_seconds(pid or 0)
                    speeds = [
                        together(ask, one, [1, 403, 407, 261, 378], tokens, streams)["tokens_per_second"]
                        for _ in range(TURNS)
                    ]
                    cpu = 1e6 * (cpu_seconds(pid or 0) - before) / (TURNS * streams * tokens)
                    if number:  # the first one warms
                        found[name].append((float(np.median(speeds)), cpu))
        collector.shutdown()
    result: dict[str, Any] = {}
    for column, what in enumerate(("tokens a second", "cpu microseconds a token")):
        means = {name: float(np.mean([row[column] for row in of])) for name, of in found.items()}
        result.update({f"{what}, traces {name}": mean for name, mean in means.items()})
        ratios = [on[column] / off[column] for off, on in zip(found["off"], found["on"])]
        result[f"{what}, on / off, means"] = means["on"] / means["off"]
        result[f"{what}, on / off, median"] = float(np.median(ratios))
        result[f"{what}, on / off, quartiles"] = [float(each) for each in np.percentile(ratios, [25, 75])]
    return result


def main() -> None:
    parser = serve.settings_parser()
    parser.description, parser.formatter_class = __doc__, argparse.RawDescriptionHelpFormatter
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--compare-traces", action="store_true", help="what TRACES=on costs")
    parser.add_argument("--rounds", type=int, default=7, help="of guided answers (torch engine), and of traces")
    args = parser.parse_args()
    settings = serve.settings_from(args)
    how = measure_traces if args.compare_traces else measure
    result = how(settings, args.streams, args.tokens, args.rounds)
    Path("build").mkdir(exist_ok=True)
    (Path("build") / "bench-openai.json").write_text(json.dumps(result, indent=2) + "\n")
    for key, value in result.items():
        shown = value if isinstance(value, list) else [value]
        print(f"{key:<44} {' '.join(f'{one:.3f}' for one in shown)}")


if __name__ == "__main__":
    reports.run(main)
