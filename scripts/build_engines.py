"""Room `engines`: one engine per rank and the config.json that says what they can do.

Reads   the room checkpoint
Writes  config.json in TensorRT-LLM's engine schema; rank0..N-1.engine (tensorrt), or .safetensors (torch): the
        checkpoint's files, linked, not copied
Needs   tensorrt: trtllm-build and one GPU, in the toolchain's container; torch: nothing
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from scripts import reports, room
from scripts.nvidia import abilities, contracts, gpus, memory, trtllm_build
from scripts.serving import processes
from scripts.weights.shape import rope_kind, shape_of_checkpoint

# TensorRT-LLM's own default since 0.11 (docker/contracts/trtllm-build): tokens of one engine step over all requests
MAX_NUM_TOKENS = 8192


@dataclass(frozen=True)
class Settings:
    """What an engine is built for. Limits in tokens; None: derived from the model's context (see `limits`)."""

    checkpoint: Path
    output: Path
    engine: str
    trtllm_version: str
    max_batch_size: int
    max_input_len: int | None = None
    max_seq_len: int | None = None
    max_num_tokens: int | None = None
    # a folder that keeps TensorRT's measured kernel times between builds; None: they are not kept
    timing_cache: Path | None = None

    def __post_init__(self) -> None:
        if self.engine not in BUILDERS:
            raise reports.engines.engine_kind_missing(self.engine)


