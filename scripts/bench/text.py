"""`make bench-text`: the text models against NVIDIA's of v0.8.0, side by side on a real tritonserver,
over an engine without weights.

alone   tensorrt_llm, asked with token ids: a stand-in (scripts/bench/models/stand_in.py); the upper limit for all
        others
stock   Triton's ensemble of NVIDIA's pre- and postprocessing, written from its behaviour
        (scripts/bench/models/stock_*.py)
ours    the ensemble that `make model_repo` makes

Each client always has one request in progress over its own gRPC stream: 128 tokens in, 64 out, streamed. Every answer
of ours is compared with the text of its tokens. Ratios are from one run: a round asks all three in turn, and numbers
are medians over rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from scripts import build_model_repo, reports
from scripts.bench import serve as bench_serve
from scripts.nvidia import contracts
from scripts.serving import launch, processes, pulse, ranks, toolbox

MODELS = Path(__file__).parent / "models"
WRITTEN = Path(__file__).parents[2] / "model_repo_template" / "tensorrt_llm_bls" / "1"
# the first version: its stock models are described here
VERSION = contracts.versions()[0]
IN_TOKENS, OUT_TOKENS = 128, 64
MAX_BATCH_SIZE = 64
WARM_SECONDS = 1.0
# English, Korean, Chinese, joined emoji, two spaces: texts that streams break
SAMPLE = "Once upon a time  there was 다람쥐 한 마리, 숲속의 작은 집. 你好 👩‍👩‍👧 and a fox 🦊 who said: naïve! "


@dataclass
class Measured:
    """What the clients saw in one window."""

    seconds: float
    answers: int = 0
    responses: int = 0
    wrong_texts: int = 0
    first_token_seconds: list[float] = field(default_factory=list)
    answer_seconds: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, float]:
        first = sorted(self.first_token_seconds) or [float("nan")]
        return {
            "tokens_per_second": self.answers * OUT_TOKENS / self.seconds,
            "responses_per_second": self.responses / self.seconds,
            "first_token_p50_ms": 1e3 * first[len(first) // 2],
            "first_token_p99_ms": 1e3 * first[min(len(first) - 1, int(len(first) * 0.99))],
            "answer_seconds": statistics.mean(self.answer_seconds) if self.answer_seconds else float("nan"),
            "wrong_texts": self.wrong_texts,
        }


# --- the repository: the made one with the stand-in for its engine, and stock's three models beside it ---


def stock_configs(tokenizer_dir: str) -> dict[str, str]:
    """config.pbtxt of NVIDIA's three models of v0.8.0 under their own names, from the version's contract table."""
    table = contracts.table("backend", VERSION)
    renamed = {"preprocessing": "stock_preprocessing", "postprocessing": "stock_postprocessing"}
    configs = {}
    for model in ("preprocessing", "postprocessing", "ensemble"):
        tensors = "".join(
            f"{kind} [\n"
            + ",\n".join(build_model_repo.tensor_line(tensor) for tensor in table[model][f"{kind}s"])
            + "\n]\n"
            for kind in ("input", "output")
        )
        text = f'name: "stock_{model}"\nmax_batch_size: {MAX_BATCH_SIZE}\n{tensors}'
        if model == "ensemble":
            text += 'platform: "ensemble"\nensemble_scheduling {\n'
            for step in table[model]["ensemble_steps"]:
                name = renamed.get(step["model_name"], step["model_name"])
                maps = "".join(
                    f'    {kind} {{ key: "{key}" value: "{value}" }}\n'
                    for kind in ("input_map", "output_map")
                    for key, value in step[kind].items()
                )
                text += f'  step {{\n    model_name: "{name}" model_version: -1\n{maps}  }}\n'
            text += "}\n"
        else:
            text += 'backend: "python"\ninstance_group [ { count: 1 kind: KIND_CPU } ]\n'
            text += f'parameters {{ key: "tokenizer_dir" value {{ string_value: "{tokenizer_dir}" }} }}\n'
        configs[f"stock_{model}"] = text
    return configs


def write_repository(made: Path, folder: Path, stock: bool) -> None:
    """folder/model_repo, ready to be served from `folder`: the stand-in and our text models, or stock's."""
    repository = folder / "model_repo"
    shutil.copytree(made, repository, ignore=shutil.ignore_patterns("manifest.json", "args*"))
    for config in repository.glob("*/config.pbtxt"):  # as many as the clients, whatever the engines were built for
        config.write_text(re.sub(r"(?m)^max_batch_size: \d+", f"max_batch_size: {MAX_BATCH_SIZE}", config.read_text()))
    engine = repository / "tensorrt_llm" / "1"
    shutil.rmtree(engine)
    engine.mkdir()
    shutil.copy(MODELS / "stand_in.py", engine / "model.py")
    if not stock:
        return
    for model in ("ensemble", "tensorrt_llm_bls", "postprocessing"):
        shutil.rmtree(repository / model)
    (repository / "preprocessing" / "config.pbtxt").unlink()  # its tokenizer is used
    shutil.move(repository / "preprocessing", folder / "tokenizer")
    for model, text in stock_configs("tokenizer/1/tokenizer").items():
        version = repository / model / "1"
        version.mkdir(parents=True)
        (version.parent / "config.pbtxt").write_text(text)
        if model != "stock_ensemble":
            shutil.copy(MODELS / f"{model}.py", version / "model.py")


