"""Fills the room checkpoint: a TensorRT-LLM checkpoint, one file of weights per rank,
directly from the weights in any form.

Room:   checkpoint
Reads:  config: config.json; and the weights' folder (Meta's, Hugging Face's, a GGUF file). Or the room hf, which has
both
Writes: config.json, rank0.safetensors ... rankN-1.safetensors
Needs:  numpy; for a GGUF file the package gguf
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scripts import reports
from scripts.nvidia import abilities, contracts
from scripts.room import filling, human_bytes, progress, say
from scripts.settings import QUANTS
from scripts.weights import safetensors
from scripts.weights.cast import cast, infinite
from scripts.weights.forms import Weights, open_weights, watched
from scripts.weights.hugging_face import HfConfig, read_hf_config, read_hf_model
from scripts.weights.safetensors import DTYPES, ITEM_BYTES, Raw
from scripts.weights.shape import padded_heads, possible_tp_sizes, why_impossible
from scripts.weights.split import RankTensor, _rows_of, _zeros, rank_tensors


@dataclass(frozen=True)
class Settings:
    """The room's settings: tp_size * pp_size ranks. dtype None: the source's own.

    model: a room with config.json and tokenizer, config or hf; weights: the folder of the weights, None if the room has
    them.
    pad_heads: add heads of zeros if tp_size ranks cannot share the heads. engine: what will load it, torch or tensorrt.
    """

    model: Path
    output: Path
    tp_size: int
    trtllm_version: str
    dtype: str | None = None
    pp_size: int = 1
    weights: Path | None = None
    pad_heads: bool = False
    engine: str = "torch"

    def __post_init__(self) -> None:
        if not 1 <= self.tp_size <= 1024:
            raise reports.settings.bad_setting(
                "TP", self.tp_size, "a number of ranks from 1 on", reports.make("checkpoint", TP=2)
            )
        if not 1 <= self.pp_size <= 1024:
            raise reports.settings.bad_setting(
                "PP", self.pp_size, "a number of stages from 1 on", reports.make("checkpoint", PP=1)
            )
        if self.dtype is not None and self.dtype not in DTYPES:
            known = ", ".join(DTYPES)
            raise reports.settings.bad_setting("DTYPE", self.dtype, known, reports.make("checkpoint", DTYPE="float16"))


def checkpoint_config(
    golden: Mapping[str, Any], model: HfConfig, dtype: str, tp_size: int, pp_size: int = 1
) -> dict[str, Any]:
    """config.json: the keys of the chosen version's golden file in their order, with this model's values."""
    shape = model.shape
    n_heads, n_kv_heads = padded_heads(shape, tp_size)
    ours = {
        "architecture": "LlamaForCausalLM",
        "dtype": dtype,
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.n_layers,
        "num_attention_heads": n_heads,
        "num_key_value_heads": n_kv_heads,
        "intermediate_size": shape.intermediate_size,
        "max_position_embeddings": model.max_position_embeddings,
        "norm_epsilon": model.norm_eps,
        "rotary_base": model.rope_theta,
        "rotary_scaling": model.rope_scaling,
        "head_size": shape.head_size,
        "rotary_embedding_dim": shape.head_size,
    }
    config = {key: ours.get(key, value) for key, value in golden.items()}
    ranks = {"world_size": tp_size * pp_size, "tp_size": tp_size, "pp_size": pp_size, "moe_tp_size": tp_size}
    # No golden file is from a model with biases; 0.8.0's file lacks the keys,
    # but 0.8.0 reads them (nvidia/abilities.py).
    config.update({"attn_bias": True} if shape.attention_bias else {})
    config.update({"mlp_bias": True} if shape.mlp_bias else {})
    config["mapping"] = {key: ranks.get(key, value) for key, value in golden["mapping"].items()}
    return config


def build_checkpoint(settings: Settings) -> None:
    """Fill the room, all ranks of a stage at once; what an interrupted try brought to the disk is kept."""
    tp_size, pp_size = settings.tp_size, settings.pp_size
    arguments = {
        "tp_size": tp_size,
        "pp_size": pp_size,
        "dtype": settings.dtype,
        "trtllm_version": settings.trtllm_version,
        **({"pad_heads": True} if settings.pad_heads else {}),
    }
    reads = {"hf" if settings.weights is None else "config": settings.model}
    source = settings.model if settings.weights is None else settings.weights
    tools = {"numpy": np.__version__}
    with filling(settings.output, reads, arguments, tools) as room, watched(source, "checkpoint") as unchanged:
        config = read_hf_config(settings.model / "config.json")
        weights = (
            read_hf_model(settings.model, config)
            if settings.weights is None
            else open_weights(settings.weights, config)
        )
        dtype = settings.dtype or weights.dtype
        golden = contracts.table("checkpoint-config", settings.trtllm_version)
        _check_split(settings, config)
        room.write_json("config.json", checkpoint_config(golden, config, dtype, tp_size, pp_size))
        plans = [rank_tensors(config.shape, tp_size, rank, pp_size) for rank in range(tp_size * pp_size)]
        total_bytes = ITEM_BYTES[DTYPES[dtype]] * sum(math.prod(t.shape) for plan in plans for t in plan.values())
        stages = f"PP={pp_size}, " if pp_size > 1 else ""
        came = f"{reports.shown(source)}: {weights.dtype} -> {dtype}"
        say("checkpoint", f"<- {came}, TP={tp_size}, {stages}{human_bytes(total_bytes)}")
        with progress(total_bytes, "checkpoint") as bar:
            for stage in range(pp_size):
                ranks = range(stage * tp_size, (stage + 1) * tp_size)
                names = [f"rank{rank}.safetensors" for rank in ranks]
                if all(name in room.kept for name in names):
                    say(
                        "checkpoint", f"{', '.join(names)} {'was' if len(names) == 1 else 'were'} finished before; kept"
                    )
                    bar.update(sum(room.kept[name].size_bytes for name in names))
                    for name in names:
                        room.add(name, room.kept[name])
                    continue
                reader = _StageReader(weights, [plans[rank] for rank in ranks], DTYPES[dtype])
                safetensors.write_together(room, names, reader.tensors, reader.blocks, advance=bar.update)
                for name in names:  # the proof: the files are as planned
                    written = safetensors.read_header(room.path / name)
                    seen = {tensor: (stored.dtype, stored.shape) for tensor, stored in written.items()}
                    assert seen == reader.tensors, f"{name} is not what was planned"
        unchanged()
        room.facts.update({"dtype": dtype, "tp_size": tp_size, "pp_size": pp_size, "tensors_per_rank": len(plans[0])})


def _check_split(settings: Settings, config: HfConfig) -> None:
    """A Problem for an impossible split, and for a model that the version cannot take."""
    shape, tp_size, version = config.shape, settings.tp_size, settings.trtllm_version
    impossible = why_impossible(shape, tp_size, settings.pad_heads)
    if impossible:
        by_padding = why_impossible(shape, tp_size, pad_heads=True) is None
        raise reports.checkpoint.split_impossible(
            settings.model, tp_size, *impossible, possible_tp_sizes(shape), by_padding
        )
    if shape.n_layers % settings.pp_size:
        raise reports.checkpoint.stages_impossible(settings.model, settings.pp_size, shape.n_layers)
    rope = str((config.rope_scaling or {}).get("type", "default"))
    abilities.check(config.path, shape, rope, version, settings.engine, tp_size)


class _StageReader:
    """Gives the tensors of all ranks of a stage by blocks of rows: cast, and each value checked to be finite.
    Each row is read once."""

    def __init__(self, weights: Weights, plans: Sequence[Mapping[str, RankTensor]], dtype: str) -> None:
        self.weights, self.plans, self.dtype = weights, plans, dtype
        self.tensors = {name: (dtype, tensor.shape) for name, tensor in plans[0].items()}

    def blocks(self, name: str) -> Iterator[Sequence[Raw]]:
        """For each rank the next rows of a tensor, perhaps none.
        All ranks' rectangles have the same sources in the same order."""
        for cuts in zip(*(plan[name].cuts for plan in self.plans)):
            at = 0
            for block in self._cast(cuts[0].source):
                yield [_rows_of(cut, block, at) for cut in cuts]
                at += len(block)
            yield [_zeros(cut, self.tensors[name][1], ITEM_BYTES[self.dtype]) for cut in cuts]

    def _cast(self, source: str) -> Iterator[Raw]:
        stored_dtype = self.weights.tensors[source][0]
        for values in self.weights.blocks(source):
            result = cast(values, stored_dtype, self.dtype)
            if infinite(result, self.dtype):
                _refuse(self.weights, source, self.dtype)
            yield result


