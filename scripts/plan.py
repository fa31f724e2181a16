"""The journey as a table before it is made: rooms, bytes, memory, commands, and what fits on the GPUs.
Runs nothing, writes nothing.

Needs only the standard library: no GPU, docker or weights. The shapes of the presets are in models/shapes.json, and
ASSUME_GPU names the GPUs. A choice that cannot work ends in a report and status 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import re
import shlex
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Mapping, Sequence

from scripts import build_engines, reports, settings
from scripts.making import toolchain
from scripts.nvidia import abilities, contracts, gpus, quants, trtllm_build
from scripts.nvidia import memory as memory_model
from scripts.room import human_bytes, human_gpu_bytes, is_room
from scripts.serving import launch, toolbox
from scripts.tokenizer import byte_bpe, sentencepiece
from scripts.weights import files
from scripts.weights.folder import check_folder
from scripts.weights.shape import (
    LlamaShape,
    max_positions,
    padded_heads,
    params_of,
    possible_tp_sizes,
    read_json,
    read_params,
    rope_kind,
    rope_of,
    shape_of_config,
    why_impossible,
)

ROOT = Path(__file__).parent.parent
SHAPES = ROOT / "models" / "shapes.json"
# tokenizer, configs and code of the five models
MODEL_REPO_BYTES = 5_000_000
VERIFIED_BYTES = 1_000_000
# tokenizer and configs
CONFIG_BYTES = 5_000_000
LIMITS = ("max_batch_size", "max_input_len", "max_seq_len", "max_num_tokens")
WIDTH = 120


@dataclass(frozen=True)
class Choice:
    """The user's choice. settings: every setting with its value, from the Makefile; refused:
    those that make cannot take."""

    settings: Mapping[str, str]
    refused: Sequence[str] = ()

    def __getitem__(self, name: str) -> str:
        return self.settings.get(name, "")

    def number(self, name: str) -> int | None:
        return build_engines.tokens(name, self[name])

    @property
    def weights(self) -> Path:
        return Path(self["WEIGHTS"])

    @property
    def tensorrt(self) -> bool:
        return self["ENGINE"] == "tensorrt"


@dataclass(frozen=True)
class Model:
    """What is known of a model before it is converted. stored_bytes: size of its weight files;
    None if they are not here."""

    name: str
    shape: LlamaShape
    dtype: str
    context: int
    form: str  # meta, hf, gguf, or table: from models/shapes.json
    stored_bytes: int | None
    rope: str = "default"  # the kind of rope scaling


@dataclass(frozen=True)
class Journey:
    """A choice that works, with everything that follows from it."""

    choice: Choice
    model: Model
    engine: memory_model.Engine
    toolchain: str
    gpus: Sequence[gpus.Gpu]
    fit: memory_model.Fit | None  # None without GPUs, and for the torch engine

    @property
    def seen(self) -> str:
        how = "assumed" if self.choice["ASSUME_GPU"] else "a rehearsal" if self.choice["REHEARSAL"] else "here"
        return f"{described(self.gpus)} ({how})" if self.gpus else "no GPU"


@dataclass(frozen=True)
class Row:
    """One line of the table. None: not known."""

    room: str
    disk_bytes: int | None
    host_memory_bytes: int | None
    time: str
    command: str


# --- core ---


def chosen(environment: Mapping[str, str]) -> Choice:
    """The choice as the Makefile exports it: CHOSEN, one setting per line, and REFUSED_NAMES."""
    lines = [line.strip().partition("=") for line in environment.get("CHOSEN", "").splitlines()]
    return Choice({name: value for name, _, value in lines if name}, environment.get("REFUSED_NAMES", "").split())


def refuse(choice: Choice) -> None:
    """A Problem for the first setting that make cannot take. A plan needs neither weights nor interpreter."""
    names = [name for name in choice.refused if name not in ("WEIGHTS", "PYTHON")]
    if names:
        presets = sorted(path.stem for path in (ROOT / "models").glob("*.mk"))
        values = {**{setting.name: setting.default for setting in settings.TABLE}, **choice.settings}
        raise settings.problem(names, values, presets, contracts.versions(), os.environ.get("BAKE_GOAL") or "plan")


def described(found: Sequence[gpus.Gpu]) -> str:
    """'4x V100-SXM2-16GB'; several kinds with a comma."""
    names = [gpu.name for gpu in found]
    return ", ".join(f"{names.count(name)}x {name}" for name in dict.fromkeys(names))


def toolchain_for(gpu: gpus.Gpu) -> str | None:
    """The newest TensorRT-LLM with kernels for a GPU, which is the default of TOOLCHAIN."""
    return toolchain.newest_for(gpu.compute_capability, toolchain.rows())


def model_of(choice: Choice) -> Model:
    """The model from its folder; for a GGUF file from the room config; else a preset from models/shapes.json."""
    name, folder = choice["MODEL"], choice.weights
    asked = choice.number("CONTEXT")
    check_folder(folder)
    if files.in_metas_form({path.name for path in folder.iterdir()} if folder.is_dir() else ()):
        params = read_params(folder / files.PARAMS)
        shape = params.shape(params.vocab_size or tokens_of(sentencepiece.path_of(folder)))
        context = max_positions(asked, params)[0]
        rope = rope_kind(params.rope_scaling or {})
        return Model(name, shape, dtype_of(folder, shape), context, "meta", files.weights_bytes(folder), rope)
    if (folder / "config.json").is_file():
        return model_of_config(choice, folder / "config.json", "hf")
    ggufs = files.weights_among((path.name for path in folder.iterdir()), ".gguf") if folder.is_dir() else []
    if ggufs and choice["CONFIG"] and is_room(Path(choice["CONFIG"])):
        return model_of_config(choice, Path(choice["CONFIG"]) / "config.json", "gguf")
    shapes = json.loads(SHAPES.read_text())
    if name not in shapes:
        if ggufs:
            raise reports.planning.shape_in_gguf(folder, ggufs, files.weights_bytes(folder), config_command(choice))
        if folder.is_dir():
            raise no_model(folder)
        raise reports.settings.weights_not_there("MODEL" if "/" in name else "WEIGHTS", choice["WEIGHTS"])
    params = params_of(shapes[name], SHAPES)
    return Model(
        name,
        params.shape(params.vocab_size or 0),
        "float16",
        max_positions(asked, params)[0],
        "table",
        files.weights_bytes(folder) or None,
        rope_kind(params.rope_scaling or {}),
    )


def model_of_config(choice: Choice, path: Path, form: str) -> Model:
    """The model that a config.json describes: the folder's own, or that of the room config, which reads the others."""
    folder, config = choice.weights, read_json(path)
    shape = shape_of_config(config, path)
    dtype = config.get("torch_dtype") or config.get("dtype")
    # 2048: transformers' default (LlamaConfig)
    context = choice.number("CONTEXT") or config.get("max_position_embeddings") or 2048
    return Model(
        choice["MODEL"],
        shape,
        dtype if dtype in memory_model.ITEM_BYTES else dtype_of(folder, shape),
        int(context),
        form,
        files.weights_bytes(folder),
        rope_kind(rope_of(config)),
    )