def limits(settings: Settings, context_tokens: int) -> dict[str, int]:
    """The four limits of an engine, every one explicit.

    Defaults: max_seq_len is the model's context (its max_position_embeddings); max_input_len is half of max_seq_len, so
    that an answer may be as long as its question; max_num_tokens is MAX_NUM_TOKENS, but at least one whole prompt and
    at most a full batch. TensorRT-LLM reads a prompt in one step, because chunked context is off
    (scripts/build_model_repo.py); the torch engine reads it in pieces if it must.
    """
    max_seq_len = context_tokens if settings.max_seq_len is None else settings.max_seq_len
    if context_tokens < 2:
        raise reports.settings.bad_setting(
            "CONTEXT", context_tokens, "at least 2 positions", reports.make("engines", CONTEXT=4096)
        )
    if max_seq_len < 2:
        one_each = "at least 2: one token of a prompt, and one of an answer"
        raise reports.settings.bad_setting(
            "MAX_SEQ_LEN", max_seq_len, one_each, reports.make("engines", MAX_SEQ_LEN=context_tokens)
        )
    if max_seq_len > context_tokens:
        raise reports.engines.limits_do_not_fit(
            "MAX_SEQ_LEN", max_seq_len, "the model's context", context_tokens, context_tokens
        )
    max_input_len = max(1, max_seq_len // 2) if settings.max_input_len is None else settings.max_input_len
    if max_input_len >= max_seq_len:
        raise reports.engines.limits_do_not_fit(
            "MAX_INPUT_LEN", max_input_len, "MAX_SEQ_LEN", max_seq_len, max_seq_len - 1
        )
    full_batch = settings.max_batch_size * max_input_len
    max_num_tokens = min(MAX_NUM_TOKENS, full_batch) if settings.max_num_tokens is None else settings.max_num_tokens
    if settings.max_num_tokens is None:
        max_num_tokens = max(max_num_tokens, max_input_len, settings.max_batch_size)
    if max_num_tokens < settings.max_batch_size:
        raise reports.engines.limits_do_not_fit(
            "MAX_BATCH_SIZE", settings.max_batch_size, "MAX_NUM_TOKENS", max_num_tokens, max_num_tokens
        )
    if settings.engine == "tensorrt" and max_num_tokens < max_input_len:
        raise reports.engines.step_smaller_than_prompt(max_input_len, max_num_tokens)
    return {
        "max_batch_size": settings.max_batch_size,
        "max_input_len": max_input_len,
        "max_seq_len": max_seq_len,
        "max_num_tokens": max_num_tokens,
    }


def engine_config(
    golden: Mapping[str, Any], version: str, checkpoint: Mapping[str, Any], sizes: Mapping[str, int]
) -> dict[str, Any]:
    """config.json of an engine: the version's golden file, key for key, with this model's values.

    golden: docker/contracts/engine-config; checkpoint: the checkpoint's config.json. Up to 0.10 the schema has
    max_output_len (new tokens) and no max_seq_len (all tokens): upstream adds max_input_len to get it.
    """
    dtype = checkpoint["dtype"]
    pretrained = _with_values(
        golden["pretrained_config"],
        {
            "head_size": checkpoint["hidden_size"] // checkpoint["num_attention_heads"],
            "kv_dtype": dtype,
            **checkpoint,
        },
    )
    build = _with_values(
        golden["build_config"],
        {
            **sizes,
            "max_output_len": sizes["max_seq_len"] - sizes["max_input_len"],
            "opt_num_tokens": sizes["max_batch_size"],
        },
    )
    plugins = build["plugin_config"]
    build["plugin_config"] = _with_values(
        plugins, {name: dtype for name, value in plugins.items() if value == golden["pretrained_config"]["dtype"]}
    )
    return {"version": version, "pretrained_config": pretrained, "build_config": build}


def _with_values(golden: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The golden mapping with those values that it has a key for; nested mappings keep their other golden keys."""
    filled: dict[str, Any] = {}
    for key, value in golden.items():
        new = values.get(key, value)
        filled[key] = {**value, **new} if isinstance(value, dict) and isinstance(new, dict) else new
    return filled


def intent_of(
    checkpoint: Mapping[str, Any],
    sizes: Mapping[str, int],
    host: list[gpus.Gpu],
    links: gpus.Links,
    workers: int,
    timing_cache: str | None,
) -> trtllm_build.Intent:
    """The intent for trtllm-build, from the checkpoint's config.json, the limits and this host's GPUs.

    Custom all-reduce needs peer access between the ranks' GPUs, and is advised on NVLink only
    (docs/source/perf_best_practices.md of 0.8.0). Engines with it fail at run time without peer access (TensorRT-LLM
    #1374), so unknown access counts as missing.
    """
    mapping = checkpoint["mapping"]
    return trtllm_build.Intent(
        dtype=checkpoint["dtype"],
        tp_size=mapping["tp_size"],
        pp_size=mapping["pp_size"],
        capability=host[0].capability,
        **sizes,
        custom_all_reduce=links.peer_access is True and links.nvlink is True,
        quant_algo=checkpoint["quantization"]["quant_algo"],
        workers=workers,
        timing_cache=timing_cache,
    )


def fit_of(checkpoint: Mapping[str, Any], sizes: Mapping[str, int], rank_file_bytes: int, gpu: gpus.Gpu) -> memory.Fit:
    """The GPU memory of one rank of these engines: its weights as in the checkpoint, the rest from the memory model."""
    shape = shape_of_checkpoint(checkpoint)
    mapping = checkpoint["mapping"]
    asked: dict[str, Any] = {"pp_size": mapping["pp_size"], **sizes}
    engine = memory.Engine(shape, checkpoint["dtype"], mapping["tp_size"], **asked)
    fit = memory.fit(engine, gpu.memory_bytes, trtllm_build.TOKENS_PER_BLOCK)
    return replace(fit, weights_bytes=rank_file_bytes)


def passport(
    intent: trtllm_build.Intent, flags: contracts.Flags, version: str, gpu: gpus.Gpu, links: gpus.Links
) -> dict[str, Any]:
    """Facts for the manifest: what a host needs to serve these engines, and how they were made;
    no path of this machine.

    custom_all_reduce: None if the version decides at run time.
    """
    fixed = "--use_custom_all_reduce" in flags
    return {
        "tp_size": intent.tp_size,
        "pp_size": intent.pp_size,
        "quant_algo": intent.quant_algo,
        "gpu": {
            "name": gpu.name,
            "memory_bytes": gpu.memory_bytes,
            "compute_capability": gpu.compute_capability,
            "driver": gpu.driver,
        },
        "peer_access": links.peer_access,
        "nvlink": links.nvlink,
        "custom_all_reduce": intent.custom_all_reduce if fixed else None,
        "argv": trtllm_build.argv(intent, flags, "checkpoint", "engines"),
    }


# --- shell ---


def build_engines(settings: Settings) -> None:
    """Fill the room `engines`."""
    config = json.loads((settings.checkpoint / "config.json").read_bytes()) if settings.checkpoint.is_dir() else {}
    manifest = room.read_manifest(settings.checkpoint)
    sizes = limits(settings, config["max_position_embeddings"])
    if config["quantization"]["quant_algo"] is None:  # NVIDIA's tools have checked their own checkpoints
        rope = rope_kind(config.get("rotary_scaling") or {})
        abilities.check(
            settings.checkpoint,
            shape_of_checkpoint(config),
            rope,
            settings.trtllm_version,
            settings.engine,
            goal="engines",
        )
    BUILDERS[settings.engine](settings, config, manifest, sizes)


def filling(settings: Settings, sizes: Mapping[str, int], tools: Mapping[str, str] | None = None) -> Any:
    """Print the room's first line, which says what goes in."""
    arguments = {"engine": settings.engine, "trtllm_version": settings.trtllm_version, **sizes}
    return room.filling(settings.output, reads={"checkpoint": settings.checkpoint}, arguments=arguments, tools=tools)


def announce(settings: Settings, config: Mapping[str, Any], sizes: Mapping[str, int], more: str = "") -> None:
    shown = ", ".join(f"{name} {value}" for name, value in sizes.items())
    room.say("engines", f"{settings.engine}: {config['mapping']['world_size']} ranks, {config['dtype']}, {shown}{more}")


def build_torch(
    settings: Settings, config: Mapping[str, Any], manifest: Mapping[str, Any], sizes: Mapping[str, int]
) -> None:
    """The torch engine loads the checkpoint's rank files as they are."""
    world_size = config["mapping"]["world_size"]
    if config["mapping"]["pp_size"] > 1:
        stages = config["mapping"]["pp_size"]
        raise reports.settings.bad_setting("PP", stages, "1 with ENGINE=torch", reports.make("serve", PP=1))
    golden = contracts.table("engine-config", settings.trtllm_version)
    announce(settings, config, sizes)
    with filling(settings, sizes) as engines:
        for rank in range(world_size):
            name = f"rank{rank}.safetensors"
            engines.link(name, settings.checkpoint / name, room.record_of(manifest, name))
        version = contracts.reported(settings.trtllm_version)
        engines.write_json("config.json", engine_config(golden, version, config, sizes))
        engines.facts = {
            "engine": settings.engine,
            "world_size": world_size,
            "trtllm_version": settings.trtllm_version,
            "trtllm_reported": version,
        }


def build_tensorrt(
    settings: Settings, config: Mapping[str, Any], manifest: Mapping[str, Any], sizes: Mapping[str, int]
) -> None:
    """trtllm-build makes the engines; their config.json is read back before they count."""
    version, world_size = settings.trtllm_version, config["mapping"]["world_size"]
    flags = contracts.flags("trtllm-build", version)
    host = gpus.here()
    tools = check_host(settings, config, host)
    links = gpus.links_here(world_size) if len(host) >= world_size else gpus.Links(None, None)
    rank_file_bytes = max(room.record_of(manifest, f"rank{rank}.safetensors").size_bytes for rank in range(world_size))
    fit = fit_of(config, sizes, rank_file_bytes, host[0])
    if fit.verdict == "no":
        raise reports.nvidia.engines_too_large(
            settings.output, host[0].name, fit.gpu_bytes, rank_file_bytes, fit.needed_tokens
        )
    workers = trtllm_build.workers_that_fit(world_size, len(host), rank_file_bytes, free_memory_bytes())
    cached = settings.timing_cache is not None and "--output_timing_cache" in flags
    intent = intent_of(config, sizes, host, links, workers, TIMING_CACHE if cached else None)
    announce(settings, config, sizes, f"; on {host[0].name}, {workers} at a time")
    with filling(settings, sizes, tools) as engines:
        # It runs in its own folder, because config.json keeps the name of the timing cache:
        # a bare name is not a path of this machine.
        work = engines.path / "building"
        work.mkdir()
        kept = timing_cache_file(settings, host[0])
        if kept and cached and kept.is_file():
            shutil.copyfile(kept, work / TIMING_CACHE)
        command = trtllm_build.argv(intent, flags, str(settings.checkpoint.absolute()), str(engines.path))
        run_trtllm_build(command, work, intent)
        check_built(engines.path, intent, contracts.reported(version))
        for name in ["config.json", *(f"rank{rank}.engine" for rank in range(world_size))]:
            engines.take(name)
        engines.facts = {
            "engine": settings.engine,
            "world_size": world_size,
            "trtllm_version": version,
            "trtllm_reported": contracts.reported(version),
            **passport(intent, flags, version, host[0], links),
            "timing_cache_sha256": None,
            # stand-ins made them (docker/rehearsal): they are not TensorRT engines, and no image or release takes them
            **({"rehearsal": True} if "REHEARSAL_GPUS" in os.environ else {}),
        }
        if kept and (work / TIMING_CACHE).is_file():
            engines.facts["timing_cache_sha256"] = room.sha256_of(work / TIMING_CACHE).sha256
            kept.parent.mkdir(parents=True, exist_ok=True)
            room.write_synced(kept, (work / TIMING_CACHE).read_bytes())
        shutil.rmtree(work)


BUILDERS: dict[str, Callable[[Settings, Mapping[str, Any], Mapping[str, Any], Mapping[str, int]], None]] = {
    "torch": build_torch,
    "tensorrt": build_tensorrt,
}
TIMING_CACHE = "model.cache"
RANK_WRITTEN = re.compile(r"Serializing engine to \S*rank(\d+)\.engine")
CGROUP = Path("/sys/fs/cgroup")


def check_host(settings: Settings, config: Mapping[str, Any], host: list[gpus.Gpu]) -> dict[str, str]:
    """A Problem unless there is a GPU that this version can build for, and the right version of trtllm-build. Returns
    the tools' versions."""
    version = settings.trtllm_version
    if not host:
        raise reports.nvidia.no_gpu("trtllm-build")
    toolchains = {name: contracts.toolchain(name) for name in contracts.versions()}
    problem = trtllm_build.refusal(host[0], config["dtype"], config["quantization"]["quant_algo"], version, toolchains)
    if problem:
        raise problem
    if not shutil.which("trtllm-build"):
        raise reports.nvidia.not_in_toolchain("trtllm-build", version)
    tools = {}
    for package in ("tensorrt_llm", "tensorrt"):
        try:
            tools[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    expected = contracts.reported(version)
    found = tools.get("tensorrt_llm", expected)
    if found.partition("+")[0] != expected:
        raise reports.nvidia.toolchain_is_another(version, expected, found)
    return tools


def free_memory_bytes() -> int:
    """Free host memory: the system's, or what a container's limit leaves, if that is less."""
    meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(meminfo["MemAvailable"].split()[0]) * 1024
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            free = min(free, int((CGROUP / limit).read_text()) - int((CGROUP / used).read_text()))
        except (OSError, ValueError):  # no such file, or `max`: no limit
            continue
    return free


def timing_cache_file(settings: Settings, gpu: gpus.Gpu) -> Path | None:
    """The file for kernel times, which are valid for one TensorRT and one kind of GPU."""
    if settings.timing_cache is None:
        return None
    kind = re.sub(r"[^A-Za-z0-9.-]+", "-", gpu.name)
    return settings.timing_cache / f"{settings.trtllm_version}-sm{gpu.compute_capability}-{kind}.cache"


def run_trtllm_build(command: list[str], work: Path, intent: trtllm_build.Intent) -> None:
    """Run it to its end in the folder `work`, with its output in a log there; a Problem if it fails."""
    started = time.monotonic()

    def heard(line: str) -> None:
        if written := RANK_WRITTEN.search(line):
            room.say("engines", f"rank {written[1]} is built, after {time.monotonic() - started:.0f} s")

    log = work / "trtllm-build.log"
    with room.waiting("engines", f"trtllm-build, whose log is {reports.shown(log)}"):
        status, last_lines = processes.run_logged(command, log, heard)
    if status != 0:
        raise trtllm_build.failure(log, status, last_lines, intent)


def check_built(folder: Path, intent: trtllm_build.Intent, version: str) -> None:
    """A Problem unless all ranks' engines are there and config.json agrees with the intent."""
    for name in ["config.json", *(f"rank{rank}.engine" for rank in range(intent.world_size))]:
        if not (folder / name).is_file() or not (folder / name).stat().st_size:
            raise reports.nvidia.engine_not_as_asked(folder / name, name, "written", "none, or an empty one")
    different = trtllm_build.difference(json.loads((folder / "config.json").read_bytes()), intent, version)
    if different:
        raise reports.nvidia.engine_not_as_asked(folder / "config.json", *different)


def tokens(name: str, value: str) -> int | None:
    """A limit from the command line: a whole number of at least 1, or nothing (None)."""
    if not value.strip():
        return None
    if not (value.isascii() and value.isdigit()) or int(value) < 1:
        raise reports.engines.not_a_number(name, value)
    return int(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag in ("--checkpoint", "--output"):
        parser.add_argument(flag, type=Path, required=True)
    for flag in ("--engine", "--trtllm-version", "--max-batch-size"):
        parser.add_argument(flag, required=True)
    for flag in ("--max-input-len", "--max-seq-len", "--max-num-tokens"):
        parser.add_argument(flag, default="")
    parser.add_argument("--timing-cache", type=Path, metavar="FOLDER", help="kept from one tensorrt build to the next")
    args = parser.parse_args()
    max_batch_size = tokens("MAX_BATCH_SIZE", args.max_batch_size)
    if max_batch_size is None:
        raise reports.engines.not_a_number("MAX_BATCH_SIZE", "")
    build_engines(
        Settings(
            args.checkpoint,
            args.output,
            args.engine,
            args.trtllm_version,
            max_batch_size,
            tokens("MAX_INPUT_LEN", args.max_input_len),
            tokens("MAX_SEQ_LEN", args.max_seq_len),
            tokens("MAX_NUM_TOKENS", args.max_num_tokens),
            args.timing_cache,
        )
    )


if __name__ == "__main__":
    reports.run(main)
