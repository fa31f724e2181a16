"""One process of `make bench` without the server: a rank of the engine alone, of the host's ceilings, or a peer.

python3 -m scripts.bench.ranks ceilings OUT         under mpirun: copy bandwidth, all-reduce time by size
python3 -m scripts.bench.ranks engine ENGINES POINTS OUT    under mpirun: the engine without Triton, the same requests
python3 -m scripts.bench.ranks transformers HF POINTS OUT   Hugging Face's generate on one device, the same lengths
"""

from __future__ import annotations

import importlib
import json
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from scripts import reports

ENGINE_CODE = Path(__file__).parents[2] / "model_repo_template" / "tensorrt_llm" / "1"
COPY_BYTES = {"cuda": 2 << 30, "cpu": 256 << 20}
REPEAT = 20


def request_times(began: float, arrivals: Sequence[float], tokens: Sequence[int]) -> dict[str, Any]:
    """One request as a load generator reports it: seconds on one clock, and how many tokens came with each response."""
    return {"began": began, "arrivals": list(arrivals), "tokens": list(tokens)}


def median_seconds(run: Callable[[], object], wait: Callable[[], None]) -> float:
    for _ in range(3):
        run()
    wait()
    times = []
    for _ in range(REPEAT):
        began = time.perf_counter()
        run()
        wait()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def ceilings(out: Path) -> None:
    """The limits for every engine on this host. all_reduce: bytes -> seconds of one, measured over 64 in a row."""
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    import torch

    gpu = torch.cuda.is_available()
    device = torch.device("cuda", world.Get_rank()) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    wait: Callable[[], None] = torch.cuda.synchronize if gpu else (lambda: None)
    source = torch.ones(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_seconds = median_seconds(lambda: target.copy_(source), wait)
    reduced: dict[str, float] = {}
    if world.Get_size() > 1:
        folder = world.bcast(tempfile.mkdtemp() if world.Get_rank() == 0 else None)
        torch.distributed.init_process_group(
            "nccl" if gpu else "gloo",
            init_method=f"file://{folder}/meet",
            rank=world.Get_rank(),
            world_size=world.Get_size(),
        )
        for size in (8 << 10, 256 << 10, 8 << 20):
            numbers = torch.zeros(size // 4, device=device)

            def some(numbers: Any = numbers) -> None:
                for _ in range(64):
                    torch.distributed.all_reduce(numbers)

            run: Callable[[], object] = some
            if gpu:  # a graph, like the engine's steps: launched one by one, the launches would dominate
                some()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    some()
                run = graph.replay
            reduced[str(size)] = median_seconds(run, wait) / 64
        # NCCL waits for ever for a graph that still uses its communicator
        run = some = graph = None  # type: ignore[assignment]
        torch.distributed.destroy_process_group()
    if world.Get_rank() == 0:
        name = torch.cuda.get_device_name() if gpu else "CPU"
        found = {
            "device": name,
            "copy_bytes_per_second": 2 * source.nbytes / copy_seconds,
            "all_reduce_seconds": reduced,
        }
        out.write_text(json.dumps(found))


def engine(folder: Path, points: Path, out: Path) -> None:
    """Every point's requests at once, as many at a time as its concurrency; rank 0 writes, the others follow."""
    sys.path.insert(0, str(ENGINE_CODE))
    code = importlib.import_module("engine")
    began = time.perf_counter()
    opened = code.open_engine(folder)
    if not isinstance(opened, code.Engine):
        opened.follow()
        return
    loaded, results = time.perf_counter() - began, []
    for point in json.loads(points.read_bytes()):
        results.append({**point, "requests": engine_point(code, opened, point)})
        print("asked 1", flush=True)
    out.write_text(json.dumps({"load_seconds": loaded, "points": results}))
    opened.close()


def engine_point(code: Any, opened: Any, point: dict[str, Any]) -> list[dict[str, Any]]:
    chance = random.Random(0)
    results: list[dict[str, Any]] = []
    done, lock = threading.Event(), threading.Lock()
    left = [point["requests"]]

    def submit() -> None:
        with lock:
            if not left[0]:
                return
            left[0] -= 1
        began, arrivals, counts = time.perf_counter(), [], []

        def receive(piece: Any) -> None:
            arrivals.append(time.perf_counter())
            counts.append(len(piece.tokens))
            if piece.final:
                results.append(request_times(began, arrivals, counts))
                if len(results) == point["requests"]:
                    done.set()
                threading.Thread(target=submit).start()  # the engine's thread holds its lock, so another one submits

        prompt = tuple(chance.randrange(3, opened.config.vocab_size) for _ in range(point["input_tokens"]))
        opened.submit(code.Request(prompt, point["output_tokens"], receive))

    for _ in range(point["concurrency"]):
        submit()
    done.wait()
    return results


def transformers(folder: Path, points: Path, out: Path) -> None:
    """The simplest peer: static batches, no streaming."""
    import torch
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    model = model.to(device).eval()
    results = []
    for point in json.loads(points.read_bytes()):
        size = (point["concurrency"], point["input_tokens"])
        ids = torch.randint(3, model.config.vocab_size, size, device=device)
        counts = {
            "max_new_tokens": point["output_tokens"],
            "min_new_tokens": point["output_tokens"],
            "do_sample": False,
        }
        with torch.inference_mode():
            for _ in range(2):  # the second round counts
                began = time.perf_counter()
                model.generate(ids, attention_mask=torch.ones_like(ids), **counts)
                if device == "cuda":
                    torch.cuda.synchronize()
                seconds = time.perf_counter() - began
        results.append({**point, "tokens_per_second": point["concurrency"] * point["output_tokens"] / seconds})
        out.write_text(json.dumps({"points": results}))


def main() -> None:
    what = {"ceilings": ceilings, "engine": engine, "transformers": transformers}[sys.argv[1]]
    what(*map(Path, sys.argv[2:]))  # type: ignore[operator]


if __name__ == "__main__":
    reports.run(main)
