"""`make bench`: the served model and the engine below it under load, against the host's ceilings and against peers.

Reads   engines/ and model_repo/ under --root, the tokenizer of the room config, and the whole model for the peers
Writes  OUT.json, OUT.csv, OUT.html: every number with the host, the versions and the command that made it
Needs   perf_analyzer (glibc 2.38) for Triton's gRPC, else tritonclient; aiperf for the OpenAI-compatible endpoint

It serves the rooms itself, so that afterwards the engine alone can have the GPUs. Load generators that cannot run here
are named. With --baseline, every number is compared with the same number of an older run;
the status is 1 if one is worse.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import importlib.metadata
import io
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts import reports, room, serve
from scripts.bench import client as bench_client
from scripts.bench import completions, vllm
from scripts.bench import page as bench_page
from scripts.limits import limits_of
from scripts.nvidia import gpus
from scripts.serving import launch, pulse, toolbox
from scripts.serving.started import started

# (input tokens, output tokens, streams at once)
DEFAULT_POINTS = "128:128:1 128:128:8 128:128:32 128:128:128 128:128:256 1024:64:1 1024:64:8"
# How many rounds each point has
ROUNDS = 3
Note = Callable[[str, "Point", Mapping[str, float]], None]
# A smaller difference is noise: two runs of the same tree on the same machine differ by up to 4 % (docs/bench)
NOISE = 0.05
GENERATOR_SECONDS = 600
# name, unit, whether more is better
METRICS = {
    "tokens_per_second": ("tokens/s", True),
    "ttft_ms_p50": ("ms", False),
    "ttft_ms_p99": ("ms", False),
    "itl_ms_p50": ("ms", False),
    "itl_ms_p99": ("ms", False),
}


@dataclass(frozen=True)
class Point:
    """One load: `requests` requests of `input_tokens` and `output_tokens` each, `concurrency` at once."""

    input_tokens: int
    output_tokens: int
    concurrency: int

    @property
    def requests(self) -> int:
        return ROUNDS * self.concurrency

    def numbers(self) -> dict[str, int]:
        return {**vars(self), "requests": self.requests}


def points_of(text: str, limits: Mapping[str, int]) -> list[Point]:
    """'128:128:1 1024:64:8' as points, without those that exceed the engine's limits. A Problem for anything else."""
    points = []
    for word in text.split():
        parts = word.split(":")
        if len(parts) != 3 or not all(part.isdigit() and int(part) for part in parts):
            raise reports.settings.bad_setting(
                "POINTS",
                word,
                "input tokens:output tokens:streams, for instance 128:128:8",
                "make bench POINTS=128:128:8",
            )
        points.append(Point(*map(int, parts)))
    fit = [
        point
        for point in points
        if point.input_tokens <= limits["max_input_len"]
        and point.input_tokens + point.output_tokens <= limits["max_seq_len"]
        and point.concurrency <= limits["max_batch_size"]
    ]
    if not fit:
        raise reports.settings.bad_setting(
            "POINTS", text, f"at least one load within {dict(limits)}", "make bench POINTS=16:16:1"
        )
    return fit