def config_command(choice: Choice) -> str:
    """The command that makes the room config. If GPUs are only assumed, without the settings that need them: the room
    depends on the model alone."""
    left_out = [name for name in settings.NAMES if name not in ("MODEL", "WEIGHTS", "CONTEXT", "PYTHON")]
    return reports.make("config", **dict.fromkeys(left_out if choice["ASSUME_GPU"] else ()))


def no_model(folder: Path) -> reports.Problem:
    """A folder without a model, in the words of the command that was typed."""
    names = sorted(path.name for path in folder.iterdir())
    return reports.weights.weights_unknown_form(folder, names, os.environ.get("BAKE_GOAL") or "plan")


def tokens_of(path: Path) -> int:
    """How many tokens a tokenizer.model of either kind has."""
    if byte_bpe.is_tiktoken(path):
        return byte_bpe.read_tiktoken(path, since_3_1=True).vocab_size
    return sentencepiece.read_tokenizer_model(path).vocab_size


def dtype_of(folder: Path, shape: LlamaShape) -> str:
    """The type, judged by the size of the files: four bytes per number, or two. (With two,
    Meta's Llama 2 is float16.)"""
    return "float32" if files.weights_bytes(folder) > 3 * memory_model.parameters(shape) else "float16"


def engine_of(choice: Choice, model: Model) -> memory_model.Engine:
    """The engines that are wanted; a Problem for an impossible split or limit."""
    tp_size, pp_size = choice.number("TP") or 1, choice.number("PP") or 1
    pad_heads = choice["PAD_HEADS"] == "on"
    impossible = why_impossible(model.shape, tp_size, pad_heads)
    if impossible:
        by_padding = why_impossible(model.shape, tp_size, pad_heads=True) is None
        raise reports.checkpoint.split_impossible(
            model.name, tp_size, *impossible, possible_tp_sizes(model.shape), by_padding
        )
    if model.shape.n_layers % pp_size:
        raise reports.checkpoint.stages_impossible(model.name, pp_size, model.shape.n_layers)
    quant, dtype = choice["QUANT"], choice["DTYPE"] or model.dtype
    if quant and (quant not in settings.QUANTS or not choice.tensorrt):
        allowed = "empty, " + ", ".join(settings.QUANTS) + " with ENGINE=tensorrt"
        raise reports.settings.bad_setting("QUANT", quant, allowed, reports.make("plan", QUANT=""))
    if quant and dtype == "float32":
        allowed = f"float16 or bfloat16 with QUANT={quant}"
        raise reports.settings.bad_setting("DTYPE", dtype, allowed, reports.make("plan", DTYPE="float16"))
    asked = build_engines.Settings(
        checkpoint=Path(),
        output=Path(),
        engine=choice["ENGINE"],
        trtllm_version=choice["TOOLCHAIN"],
        max_batch_size=choice.number("MAX_BATCH_SIZE") or 1,
        max_input_len=choice.number("MAX_INPUT_LEN"),
        max_seq_len=choice.number("MAX_SEQ_LEN"),
        max_num_tokens=choice.number("MAX_NUM_TOKENS"),
    )
    limits = build_engines.limits(asked, model.context)
    shape = model.shape
    if pad_heads:
        n_heads, n_kv_heads = padded_heads(shape, tp_size)
        shape = dataclasses.replace(shape, n_heads=n_heads, n_kv_heads=n_kv_heads, head_dim=shape.head_size)
    return memory_model.Engine(shape, dtype, tp_size, pp_size=pp_size, quant=quant, **limits)