def _refuse(weights: Weights, name: str, target: str) -> None:
    """Read the whole tensor again for the report: the source itself is damaged,
    or its values are too large for the target."""
    source, shape = weights.tensors[name]
    total, damaged, too_large, largest = math.prod(shape), 0, 0, 0.0
    for values in weights.blocks(name):
        damaged += infinite(values, source)
        too_large += infinite(cast(values, source, target), target)
        single = cast(values, source, "F32").view(np.float32)
        largest = max(largest, float(np.abs(single).max()))
    path, stored_name = weights.origin(name)
    if damaged:
        raise reports.checkpoint.weights_not_finite(path, stored_name, damaged, total)
    limit = {"F16": 65504.0, "BF16": 3.3895e38, "F32": 3.4028e38}[target]
    raise reports.checkpoint.cast_overflows(
        path,
        stored_name,
        too_large,
        total,
        largest,
        safetensors.DTYPE_NAMES[source],
        safetensors.DTYPE_NAMES[target],
        limit,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, metavar="ROOM", help="config, or hf")
    parser.add_argument("--weights", type=Path, metavar="DIR", help="absent: the weights are in that room")
    parser.add_argument("--tp-size", type=int, required=True, metavar="N")
    parser.add_argument("--pp-size", type=int, default=1, metavar="N")
    parser.add_argument(
        "--dtype", type=lambda text: text or None, metavar="|".join(DTYPES), help="absent or empty: the source's own"
    )
    parser.add_argument("--trtllm-version", required=True, metavar="X.Y.Z")
    parser.add_argument("--engine", default="torch", metavar="torch|tensorrt", help="what will load it")
    parser.add_argument(
        "--pad-heads", choices=("on", "off"), default="off", help="add heads of zeros if TP does not divide the heads"
    )
    parser.add_argument("--quant", default="", metavar="|".join(QUANTS), help="by TensorRT-LLM's own tools")
    parser.add_argument(
        "--examples", type=Path, default=Path(), metavar="FOLDER", help="the folder with TensorRT-LLM's examples"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="ROOM")
    args = vars(parser.parse_args())
    quant, examples = args.pop("quant"), args.pop("examples")
    pad_heads = args.pop("pad_heads") == "on"
    if quant:  # make has refused PAD_HEADS together with QUANT
        args["hf"] = args.pop("model")
        args.pop("weights")
        from scripts.nvidia import quantize  # imported here, because plain checkpoints do not depend on it

        model, version, engine = read_hf_model(args["hf"]), args["trtllm_version"], args.pop("engine")
        rope = str((model.config.rope_scaling or {}).get("type", "default"))
        abilities.check(args["hf"], model.shape, rope, version, engine, args["tp_size"], quant)
        args["dtype"] = args["dtype"] or model.dtype
        quantize.build_quantized(quantize.Settings(**args, quant=quant, examples=examples))
    else:
        build_checkpoint(Settings(**args, pad_heads=pad_heads))


if __name__ == "__main__":
    reports.run(main)