class Server:
    """One tritonserver over such a repository, on free ports of this machine."""

    def __init__(self, made: Path, run_dir: Path, stock: bool, pace: str) -> None:
        run_dir.mkdir()
        self.folder = run_dir / "served"
        write_repository(made, self.folder, stock)
        self.pace(pace)
        tools = toolbox.find_toolbox(run_dir)
        environment = launch.server_environment(os.environ, tools, run_dir, 1, os.cpu_count() or 1)
        environment["HF_HUB_OFFLINE"] = "1"
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            second.bind(("127.0.0.1", 0))
            http_port, self.grpc_port = first.getsockname()[1], second.getsockname()[1]
        environment["BAKE_GRPC_ADDRESS"] = f"127.0.0.1:{self.grpc_port}"
        command = launch.server_command(tools, f"{run_dir.name}-") + [
            "--http-address=127.0.0.1",
            f"--http-port={http_port}",
            "--grpc-address=127.0.0.1",
            f"--grpc-port={self.grpc_port}",
            "--allow-metrics=false",
        ]
        self.log = open(run_dir / "log", "w+")  # noqa: SIM115 (closed in end)
        self.process = subprocess.Popen(
            command, cwd=self.folder, env=environment, stdout=self.log, stderr=subprocess.STDOUT, start_new_session=True
        )
        deadline = time.monotonic() + 120
        while not pulse.http_ok(f"http://127.0.0.1:{http_port}/v2/health/ready", None, 2):
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.end()
                raise reports.bench.bench_server_failed("it did not become ready", self.tail())
            time.sleep(0.1)

    def pace(self, text: str) -> None:
        """Set the stand-in's steps, from its next idle moment on (its file `pace`)."""
        (self.folder / "model_repo" / "tensorrt_llm" / "1" / "pace").write_text(text)

    def tail(self) -> list[str]:
        """The last lines of its log."""
        lines = Path(self.log.name).read_text().splitlines()
        return [line for line in lines if line[:1] in ("E", "F")][-ranks.LOG_LINES :]

    def end(self) -> None:
        """End it with all processes that it started: a server that hangs leaves its stubs behind."""
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            pass
        processes.end_session(self.process.pid, timeout_seconds=5)
        self.process.wait()
        processes.remove_shared_memory(self.folder.parent.name)
        self.log.close()


# --- the clients ---