def planning(problem: reports.Problem, choice: Choice) -> reports.Problem:
    """The same problem, with a command for a user who is planning."""
    assumed = f" ASSUME_GPU={shlex.quote(choice['ASSUME_GPU'])}" if choice["ASSUME_GPU"] else ""
    problem.command = re.sub(r"^make \w+", "make plan", problem.command) + assumed
    return problem


def journey_of(choice: Choice, model: Model, host: Sequence[gpus.Gpu]) -> Journey:
    """The result of a choice on these GPUs; a Problem if it cannot work. Without a GPU,
    only checks that need none run."""
    engine, toolchain = engine_of(choice, model), choice["TOOLCHAIN"]
    toolchains = {version: contracts.toolchain(version) for version in contracts.versions()}
    if not toolchain and choice.tensorrt and host:
        toolchain = toolchain_for(host[0]) or contracts.versions()[-1]
    if choice["TOOLCHAIN"] and choice.tensorrt:
        problem = quants.no_quantizer(engine.quant, toolchain, toolchains)
        if problem:
            raise planning(problem, choice)
    if toolchain:
        abilities.check(
            model.name, model.shape, model.rope, toolchain, choice["ENGINE"], engine.tp_size, engine.quant, "plan"
        )
    if not host:
        return Journey(choice, model, engine, toolchain, host, None)
    if choice.tensorrt:
        problem = trtllm_build.refusal(host[0], engine.dtype, quants.algo_of(engine.quant), toolchain, toolchains)
        if not problem and choice["KV_REUSE"] == "on":
            problem = trtllm_build.no_kv_reuse(host[0])
        if problem:
            raise planning(problem, choice)
    if engine.world_size > len(host):
        raise too_many_ranks(engine, host)
    fit = fit_on(choice, engine, host)
    if fit.verdict == "no":
        raise reports.planning.does_not_fit(model.name, described(host), shares(fit), *mended(choice, engine, host))
    return Journey(choice, model, engine, toolchain, host, fit)


def fit_on(choice: Choice, engine: memory_model.Engine, host: Sequence[gpus.Gpu]) -> memory_model.Fit:
    """The memory of the fullest rank on the smallest of the GPUs in use."""
    smallest = min(gpu.memory_bytes for gpu in host[: engine.world_size])
    if choice.tensorrt:
        return memory_model.fit(engine, smallest, trtllm_build.TOKENS_PER_BLOCK)
    return memory_model.torch_fit(engine, smallest)