def summary(requests: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The numbers of a point from its requests (ranks.request_times).

    Inter-token latency: of each request, the time from its first to its last token over the tokens in between.
    Fairness: the slowest stream's time over the median's.
    """
    first = min(one["began"] for one in requests)
    last = max(one["arrivals"][-1] for one in requests)
    ttft = [1e3 * (one["arrivals"][0] - one["began"]) for one in requests]
    itl = [
        1e3 * (one["arrivals"][-1] - one["arrivals"][0]) / max(1, sum(one["tokens"]) - one["tokens"][0])
        for one in requests
    ]
    whole = [one["arrivals"][-1] - one["began"] for one in requests]
    rounds = rounds_of(requests)
    found = {
        "tokens_per_second": sum(sum(one["tokens"]) for one in requests) / (last - first),
        "ttft_ms_p50": statistics.median(ttft),
        "ttft_ms_p99": percentile(ttft, 99),
        "itl_ms_p50": statistics.median(itl),
        "itl_ms_p99": percentile(itl, 99),
        "slowest_over_median": max(whole) / statistics.median(whole),
        **({"rounds_low": min(rounds), "rounds_high": max(rounds)} if len(rounds) > 1 else {}),
    }
    return {name: float(f"{value:.5g}") for name, value in found.items()}


def rounds_of(requests: Sequence[Mapping[str, Any]]) -> list[float]:
    """Tokens per second of each round: the requests, ordered by their beginning, in ROUNDS equal parts."""
    ordered = sorted(requests, key=lambda one: one["began"])
    each = len(ordered) // ROUNDS
    parts = [ordered[n * each : (n + 1) * each] for n in range(ROUNDS)] if each else []
    return [
        sum(sum(one["tokens"]) for one in part)
        / (max(one["arrivals"][-1] for one in part) - min(one["began"] for one in part))
        for part in parts
    ]


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that `percent` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * int(percent) // 100) - 1)]


def model_bytes(pretrained: Mapping[str, Any]) -> tuple[int, int]:
    """(bytes of weights that a decode step of one rank reads, bytes of keys and values per position of a sequence)."""
    hidden, inner, layers = pretrained["hidden_size"], pretrained["intermediate_size"], pretrained["num_hidden_layers"]
    heads, kv = (
        pretrained["num_attention_heads"],
        pretrained["num_key_value_heads"] or pretrained["num_attention_heads"],
    )
    size, tp = pretrained.get("head_size") or hidden // heads, pretrained["mapping"]["tp_size"]
    item = 4 if pretrained["dtype"] == "float32" else 2
    kv_rank = max(1, kv // tp)
    layer = hidden * size * (2 * heads // tp + 2 * kv_rank) + 3 * hidden * inner // tp
    return item * (layers * layer + hidden * pretrained["vocab_size"] // tp), 2 * item * layers * kv_rank * size


def ceiling(pretrained: Mapping[str, Any], measured: Mapping[str, Any], point: Point) -> dict[str, float]:
    """Tokens per second that memory alone allows;
    and the same with two all-reduces of this host's library per layer."""
    weights, per_position = model_bytes(pretrained)
    positions = point.concurrency * (point.input_tokens + point.output_tokens / 2)
    read = (weights + per_position * positions) / measured["copy_bytes_per_second"]
    times = {int(size): seconds for size, seconds in measured["all_reduce_seconds"].items()}
    step_bytes = point.concurrency * pretrained["hidden_size"] * (4 if pretrained["dtype"] == "float32" else 2)
    nearest = min(times, key=lambda size: abs(size - step_bytes)) if times else 0
    reduce = 2 * pretrained["num_hidden_layers"] * times[nearest] if times else 0.0
    return {
        "memory_tokens_per_second": point.concurrency / read,
        "with_all_reduce_tokens_per_second": point.concurrency / (read + reduce),
    }


def compared(new: Mapping[str, Any], old: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every number of both runs; worse: by more than NOISE."""

    def table(run: Mapping[str, Any]) -> dict[tuple[Any, ...], float]:
        return {
            (row["side"], row["tp_size"], row["input_tokens"], row["output_tokens"], row["concurrency"], name): row[
                name
            ]
            for row in run["rows"]
            for name in METRICS
            if row.get(name) is not None
        }

    now, before = table(new), table(old)
    lines = []
    for key in sorted(now.keys() & before.keys(), key=str):
        better = METRICS[key[-1]][1]
        change = now[key] / before[key] - 1 if before[key] else 0.0
        worse = change < -NOISE if better else change > NOISE
        lines.append(
            {"what": list(key), "old": before[key], "new": now[key], "change": round(change, 4), "worse": worse}
        )
    return lines


# --- shell ---


def generator(name: str, why_missing: str) -> tuple[str | None, str]:
    """(the path of a load generator, its version) or (None, why it does not run here)."""
    beside = Path(sys.executable).parent
    places = [str(beside), str(beside.parent / name / "bin"), os.environ.get("PATH", "")]
    path = shutil.which(name, path=os.pathsep.join(places))
    if path is None:
        return None, f"{name} is not installed{why_missing}"
    done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60, check=False)
    said = (done.stderr or done.stdout).strip().splitlines() or [f"status {done.returncode}"]
    return (None if done.returncode else path), said[-1]


def generate(command: Sequence[str], log_path: Path, server: subprocess.Popen[bytes], export: Path) -> None:
    """Run a load generator until it ends or the server does. A Problem, and what it said,
    when `export` is not written."""
    export.unlink(missing_ok=True)
    with log_path.open("w+") as log:
        running = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + GENERATOR_SECONDS
        # it waits for ever if the server ends
        while running.poll() is None and server.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        running.kill()
        if running.wait() or not export.is_file():
            log.seek(0)
            print(log.read(), file=sys.stderr)
            raise reports.bench.bench_step_failed(list(command), running.returncode)


def prompts_of(model_repo: Path, folder: Path, n_tokens: int, count: int) -> list[str]:
    """Texts of `n_tokens` for this model's tokenizer, different from the first word on. folder:
    where tokenizer.json is."""
    sys.path.append(str(model_repo / "tensorrt_llm_bls" / "1"))
    tokenizer = importlib.import_module("text").Text(folder)
    chance, prompts = random.Random(n_tokens), list[str]()
    words = ["the", "cat", "saw", "a", "big", "red", "ball", "and", "then", "it", "ran", "to", "her", "mom", "in"]
    words += ["sun"]
    while len(prompts) < count:
        line = str(chance.randrange(10**6))
        have = len(tokenizer.encode([line])[0])
        # a word is one token or two: add many at once, then single ones up to the length
        while have < n_tokens:
            step = max(1, (n_tokens - have) // 3)
            line += "".join(f" {chance.choice(words)}" for _ in range(step))
            have = len(tokenizer.encode([line])[0])
        prompts.append(line)
    return prompts


def ask_perf_analyzer(
    path: str, address: str, point: Point, prompts: Sequence[str], folder: Path, server: subprocess.Popen[bytes]
) -> list[dict[str, Any]]:
    """Triton's gRPC, streamed: the time of every response."""
    data, export = folder / "input.json", folder / "export.json"
    inputs = {"max_tokens": point.output_tokens, "stream": True, "end_id": -1}
    asked = [
        {name: {"content": [value], "shape": [1]} for name, value in {"text_input": text, **inputs}.items()}
        for text in prompts
    ]
    data.write_text(json.dumps({"data": asked}))
    command = [
        path, "-m", "ensemble", "-u", address, "-i", "grpc", "--async", "--streaming", "--input-data", str(data),
        "--concurrency-range", f"{point.concurrency}", "--request-count", f"{point.requests}", "--profile-export-file", str(export),
        "-s", "999", "--max-threads", "32",
    ]  # fmt: skip
    generate(command, folder / "perf_analyzer.log", server, export)
    experiment = json.loads(export.read_bytes())["experiments"][0]
    requests = []
    for request in experiment["requests"]:
        arrivals = [when / 1e9 for when in request["response_timestamps"]]
        # responses carry one token or, when the client is slower than the engine, some;
        # together they are all that was asked for
        tokens = [1] * len(arrivals)
        tokens[-1] += point.output_tokens - len(arrivals)
        requests.append({"began": request["timestamp"] / 1e9, "arrivals": arrivals, "tokens": tokens})
    return requests


def ask_aiperf(
    path: str, settings: launch.Settings, point: Point, prompts: Sequence[str], tokenizer: Path, folder: Path,
    server: subprocess.Popen[bytes],
) -> list[dict[str, Any]]:  # fmt: skip
    """The OpenAI-compatible endpoint, streamed: the times of each request's beginning, first token and last token."""
    data, export = folder / "prompts.jsonl", folder / "aiperf" / "profile_export.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in prompts))
    command = [
        path, "profile", "--model", settings.root.parent.name, "--url", settings.openai_url, "--endpoint-type", "completions",
        "--input-file", str(data), "--custom-dataset-type", "single_turn", "--tokenizer", str(tokenizer.absolute()),
        "--use-server-token-count", "--use-legacy-max-tokens", "--extra-inputs", f"max_tokens:{point.output_tokens}",
        "--extra-inputs", f"min_tokens:{point.output_tokens}", "--extra-inputs", "temperature:0",
        "--concurrency", f"{point.concurrency}", "--request-count", f"{point.requests}", "--artifact-dir", str(export.parent),
        "--streaming", "--ui-type", "none", "--no-gpu-telemetry", "--no-server-metrics",
    ]  # fmt: skip
    generate(command, folder / "aiperf.log", server, export)
    return aiperf_requests([json.loads(line) for line in export.read_text().splitlines()], point)


def aiperf_requests(records: Sequence[Mapping[str, Any]], point: Point) -> list[dict[str, Any]]:
    """aiperf's records in the form of ranks.request_times. A Problem if one failed or is too short."""
    requests = []
    for record in records:
        metrics = {name: metric["value"] for name, metric in record["metrics"].items()}
        tokens = metrics.get("output_sequence_length")
        if record.get("error") or tokens != point.output_tokens:
            said = record.get("error") or f"{tokens} tokens instead of {point.output_tokens}"
            raise reports.serving.request_refused(str(said)[:300])
        began = record["metadata"]["request_start_ns"] / 1e9
        arrivals = [began + metrics["time_to_first_token"] / 1e3, began + metrics["request_latency"] / 1e3]
        requests.append({"began": began, "arrivals": arrivals, "tokens": [1, tokens - 1]})
    return requests


def mpirun(world_size: int, root: Path, *arguments: object) -> None:
    """A program of scripts.bench.ranks on every rank, in the server's environment."""
    command = [*launch.MPIRUN, "-n", str(world_size)]
    command += [sys.executable, "-m", "scripts.bench.ranks", *map(str, arguments)]
    with tempfile.TemporaryDirectory(prefix="bake-", dir="/dev/shm") as folder:
        tools = toolbox.find_toolbox(Path(folder))
        environment = launch.server_environment(os.environ, tools, Path(folder), world_size, os.cpu_count() or 1, root)
        done = subprocess.run(command, env=environment, check=False, stdout=subprocess.DEVNULL)
    if done.returncode:
        raise reports.bench.bench_step_failed(command, done.returncode)


def host() -> dict[str, Any]:
    found = gpus.here()
    versions = {"python": platform.python_version()}
    for name in ("torch", "triton", "transformers", "nvidia-pytriton", "perf-analyzer"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "machine": f"{os.cpu_count()} cores, {processor()}",
        "gpus": [gpu.name for gpu in found],
        "driver": found[0].driver if found else None,
        "system": platform.platform(),
        "versions": versions,
    }


def commit() -> str:
    """The commit of this tree, with +changes if files differ from it; empty without git."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    found = git("rev-parse", "--short=12", "HEAD")
    return found + ("+changes" if found and git("status", "--porcelain") else "")


def processor() -> str:
    names = [
        line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return names[0] if names else platform.machine()


def measure(
    args: argparse.Namespace, settings: launch.Settings, folder: Path, keep: Callable[[dict[str, Any]], object]
) -> dict[str, Any]:
    """All sides of one variant; `not_run` has what did not run, with the reason. keep: gets the result so far,
    before the peers run."""
    config = json.loads((args.root / "engines" / "config.json").read_bytes())
    pretrained = config["pretrained_config"]
    limits = vars(limits_of(config))
    points, world_size = points_of(args.points or DEFAULT_POINTS, limits), pretrained["mapping"]["world_size"]
    rows: list[dict[str, Any]] = []
    not_run: dict[str, str] = {}
    failed: dict[str, str] = {}

    def note(side: str, point: Point, numbers: Mapping[str, float]) -> None:
        rows.append({"side": side, "tp_size": world_size, **point.numbers(), **numbers})
        shown = ", ".join(f"{name} {numbers[name]:g}" for name in numbers)
        room.say(
            "bench", f"{side} tp{world_size} {point.input_tokens}+{point.output_tokens} x{point.concurrency}: {shown}"
        )

    generators: dict[str, str] = {}
    ready = None
    if not args.engine_only:
        ready = through_triton(
            args, settings, points, pretrained["vocab_size"], folder, note, not_run, failed, generators
        )
    wanted = folder / "points.json"
    wanted.write_text(json.dumps([point.numbers() for point in points]))
    mpirun(world_size, args.root, "ceilings", folder / "ceilings.json")
    measured = json.loads((folder / "ceilings.json").read_bytes())
    if config["pretrained_config"].get("architecture") and (args.root / "engines" / "rank0.safetensors").exists():
        mpirun(world_size, args.root, "engine", (args.root / "engines").absolute(), wanted, folder / "engine.json")
        alone = json.loads((folder / "engine.json").read_bytes())
        for point, one in zip(points, alone["points"]):
            note("engine alone", point, summary(one["requests"]))
    else:
        not_run["engine alone"] = "these are TensorRT's engines"
    for point in points:
        note(
            "ceiling",
            point,
            {"tokens_per_second": float(f"{ceiling(pretrained, measured, point)['memory_tokens_per_second']:.5g}")},
        )
    result = {
        "model": {"name": args.name, "dtype": pretrained["dtype"], "tp_size": world_size, "limits": limits},
        "ready_seconds": None if ready is None else round(ready, 1),
        "ceilings": {
            **measured,
            "points": [{**point.numbers(), **ceiling(pretrained, measured, point)} for point in points],
        },
        "generators": generators,
        "rows": rows,
        "not_run": not_run,
        "failed": failed,
    }
    if args.engine_only:
        not_run["everything but the engine alone"] = "not asked for (--engine-only)"
    else:
        keep(result)  # a peer may take long, or for ever
        peers(args, points, pretrained, limits, folder, note, not_run, generators)
    return result


def through_triton(
    args: argparse.Namespace, settings: launch.Settings, points: Sequence[Point], vocab_size: int, folder: Path, note: Note,
    not_run: dict[str, str], failed: dict[str, str], generators: dict[str, str],
) -> float:  # fmt: skip
    """The served model under every load, over gRPC and over the endpoint; seconds until it was ready."""
    path, perf_said = generator("perf_analyzer", " (its wheel needs glibc 2.38)")
    if path is None:
        not_run["perf_analyzer"] = perf_said
    aiperf, aiperf_said = generator("aiperf", "")
    with started(settings) as serving:
        server = serving.process
        endpoint = bool(settings.openai_port) and pulse.http_ok(f"{settings.openai_url}/health", None, 30)
        if not endpoint:
            aiperf, aiperf_said = None, "the OpenAI-compatible endpoint is not open"
        if aiperf is None:
            not_run["aiperf"] = aiperf_said
        else:
            generators["aiperf"] = aiperf_said
        address = f"{settings.host}:{settings.grpc_port}"
        for point in points:
            prompts = prompts_of(args.root / "model_repo", args.tokenizer, point.input_tokens, min(64, point.requests))

            def over_grpc(point: Point = point, prompts: Sequence[str] = prompts) -> list[dict[str, Any]]:
                if not path:
                    return bench_client.ask(address, point.concurrency, point.requests, point.output_tokens, prompts)
                ask_perf_analyzer(path, address, Point(point.input_tokens, 4, 1), prompts, folder, server)  # warm
                return ask_perf_analyzer(path, address, point, prompts, folder, server)

            def over_aiperf(point: Point = point, prompts: Sequence[str] = prompts) -> list[dict[str, Any]]:
                return ask_aiperf(str(aiperf), settings, point, prompts, args.tokenizer, folder, server)

            def over_completions(point: Point = point) -> list[dict[str, Any]]:
                return ask_completions(settings.openai_url, settings.root.parent.name, point, vocab_size)

            ways: dict[str, Callable[[], list[dict[str, Any]]]] = {
                f"Triton ({'perf_analyzer' if path else 'tritonclient'}, gRPC)": over_grpc
            }
            if aiperf:
                ways["OpenAI's API (aiperf)"] = over_aiperf
            if endpoint:
                ways["OpenAI's API"] = over_completions
            for side, ask in ways.items():
                try:
                    note(side, point, summary(ask()))
                except reports.Problem as problem:  # the other numbers are still useful
                    failed[f"{side}, {point.input_tokens}+{point.output_tokens} x{point.concurrency}"] = problem.title
            if server.poll() is not None:
                break
        return serving.seconds


def ask_completions(url: str, model: str, point: Point, vocab_size: int) -> list[dict[str, Any]]:
    """The generator for us and for peers: one round to warm up, then as many rounds as the others run."""
    sizes = (point.input_tokens, point.output_tokens, point.concurrency)
    completions.ask(url, model, *sizes, 1, 1, vocab_size)
    return completions.ask(url, model, *sizes, ROUNDS, 2, vocab_size)


def peers(
    args: argparse.Namespace, points: Sequence[Point], pretrained: Mapping[str, Any], limits: Mapping[str, int], folder: Path,
    note: Note, not_run: dict[str, str], generators: dict[str, str],
) -> None:  # fmt: skip
    """The same weights and lengths through other servers. If one fails, the result names it."""
    if not args.peers:
        not_run["transformers generate"] = not_run["vLLM"] = "not asked for (PEERS=on)"
        return
    few = [point for point in points if point.concurrency <= 32 and point.input_tokens <= 128]
    wanted, out = folder / "peer-points.json", folder / "transformers.json"
    wanted.write_text(json.dumps([point.numbers() for point in few]))
    command = [args.peer_python, "-m", "scripts.bench.ranks", "transformers", str(args.hf), str(wanted), str(out)]
    if few and not args.vllm_python:
        done = subprocess.run(command, capture_output=True, text=True, timeout=GENERATOR_SECONDS, check=False)
        for point, one in zip(few, json.loads(out.read_bytes())["points"] if out.is_file() else []):
            note("transformers generate", point, {"tokens_per_second": float(f"{one['tokens_per_second']:.5g}")})
        if done.returncode:
            not_run["transformers generate"] = (done.stderr.strip().splitlines() or ["it failed"])[-1][:200]
    else:
        not_run["transformers generate"] = "vLLM is asked instead (VLLM_PYTHON)"
    if not args.vllm_python:
        not_run["vLLM"] = "no environment with it was named (VLLM_PYTHON=)"
        return
    dtype, tp_size = pretrained["dtype"], pretrained["mapping"]["tp_size"]
    try:
        generators["vllm"] = vllm.version(args.vllm_python)
        with vllm.served(args.vllm_python, args.tokenizer, args.hf, args.name, dtype, tp_size, limits, folder) as url:
            for point in points:
                try:
                    note("vLLM", point, summary(ask_completions(url, args.name, point, pretrained["vocab_size"])))
                except (reports.Problem, OSError) as problem:
                    name = f"vLLM, {point.input_tokens}+{point.output_tokens} x{point.concurrency}"
                    not_run[name] = getattr(problem, "title", str(problem))[:200]
    except vllm.NotRun as why:
        not_run["vLLM"] = str(why)


def write(out: Path, result: Mapping[str, Any]) -> None:
    """OUT.json, OUT.csv, OUT.html, each whole or not at all; the numbers first."""
    out.parent.mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys(name for row in result["rows"] for name in row))
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, names)
    writer.writeheader()
    writer.writerows(result["rows"])
    kinds: list[tuple[str, Callable[[], str]]] = [
        ("json", lambda: json.dumps(result, indent=1) + "\n"),
        ("csv", table.getvalue),
        ("html", lambda: bench_page.page(result, f"{out.name}.json")),
    ]
    for kind, content in kinds:
        partial = out.with_name(f"{out.name}.{kind}.partial")
        partial.write_text(content())
        os.replace(partial, out.with_name(f"{out.name}.{kind}"))


def main() -> int:
    parser = serve.settings_parser()
    parser.description = __doc__
    parser.add_argument("--tokenizer", type=Path, required=True, help="the room config")
    parser.add_argument("--hf", type=Path, required=True, help="a Hugging Face model, for the peers")
    parser.add_argument("--name", required=True, help="the model's name, for the page")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--points", default="")
    parser.add_argument(
        "--with",
        dest="others",
        type=Path,
        nargs="*",
        default=[],
        help="earlier runs (JSON) to show on the same page, of other TP",
    )
    parser.add_argument("--baseline", type=Path)
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--vllm-python", default="", help="an interpreter that has vllm, for --peers")
    parser.add_argument("--engine-only", action="store_true", help="the engine and the ceilings, without a server")
    args = parser.parse_args()
    baseline = bench_page.read_run(args.baseline) if args.baseline else None
    others = [bench_page.read_run(path) for path in args.others]

    def keep(measured: dict[str, Any]) -> dict[str, Any]:
        about = host()
        about["versions"].update(measured["generators"])
        result = {
            "host": about,
            "commit": os.environ.get("BENCH_COMMIT") or commit(),
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "command": reports.make("bench"),
            **{name: value for name, value in measured.items() if name != "generators"},
            "rows": [row for run in others for row in run["rows"]] + measured["rows"],
        }
        if baseline:
            result["compared"] = compared(result, baseline)
        write(args.out, result)
        return result

    with tempfile.TemporaryDirectory() as folder:
        result = keep(measure(args, serve.settings_from(args), Path(folder), keep))
    room.say("bench", f"-> {args.out}.json, .csv, .html")
    if result["failed"]:
        raise reports.bench.loads_failed(result["failed"])
    worse = [line for line in result.get("compared", []) if line["worse"]]
    if worse:
        raise reports.bench.slower_than_baseline(args.baseline, worse)
    return 0


if __name__ == "__main__":
    reports.run(main)