def prompt_of(tokenizer_dir: Path) -> tuple[str, list[int], str]:
    """A text of IN_TOKENS tokens, BOS included; its ids; and the text that the stand-in makes of it."""
    sys.path.insert(0, str(WRITTEN))
    from text import Text

    text = Text(tokenizer_dir)
    prompt = SAMPLE * (IN_TOKENS // 8)
    while len(text.encode([prompt])[0]) > IN_TOKENS:
        prompt = prompt[:-1]
    ids = text.encode([prompt])[0]
    said = [token for token in ids if token > 2]
    return prompt, ids, text.decode([said[n % len(said)] for n in range(OUT_TOKENS)])


def request_of(model: str, prompt: str, ids: Sequence[int]) -> Any:
    """The gRPC message that each client sends repeatedly."""
    from scripts.serving.triton_client import ints, message_of, texts, yes

    if model == "tensorrt_llm":
        return message_of(
            model, {
                "input_ids": ints(*ids), "input_lengths": ints(len(ids)), "request_output_len": ints(OUT_TOKENS), "streaming": yes(),
            },
        )  # fmt: skip
    return message_of(
        model, {
            "text_input": texts(prompt), "max_tokens": ints(OUT_TOKENS), "stream": yes(), "bad_words": texts(""), "stop_words": texts(""),
        },
    )  # fmt: skip


ANSWER_SECONDS = 20
STOCK_ATTEMPTS = 4


async def client(stub: Any, request: Any, expected: str | None, until: float, begins: float, seen: Measured) -> None:
    """Ask, read to the end, ask again. Only answers that begin after `begins` and end before `until` count."""
    stream = stub.ModelStreamInfer()
    while time.monotonic() < until:
        asked, first, text, responses, done = time.monotonic(), 0.0, [], 0, False
        await stream.write(request)
        while not done:
            answer = await stream.read()
            if answer.error_message:
                raise reports.serving.request_refused(answer.error_message)
            response = answer.infer_response
            if response.outputs:
                responses += 1
                first = first or time.monotonic()
                if expected is not None:
                    at = next(n for n, output in enumerate(response.outputs) if output.name == "text_output")
                    text.append(response.raw_output_contents[at][4:])
            done = response.parameters["triton_final_response"].bool_param
        now = time.monotonic()
        if asked >= begins:
            seen.first_token_seconds.append(first - asked)
        if asked >= begins and now <= until:
            seen.answer_seconds.append(now - asked)
        if begins <= now <= until:
            seen.answers += 1
            seen.responses += responses
            seen.wrong_texts += expected is not None and b"".join(text).decode() != expected
    await stream.done_writing()
    stream.cancel()


async def window(port: int, request: Any, expected: str | None, clients: int, seconds: float) -> Measured:
    """Warm up, then measure. An answer's tokens count in the window that it ends in."""
    from tritonclient.grpc import service_pb2_grpc

    begins = time.monotonic() + min(WARM_SECONDS, seconds / 2)
    seen = Measured(seconds)
    channels = [grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=[("bench", n)]) for n in range(4)]
    stubs = [service_pb2_grpc.GRPCInferenceServiceStub(channel) for channel in channels]
    await asyncio.gather(
        *(client(stubs[n % 4], request, expected, begins + seconds, begins, seen) for n in range(clients))
    )
    for channel in channels:
        await channel.close()
    return seen


def median_of(rounds: Sequence[Measured]) -> dict[str, float]:
    """The median of each number over the rounds; wrong texts are summed."""
    found = [one.summary() for one in rounds]
    summary = {name: statistics.median(one[name] for one in found) for name in found[0]}
    summary["wrong_texts"] = sum(one.wrong_texts for one in rounds)
    summary["answers"] = sum(one.answers for one in rounds)
    return summary


class Bench:
    """Two servers of the same tritonserver, ours and stock's; only one of them works at a time.

    There are two because Triton 2.51 was seen to crash under stock's ensemble, which corrupts the heap, or to hang
    while it reports the crash. Then stock's server is started again.
    """

    def __init__(
        self, made: Path, folder: Path, cases: Mapping[str, tuple[Any, str | None]], runner: asyncio.Runner
    ) -> None:
        self.made, self.folder, self.cases, self.runner = made, folder, cases, runner
        self.servers: dict[bool, Server] = {}
        self.n_started = 0

    def server(self, stock: bool, pace: str) -> Server:
        if stock not in self.servers:
            self.n_started += 1
            self.servers[stock] = Server(self.made, self.folder / f"{self.folder.name}-{self.n_started}", stock, pace)
        self.servers[stock].pace(pace)
        return self.servers[stock]

    def measure(self, pace: str, clients: int, rounds: int, seconds: float) -> dict[str, dict[str, float]]:
        """All cases in turn, `rounds` times."""
        seen: dict[str, list[Measured]] = {name: [] for name in self.cases}
        for _ in range(rounds):
            for name in self.cases:
                seen[name].append(self._window(name, pace, clients, seconds))
        return {name: median_of(found) for name, found in seen.items()}

    def _window(self, name: str, pace: str, clients: int, seconds: float) -> Measured:
        request, expected = self.cases[name]
        stock = name == "stock"
        for attempt in range(STOCK_ATTEMPTS if stock else 1):
            server = self.server(stock, pace)
            asked = window(server.grpc_port, request, expected, clients, seconds)
            try:
                return self.runner.run(asyncio.wait_for(asked, seconds + ANSWER_SECONDS))
            except (grpc.RpcError, TimeoutError) as problem:
                why, tail = f"{name} did not answer: {type(problem).__name__}", server.tail()
                server.end()
                del self.servers[stock]
                print(f"  ({why}, attempt {attempt + 1})", flush=True)
        raise reports.bench.bench_server_failed(why, tail)

    def end(self) -> None:
        for server in self.servers.values():
            server.end()