def too_many_ranks(engine: memory_model.Engine, host: Sequence[gpus.Gpu]) -> reports.Problem:
    sizes = possible_tp_sizes(engine.shape)
    tp_size = max((size for size in sizes if size * engine.pp_size <= len(host)), default=1)
    change = {"TP": tp_size} if tp_size * engine.pp_size <= len(host) else {"TP": tp_size, "PP": 1}
    return reports.planning.too_many_ranks(
        engine.tp_size, engine.pp_size, len(host), described(host), reports.make("plan", **change)
    )


def mended(choice: Choice, engine: memory_model.Engine, host: Sequence[gpus.Gpu]) -> tuple[str, str]:
    """(advice, command) for engines that do not fit: the first that helps of more ranks, shorter texts, fewer bytes per
    weight, other GPUs."""

    def fits(on: Sequence[gpus.Gpu], **changed: Any) -> bool:
        other = dataclasses.replace(engine, **changed)
        return other.world_size <= len(on) and fit_on(choice, other, on).verdict == "fits"

    for tp_size in possible_tp_sizes(engine.shape):
        if tp_size > engine.tp_size and fits(host, tp_size=tp_size):
            return "Share it among more of the GPUs:", reports.make("plan", TP=tp_size)
    for part in (2, 4, 8):
        tokens = engine.max_seq_len // part
        limits = {"max_seq_len": tokens, "max_input_len": tokens // 2, "max_num_tokens": max(tokens, 1024)}
        if tokens >= 512 and fits(host, **limits):
            shorter = {name.upper(): value for name, value in limits.items()}
            return "Ask for shorter texts and smaller steps:", reports.make("plan", **shorter)
    for quant, kind in quants.TABLE.items() if choice.tensorrt and not engine.quant else ():
        needed = next((least for word, (least, _) in trtllm_build.NEEDS.items() if kind.algo.startswith(word)), 0.0)
        if host[0].capability >= needed and fits(host, quant=quant):
            return "Store its weights in fewer bytes:", reports.make("plan", QUANT=quant)
    sizes = [size for size in (1, 2, 4, 8) if size in possible_tp_sizes(engine.shape)]
    others = {
        f"{size}x {name}": gpus.assumed(f"{size}x {name}")
        for size in sizes
        for name in json.loads(gpus.TABLE.read_text())
    }
    enough = [
        (sum(gpu.memory_bytes for gpu in found), name)
        for name, found in others.items()
        if found[0].capability >= 8.0 and fits(found, tp_size=len(found), pp_size=1, quant="")
    ]
    if not enough:
        return "None of the GPUs known here is large enough. See a smaller model:", reports.make(
            "plan", MODEL="llama-2-7b"
        )
    least = min(enough)[1]
    changes = {"TP": least.partition("x")[0], "PP": None, "QUANT": None, "TOOLCHAIN": None, "ASSUME_GPU": least}
    return "It needs more memory. The smallest known GPUs that have it:", reports.make("plan", **changes)


def shares(fit: memory_model.Fit) -> str:
    """What a rank takes of its GPU, as indented lines."""

    def between(pair: tuple[int, int]) -> str:
        return (
            human_gpu_bytes(pair[0])
            if pair[0] == pair[1]
            else f"{human_gpu_bytes(pair[0])} to {human_gpu_bytes(pair[1])}"
        )

    least, most = fit.kv_tokens
    tokens = f"{least}" if least == most else f"{least} to {most}"
    per_token = f"{fit.kv_bytes_per_token} bytes per token, {fit.kv_fraction:.0%} of what is left"
    lines = [
        ("GPU memory", human_gpu_bytes(fit.gpu_bytes), ""),
        ("weights", human_gpu_bytes(fit.weights_bytes), "the embedding whole, the rest shared among the ranks"),
        ("activations", between(fit.activation_bytes), "one step of MAX_NUM_TOKENS"),
        ("CUDA, NCCL", between(fit.other_bytes), "and buffers for sampling; NCCL's share is assumed"),
        ("KV cache", f"{tokens} tokens", f"{per_token}; must hold {fit.needed_tokens}"),
    ]
    return "\n".join(f"    {name:<12} {value:<24} {why}".rstrip() for name, value, why in lines)


def rows(journey: Journey) -> list[Row]:
    """The table: what each room takes. A time is left out if it was never measured for such a model."""
    engine, model, choice = journey.engine, journey.model, journey.choice
    hf_bytes = memory_model.parameters(model.shape) * memory_model.ITEM_BYTES[model.dtype]
    rank_bytes, all_bytes = max(memory_model.stage_bytes(engine)), memory_model.checkpoint_bytes(engine)
    copying = "up to 2x a copy"  # make bench-convert shows it
    # NVIDIA's tools for QUANT hold the whole model and the rank that they write (read from the code of 0.8.0)
    checkpoint_memory = hf_bytes + rank_bytes if engine.quant else memory_model.CONVERSION_BYTES
    build_bytes: int | None = None
    if choice.tensorrt:
        build_bytes = trtllm_build.BUILDER_COPIES * rank_bytes + trtllm_build.BUILDER_BYTES
    # with GPUs, Hugging Face's model lies in the stored type on them and on the host; on a CPU it is in float32
    asked_bytes = hf_bytes if journey.gpus else 4 * memory_model.parameters(model.shape)
    yours = f"# {'yours' if model.stored_bytes else 'not here yet'}: {choice['WEIGHTS']}"
    made = [
        Row("weights", model.stored_bytes or hf_bytes, None, "", yours),
        Row("config", CONFIG_BYTES, None, "seconds", ""),
        Row("hf", 0 if model.form == "hf" else hf_bytes, memory_model.CONVERSION_BYTES, copying, ""),
        Row("checkpoint", all_bytes, checkpoint_memory, "not known" if engine.quant else copying, ""),
        Row("engines", all_bytes if choice.tensorrt else 0, build_bytes, "not known" if choice.tensorrt else "seconds", ""),
        Row("verified", VERIFIED_BYTES, asked_bytes, "not known", ""),
        Row("model_repo", MODEL_REPO_BYTES, None, "seconds", ""),
        Row("serve", None, serve_bytes(journey), "not known", ""),
    ]  # fmt: skip
    if choice.tensorrt and journey.toolchain:
        row = contracts.toolchain(journey.toolchain)
        size = row.get("image_gb")
        image = Row(
            "toolchain",
            int(size * 1e9) if size else None,
            None,
            "a download",
            f"docker pull {row.get('image', '')}",
        )
        made.insert(0, image)
    return [row if row.command else dataclasses.replace(row, command=reports.make(row.room)) for row in made]


def serve_bytes(journey: Journey) -> int:
    """Host memory of the servers; docker/chart asks for it too (scripts/chart.py)."""
    on_gpus = journey.choice.tensorrt or bool(journey.gpus)
    return memory_model.serve_bytes(journey.engine, on_gpus) + memory_model.program_bytes(
        journey.engine.world_size, on_gpus
    )


def programs(journey: Journey) -> dict[str, list[str]]:
    """The command lines of NVIDIA's programs that the rooms will run in the container."""
    if not journey.choice.tensorrt or not journey.gpus:
        return {}
    engine = journey.engine
    if journey.choice["ASSUME_GPU"]:
        links = gpus.assumed_links(list(journey.gpus[: engine.world_size]))
    else:
        links = gpus.links_here(engine.world_size)
    flags = contracts.flags("trtllm-build", journey.toolchain)
    checkpoint = {
        "dtype": engine.dtype,
        "mapping": {"tp_size": engine.tp_size, "pp_size": engine.pp_size},
        "quantization": {"quant_algo": quants.algo_of(engine.quant)},
    }
    limits = {name: getattr(engine, name) for name in LIMITS}
    timing_cache = build_engines.TIMING_CACHE if "--output_timing_cache" in flags else None
    intent = build_engines.intent_of(checkpoint, limits, list(journey.gpus), links, 1, timing_cache)
    open_mpi = int(contracts.toolchain(journey.toolchain)["open_mpi"].partition(".")[0])
    tools = toolbox.Toolbox(Path("/opt/tritonserver/bin/tritonserver"), None, [], open_mpi)
    http_port, grpc_port, metrics_port = (
        journey.choice.number(name) or settings.PORTS[name] for name in ("HTTP_PORT", "GRPC_PORT", "METRICS_PORT")
    )
    where = launch.Settings(Path(), journey.choice["HOST"] or "127.0.0.1", http_port, grpc_port, metrics_port)
    return {
        "engines": trtllm_build.argv(intent, flags, "checkpoint", "engines"),
        "serve": launch.mpirun_command(engine.world_size, tools, where),
    }


def words(journey: Journey) -> str:
    """The plan as a page."""
    engine, choice = journey.engine, journey.choice
    kind = f"TensorRT-LLM {journey.toolchain or '(the GPU will decide)'}" if choice.tensorrt else "the torch engine"
    split = f"TP {engine.tp_size}" + (f", PP {engine.pp_size}" if engine.pp_size > 1 else "")
    quant = f" {engine.quant}" if engine.quant else ""
    unary = ", no streaming" if choice["STREAMING"] == "off" else ""
    lines = [f"{journey.model.name} by {kind} in {engine.dtype}{quant}, {split}{unary}, on {journey.seen}", ""]
    lines.append(f"{'room':<11} {'disk':>9} {'host memory':>12}  {'time':<16} command")
    for row in rows(journey):
        disk, memory = (_bytes(value) for value in (row.disk_bytes, row.host_memory_bytes))
        lines.append(f"{row.room:<11} {disk:>9} {memory:>12}  {row.time:<16} {row.command}".rstrip())
    lines += [
        "",
        "-: not known, or very little. host memory: the peak; for engines, of one building process, and there is one "
        "per GPU.",
    ]
    if journey.fit:
        lines += ["", f"A rank takes of its GPU ({engine.world_size} ranks):", "", shares(journey.fit), ""]
        lines += verdict(journey, journey.fit)
    elif choice.tensorrt:
        lines += [
            "",
            f"The fullest rank's weights: {human_gpu_bytes(max(memory_model.stage_bytes(engine)))}. On which GPUs? "
            "For instance:",
            "",
        ]
        lines += ["    " + reports.make("plan", ASSUME_GPU="2x A100-80GB")]
    for room, argv in programs(journey).items():
        lines += ["", f"What {room} runs in the container:", ""]
        lines += textwrap.wrap(
            shlex.join(argv),
            WIDTH,
            initial_indent="    ",
            subsequent_indent="        ",
            break_long_words=False,
            break_on_hyphens=False,
        )
    return "\n".join(lines)


def verdict(journey: Journey, fit: memory_model.Fit) -> list[str]:
    """What the numbers mean: a sentence or two, and a command if one helps."""
    least, most = fit.kv_tokens
    if fit.verdict == "tight":
        said = (
            f"Tight: TensorRT decides how much activations take. At worst the KV cache holds {least} tokens and it "
            f"will not start, at best {most}."
        )
        advice, command = mended(journey.choice, journey.engine, journey.gpus)
        return [*textwrap.wrap(said, WIDTH), "", advice, "", "    " + command]
    said = f"Fits: {fit.batch} requests of MAX_SEQ_LEN {fit.max_seq_len} at once for sure"
    more = fit.max_batch_size > fit.batch
    return [
        f"{said}; MAX_BATCH_SIZE {fit.max_batch_size} only with shorter ones." if more else f"{said} (MAX_BATCH_SIZE)."
    ]


def as_json(journey: Journey) -> dict[str, Any]:
    """The plan for scripts."""
    return {
        "model": journey.model.name,
        "parameters": memory_model.parameters(journey.model.shape),
        "engine": journey.choice["ENGINE"],
        "toolchain": journey.toolchain,
        "streaming": journey.choice["STREAMING"] != "off",
        "gpus": [dataclasses.asdict(gpu) for gpu in journey.gpus],
        "assumed": bool(journey.choice["ASSUME_GPU"]),
        "asked": {**vars(journey.engine), "shape": vars(journey.engine.shape)},
        "rooms": [dataclasses.asdict(row) for row in rows(journey)],
        "fit": journey.fit.numbers() if journey.fit else None,
        "programs": programs(journey),
    }


def _bytes(value: int | None) -> str:
    return "-" if not value else human_bytes(value)


# --- shell ---


def gpus_of(choice: Choice) -> list[gpus.Gpu]:
    """The GPUs that ASSUME_GPU names, else those of this machine;
    none for the torch engine when torch's CPU wheel is installed."""
    if choice["ASSUME_GPU"]:
        return gpus.assumed(choice["ASSUME_GPU"])
    if not choice.tensorrt and cpu_torch():
        return []
    return gpus.here()


def cpu_torch() -> bool:
    try:
        return importlib.metadata.version("torch").endswith("+cpu")
    except importlib.metadata.PackageNotFoundError:
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    as_one_object = parser.parse_args().json
    choice = chosen(os.environ)
    refuse(choice)
    journey = journey_of(choice, model_of(choice), gpus_of(choice))
    print(json.dumps(as_json(journey), ensure_ascii=False) if as_one_object else words(journey))


if __name__ == "__main__":
    reports.run(main)
