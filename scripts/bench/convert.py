"""Measures Meta's weights -> checkpoint (the rooms config and checkpoint) against copying, syncing and hashing the same
bytes, and against transformers 4.47.1's converter alone, in one run on one disk.

It makes a random model of Llama 2's shape in the scratch folder, converts it, and prints ratios and peak memory,
also as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from scripts import reports
from scripts.nvidia import contracts
from scripts.room import human_bytes
from scripts.weights.shape import Params

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = ROOT / "models" / "stories" / "tokenizer.model"
VOCAB_SIZE = 2048
# 20 layers of it are 2.05 GB in float16
DIM, HEADS, MULTIPLE_OF = 2048, 16, 256
# feed-forward size of the layer of --wide: 2048 * 270336 * 2 bytes are 1.03 GiB
WIDE = 270_336
SAMPLE_SECONDS = 0.005
PEER = "transformers 4.47.1"
# one sha256 of every byte by Python (coreutils' sha256sum takes five times as long on a CPU with instructions for it)
HASH = "import sys; from pathlib import Path; from scripts.room import sha256_of; [sha256_of(Path(p)) for p in sys.argv[1:]]"


@dataclass(frozen=True)
class Settings:
    """size_gb: decimal, of the model's weights; cache: whether each step finds its input in memory; runs: how many runs
    the medians are over.

    wide: one layer whose matrices have more than 1 GiB each, to see that memory does not follow.
    """

    size_gb: float
    cache: str
    runs: int
    scratch: Path
    wide: bool
    transformers_4_47: Path | None


@dataclass
class Measured:
    """One step over all runs: wall seconds (interpreter start and imports included, output synced),
    peak anonymous memory.

    cpu_seconds (user and system) show whether other programs were busy: then wall time changes,
    but CPU time hardly does.
    """

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    anonymous_bytes: int = 0


def layers_for(size_bytes: float) -> int:
    """How many layers make a model of at least this size in float16."""
    params = _params(1)
    layer = 4 * DIM * DIM + 3 * DIM * params.intermediate_size + 2 * DIM
    return max(1, -(-int(size_bytes - 4 * VOCAB_SIZE * DIM) // (2 * layer)))


def ratios(measured: dict[str, Measured]) -> dict[str, list[float]]:
    """Ours against each other way, run by run, so that other load on the machine counts for both sides."""

    def together(*names: str) -> list[float]:
        return [sum(seconds) for seconds in zip(*(measured[name].seconds for name in names))]

    others = {"cp+sync": ["cp+sync"], "cp+sync and one hash": ["cp+sync", "hash"]}
    if PEER in measured:
        others[PEER] = [PEER]
    return {
        f"config+checkpoint / {name}": [
            one / other for one, other in zip(together("config", "checkpoint"), together(*steps), strict=True)
        ]
        for name, steps in others.items()
    }


def report(measured: dict[str, Measured], size_bytes: int) -> dict[str, object]:
    """The result as JSON: seconds, ratios and GB/s of the input for each run, peak memory."""

    def rounded(values: list[float]) -> list[float]:
        return [round(value, 2) for value in values]

    return {
        "size_bytes": size_bytes,
        "seconds": {name: rounded(step.seconds) for name, step in measured.items()},
        "processor_seconds": {name: rounded(step.cpu_seconds) for name, step in measured.items()},
        "gb_per_second": {
            name: rounded([size_bytes / 1e9 / value for value in step.seconds])
            for name, step in measured.items()
            if name != "config"
        },
        "peak_anonymous_bytes": {name: step.anonymous_bytes for name, step in measured.items()},
        "ratios": {name: rounded(values) for name, values in ratios(measured).items()},
    }


def bench_convert(settings: Settings) -> dict[str, object]:
    """Make the model, measure every step in turn, `runs` times; returns what report() says."""
    scratch = settings.scratch
    shutil.rmtree(scratch, ignore_errors=True)
    meta, config, checkpoint, copy, theirs = (
        scratch / name for name in ("meta", "config", "checkpoint", "copy", "transformers")
    )
    layers, multiple_of = (1, WIDE) if settings.wide else (layers_for(settings.size_gb * 1e9), MULTIPLE_OF)
    size_bytes = _make_model(meta, layers, multiple_of)
    print(f"{human_bytes(size_bytes)} of weights, float16, {settings.cache} cache, {settings.runs} run(s)", flush=True)
    python = sys.executable
    steps: dict[str, list[str]] = {
        "cp+sync": ["cp", "-r", str(meta), str(copy)],
        "hash": [python, "-c", HASH, *(str(path) for path in sorted(meta.iterdir()))],
        "config": [python, "-m", "scripts.build_config", "--weights", str(meta), "--output", str(config)],
        "checkpoint": [python, "-m", "scripts.build_checkpoint", "--model", str(config), "--weights", str(meta)]
        + ["--tp-size", "2", "--trtllm-version", contracts.versions()[0], "--output", str(checkpoint)],
    }
    if settings.transformers_4_47:
        converter = ["-m", "transformers.models.llama.convert_llama_weights_to_hf", "--model_size", "7B"]
        converter += ["--llama_version", "2"]
        steps[PEER] = [str(settings.transformers_4_47), *converter]
        steps[PEER] += ["--input_dir", str(meta), "--output_dir", str(theirs)]
    else:
        print("transformers 4.47.1: not run, no --transformers-4-47 PYTHON was given")
    measured = {name: Measured() for name in steps}
    for _ in range(settings.runs):
        for folder in (copy, config, checkpoint, theirs):
            shutil.rmtree(folder, ignore_errors=True)
        for name, command in steps.items():
            _set_cache(meta, settings.cache)
            os.sync()
            _measure(command, {"cp+sync": copy, PEER: theirs}.get(name), measured[name])
            shutil.rmtree(copy, ignore_errors=True)  # two copies at once would need more disk than the steps do
    shutil.rmtree(scratch)
    result = {"cache": settings.cache, **report(measured, size_bytes)}
    for name, step in measured.items():
        times = ", ".join(f"{value:.2f}" for value in step.seconds)
        cpu, memory = median(step.cpu_seconds), human_bytes(step.anonymous_bytes)
        speed = "" if name == "config" else f", {size_bytes / 1e9 / median(step.seconds):.2f} GB/s"
        print(
            f"{name:<20} {median(step.seconds):6.2f} s ({times}){speed}, CPU {cpu:.2f} s, peak anonymous memory "
            f"{memory}"
        )
    for name, values in ratios(measured).items():
        print(f"{name:<44} {median(values):.2f} ({', '.join(f'{value:.2f}' for value in values)})")
    return result


def _measure(command: list[str], unsynced: Path | None, into: Measured) -> None:
    """Run a step; if it does not sync its output, the sync counts too."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    if unsynced:
        environment["TMPDIR"] = str(unsynced.parent)
    started, cpu_before = time.monotonic(), os.times()
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, env=environment) as process:
        sampler = threading.Thread(target=_sample, args=(process, into))
        sampler.start()
        status = process.wait()
    if status == 0 and unsynced and unsynced.is_dir():
        subprocess.run(["sync", *map(str, unsynced.rglob("*"))], check=True)
    into.seconds.append(time.monotonic() - started)
    cpu = os.times()
    into.cpu_seconds.append(
        cpu.children_user + cpu.children_system - cpu_before.children_user - cpu_before.children_system
    )
    sampler.join()
    if status:
        raise reports.bench.bench_step_failed(command, status)