# name of a measurement: (the stand-in's file `pace`, clients, what it shows)
PACES: dict[str, tuple[str, int, str]] = {
    "one": (
        "1000 one",
        32,
        "the engine sends one token per response, as NVIDIA's does: where stock's numbers were first taken",
    ),
    "ready": ("1000 ready", 32, "the engine sends all tokens that are ready, as the torch engine does"),
    "paced": (
        "8000 ready",
        8,
        "an engine of 1,000 tokens per second for 8 clients: what the text adds to an answer's time",
    ),
}


def verdicts(found: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[str, float]:
    """The ratios that the README states."""
    one, ready, paced = found["one"], found["ready"], found["paced"]
    speed = "tokens_per_second"
    return {
        "ours_to_stock": ready["ours"][speed] / one["stock"][speed],
        "ours_to_stock_on_one_engine": ready["ours"][speed] / ready["stock"][speed],
        "alone_to_target": ready["alone"][speed] / (5 * one["stock"][speed]),
        "first_token_p99_ms": ready["ours"]["first_token_p99_ms"],
        "stock_first_token_p99_ms": one["stock"]["first_token_p99_ms"],
        "added_percent": 100 * (paced["ours"]["answer_seconds"] / paced["alone"]["answer_seconds"] - 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="the folder that holds the room model_repo")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--seconds", type=float, default=4.0, help="of each window; half of it, at most a second, warms up before"
    )
    args = parser.parse_args()
    made = args.root / "model_repo"
    prompt, ids, expected = prompt_of(made / build_model_repo.TOKENIZER)
    cases = {
        "alone": (request_of("tensorrt_llm", prompt, ids), None),
        "stock": (request_of("stock_ensemble", prompt, ids), expected),
        "ours": (request_of("ensemble", prompt, ids), expected),
    }
    found: dict[str, dict[str, dict[str, float]]] = {}
    print(
        f"{'':<14}{'tokens/s':>10}{'responses/s':>13}{'first token p50':>17}{'p99':>8}{'answer':>9}{'wrong texts':>13}"
    )
    # one event loop for all windows: grpc.aio was seen to hang if each had its own
    with (
        tempfile.TemporaryDirectory(prefix="bake-", dir="/dev/shm", ignore_cleanup_errors=True) as folder,
        asyncio.Runner() as runner,
    ):
        bench = Bench(made, Path(folder), cases, runner)
        try:
            for pace, (step, clients, what) in PACES.items():
                print(f"\n{what}; {clients} clients")
                found[pace] = bench.measure(step, clients, args.rounds, args.seconds)
                for name, numbers in found[pace].items():
                    wrong = f"{numbers['wrong_texts']:.0f} of {numbers['answers']:.0f}" if name != "alone" else ""
                    print(
                        f"  {name:<12}{numbers['tokens_per_second']:>10.0f}{numbers['responses_per_second']:>13.0f}"
                        f"{numbers['first_token_p50_ms']:>14.1f} ms{numbers['first_token_p99_ms']:>8.1f}"
                        f"{1e3 * numbers['answer_seconds']:>9.0f}{wrong:>13}",
                        flush=True,
                    )
        finally:
            bench.end()
    result = {
        "machine": bench_serve.machine(),
        "python": platform.python_version(),
        "found": found,
        "ratios": verdicts(found),
    }
    Path("build").mkdir(exist_ok=True)
    (Path("build") / "bench-text.json").write_text(json.dumps(result, indent=2) + "\n")
    print(f"\n{result['machine']}")
    for key, value in verdicts(found).items():
        print(f"{key:<28} {value:.2f}")
    if any(found[pace]["ours"]["wrong_texts"] for pace in found):
        raise reports.bench.text_is_wrong("ensemble")


if __name__ == "__main__":
    reports.run(main)
