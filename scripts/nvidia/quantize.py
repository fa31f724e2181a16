"""A quantized checkpoint, made by TensorRT-LLM's own tools: we drive them, check what they wrote and record it.

Room:   checkpoint (instead of scripts/build_checkpoint.py's own split, when QUANT is set)
Reads:  hf
Writes: config.json, rank0.safetensors ... rankN-1.safetensors
Needs:  TensorRT-LLM's container; the examples of its repository at the version's tag, which are in no image; a GPU;
and, to
        measure activations (QUANT other than int8_wo), the network: the tools fetch cnn_dailymail from Hugging Face.

The KV cache stays at 16 bits: FP8 for it gave wrong answers together with paged context attention (TensorRT-LLM #1169).
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Mapping

from scripts import reports, room
from scripts.nvidia import contracts, gpus, quants, trtllm_build
from scripts.nvidia.contracts import Flags, Wish, spell
from scripts.serving import processes
from scripts.weights.hugging_face import read_hf_model


@dataclass(frozen=True)
class Settings:
    """The room's settings. examples: the folder of TensorRT-LLM's repository at the tag of trtllm_version."""

    hf: Path
    output: Path
    quant: str
    dtype: str
    tp_size: int
    pp_size: int
    trtllm_version: str
    examples: Path

    def __post_init__(self) -> None:
        if self.quant not in quants.TABLE:
            allowed = f"empty or one of {', '.join(quants.TABLE)}"
            raise reports.settings.bad_setting("QUANT", self.quant, allowed, reports.make("checkpoint", QUANT=""))
        if self.dtype == "float32":
            allowed = f"float16 or bfloat16 with QUANT={self.quant}"
            raise reports.settings.bad_setting(
                "DTYPE", self.dtype, allowed, reports.make("checkpoint", DTYPE="float16")
            )


# --- core ---


def argv(settings: Settings, flags: Flags, script: str, hf: str, output: str) -> list[str]:
    """The command line of NVIDIA's tool for the version whose flag table is given."""
    asked: dict[str, Wish] = {
        "model_dir": hf,
        "output_dir": output,
        "dtype": settings.dtype,
        "tp_size": settings.tp_size,
        "pp_size": settings.pp_size,
        **quants.TABLE[settings.quant].flags,
    }
    # All of them are needed: a flag that the table lacks is a KeyError, not a silently different checkpoint.
    words = [word for name, wish in asked.items() for word in spell(flags[f"--{name}"], wish)]
    return [sys.executable, script, *words]


def difference(config: Mapping[str, Any], settings: Settings) -> tuple[str, Any, Any] | None:
    """The first difference between the checkpoint's config.json and the settings: (what, asked, written);
    None if there is none."""
    mapping, algo = config["mapping"], str(config["quantization"]["quant_algo"])
    expected = quants.TABLE[settings.quant].algo
    found = (
        ("dtype", settings.dtype, config["dtype"]),
        ("tp_size", settings.tp_size, mapping["tp_size"]),
        ("pp_size", settings.pp_size, mapping["pp_size"]),
        ("quant_algo", expected, expected if algo.startswith(expected) else algo),
    )
    return next((pair for pair in found if pair[1] != pair[2]), None)


# --- shell ---


def toolchains() -> dict[str, dict[str, Any]]:
    """docker/toolchains.json."""
    return {name: contracts.toolchain(name) for name in contracts.versions()}


def check_gpu(settings: Settings) -> None:
    """A Problem unless the engines can run on the GPU that measures: quantizing takes hours."""
    host = gpus.here()
    if not host:
        raise reports.nvidia.no_gpu("TensorRT-LLM's tool for quantizing")
    algo, version = quants.TABLE[settings.quant].algo, settings.trtllm_version
    problem = trtllm_build.refusal(host[0], settings.dtype, algo, version, toolchains())
    if problem:
        raise problem


def build_quantized(settings: Settings) -> None:
    """Fill the room `checkpoint`."""
    row = contracts.toolchain(settings.trtllm_version)
    way = quants.TABLE[settings.quant]
    problem = quants.no_quantizer(settings.quant, settings.trtllm_version, toolchains())
    if problem:
        raise problem
    script = settings.examples / row["examples"][way.tool]
    if not script.is_file():
        raise reports.checkpoint.examples_missing(script, settings.examples, row["trtllm"], row["examples"]["revision"])
    check_gpu(settings)
    flags = contracts.flags(way.tool, settings.trtllm_version)
    world_size = settings.tp_size * settings.pp_size
    question = {
        "quant": settings.quant,
        "dtype": settings.dtype,
        "tp_size": settings.tp_size,
        "pp_size": settings.pp_size,
        "trtllm_version": settings.trtllm_version,
    }
    with room.filling(settings.output, {"hf": settings.hf}, question) as filling:
        shape = read_hf_model(settings.hf).shape
        room.say(
            "checkpoint",
            f"<- {reports.shown(settings.hf)}: {shape.n_layers} layers -> {settings.quant}, {world_size} ranks",
        )
        work = filling.path / "quantizing"
        work.mkdir()
        command = argv(settings, flags, str(script.absolute()), str(settings.hf.absolute()), str(filling.path))
        log = work / "log"
        status, lines = processes.run_logged(command, log, lambda line: None)
        if status != 0:
            raise reports.checkpoint.quantization_failed(log, settings.quant, status, lines[-12:])
        names = ["config.json", *(f"rank{rank}.safetensors" for rank in range(world_size))]
        for name in names:
            if not (filling.path / name).is_file():
                raise reports.checkpoint.checkpoint_not_as_asked(filling.path / name, name, "written", "nothing", log)
        different = difference(json.loads((filling.path / "config.json").read_bytes()), settings)
        if different:
            raise reports.checkpoint.checkpoint_not_as_asked(filling.path / "config.json", *different, log)
        shutil.rmtree(work)
        ours = {*names, *filling.kept, room.FINISHED, room.CHILDREN_USED}
        for extra in sorted({path.name for path in filling.path.iterdir()} - ours):
            (filling.path / extra).unlink()
        for name in names:
            filling.take(name)
        filling.facts.update(
            {**question, "argv": argv(settings, flags, row["examples"][way.tool], "hf", "checkpoint")[1:]}
        )