def _sample(process: subprocess.Popen[bytes], into: Measured) -> None:
    """Peak of RssAnon + RssShmem, sampled every SAMPLE_SECONDS."""
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            return
        kilobytes = [int(line.split()[1]) for line in status.splitlines() if line.startswith(("RssAnon", "RssShmem"))]
        into.anonymous_bytes = max(into.anonymous_bytes, 1024 * sum(kilobytes))
        time.sleep(SAMPLE_SECONDS)


def _set_cache(folder: Path, state: str) -> None:
    """Bring a folder's files into memory, or have the kernel forget them (no root needed once they are synced)."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                if state == "cold":
                    os.fsync(file.fileno())
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                else:
                    while file.read(8 << 20):
                        pass


def _params(n_layers: int, multiple_of: int = MULTIPLE_OF) -> Params:
    return Params(DIM, n_layers, HEADS, HEADS, None, multiple_of, None, 1e-5, 10000.0, None)


def _make_model(folder: Path, n_layers: int, multiple_of: int = MULTIPLE_OF) -> int:
    """A random model in Meta's form; returns the bytes of its weights."""
    import torch

    params = _params(n_layers, multiple_of)
    width = params.intermediate_size
    shapes = {"tok_embeddings": (VOCAB_SIZE, DIM), "norm": (DIM,), "output": (VOCAB_SIZE, DIM)}
    for layer in range(n_layers):
        shapes.update({f"layers.{layer}.attention.w{name}": (DIM, DIM) for name in "qkvo"})
        shapes.update({f"layers.{layer}.feed_forward.w{name}": (width, DIM) for name in "13"})
        shapes[f"layers.{layer}.feed_forward.w2"] = (DIM, width)
        shapes.update({f"layers.{layer}.{name}_norm": (DIM,) for name in ("attention", "ffn")})
    folder.mkdir(parents=True)
    weights = {f"{name}.weight": torch.rand(shape, dtype=torch.float16) for name, shape in shapes.items()}
    torch.save(weights, folder / "consolidated.00.pth")
    # vocab_size by number: 4.47.1's converter does not know Meta's -1
    values = {
        "dim": DIM,
        "n_layers": n_layers,
        "n_heads": HEADS,
        "multiple_of": multiple_of,
        "norm_eps": 1e-5,
        "vocab_size": VOCAB_SIZE,
    }
    (folder / "params.json").write_text(json.dumps(values))
    shutil.copy(TOKENIZER, folder)
    return sum(tensor.nbytes for tensor in weights.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size-gb", type=float, default=2.0)
    parser.add_argument("--wide", action="store_true", help="instead: one layer with matrices above 1 GiB (3.4 GB)")
    parser.add_argument("--cache", choices=("warm", "cold"), default="warm")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--scratch", type=Path, default=ROOT / "build" / "bench-convert")
    parser.add_argument(
        "--transformers-4-47", type=Path, metavar="PYTHON", help="an interpreter that has transformers 4.47.1 and torch"
    )
    settings = Settings(**vars(parser.parse_args()))
    result = bench_convert(settings)
    output = settings.scratch.with_name(f"bench-convert-{settings.cache}.json")
    output.write_text(json.dumps(result, indent=2) + "\n")
    print(f"-> {reports.shown(output)}")


if __name__ == "__main__":
    reports.run(main)
