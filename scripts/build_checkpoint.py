"""Fills the room checkpoint: a TensorRT-LLM checkpoint, one file of weights per rank, from the room hf.

Room:   checkpoint
Reads:  hf: config.json, *.safetensors
Writes: config.json, rank0.safetensors ... rankN-1.safetensors
Needs:  numpy
"""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Iterator, Mapping, Optional, Tuple

import numpy as np

from scripts import contracts, errors, quantize, safetensors_file
from scripts.hf_model import HfModel, read_hf_model
from scripts.llama_shape import EMBEDDING, HEAD, LAST_NORM, LlamaShape, Shape, possible_tp_sizes, why_impossible
from scripts.room import filling, human_bytes, progress, say
from scripts.safetensors_file import DTYPES, ITEM_BYTES, Raw, StoredTensor, row_blocks

# rope scaling of Llama 3.1 is known to TensorRT-LLM from 0.12 on (upstream's release notes)
LLAMA3_ROPE_SINCE = (0, 12)


@dataclass(frozen=True)
class Settings:
    """What the room is asked to be: tp_size * pp_size ranks. dtype None: the source's own."""

    hf: Path
    output: Path
    tp_size: int
    trtllm_version: str
    dtype: Optional[str] = None
    pp_size: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.tp_size <= 1024:
            raise errors.bad_setting("TP", self.tp_size, "a number of ranks from 1 on", errors.make("checkpoint", TP=2))
        if not 1 <= self.pp_size <= 1024:
            raise errors.bad_setting(
                "PP", self.pp_size, "a number of stages from 1 on", errors.make("checkpoint", PP=1)
            )
        if self.dtype is not None and self.dtype not in DTYPES:
            known = ", ".join(DTYPES)
            raise errors.bad_setting("DTYPE", self.dtype, known, errors.make("checkpoint", DTYPE="float16"))


@dataclass(frozen=True)
class Cut:
    """A rectangle of one of Hugging Face's tensors, [first, end) each; columns None: all. source None: rows of zeros."""

    source: Optional[str]
    rows: Tuple[int, int]
    columns: Optional[Tuple[int, int]] = None


@dataclass(frozen=True)
class RankTensor:
    """One tensor of a rank file: its shape, and the rectangles that make it, one below the other."""

    shape: Shape
    cuts: Tuple[Cut, ...]


# --- core: values in, values out ---------------------------------------------------------------------------------------


def rank_tensors(shape: LlamaShape, tp_size: int, rank: int, pp_size: int = 1) -> Dict[str, RankTensor]:
    """Everything that rankN.safetensors holds, by TensorRT-LLM v0.8.0's rules (examples/llama/convert_checkpoint.py).

    - q, k and v: rows; each is cut by itself, then q of this rank, k, v lie below each other.
    - More ranks than key/value heads: each such head is repeated for tp / kv_heads neighbouring ranks.
    - fc is gate_proj and gate is up_proj: the network computes proj(silu(fc x) * gate x).
    - dense and proj: columns. Norms and the embedding: whole on every rank.
    - lm_head: rows, after zero rows up to the next multiple of tp. vocab_size in config.json stays what it was.
    - Pipeline stages: rank = stage * tp_size + its place in the stage. Each takes the same number of layers and counts them from 0;
      the embedding is on the first stage, ln_f and lm_head are on the last (Mapping.pp_layers of tensorrt_llm/mapping.py).
    """
    hidden, head = shape.hidden_size, shape.head_size
    stage, place = divmod(rank, tp_size)
    layers = shape.n_layers // pp_size

    def part(size: int) -> Tuple[int, int]:
        return place * (size // tp_size), (place + 1) * (size // tp_size)

    if tp_size > shape.n_kv_heads:
        kv_head = place // (tp_size // shape.n_kv_heads)
        kv = kv_head * head, (kv_head + 1) * head
    else:
        kv = part(shape.n_kv_heads * head)

    def stack(columns: int, *cuts: Cut) -> RankTensor:
        return RankTensor((sum(cut.rows[1] - cut.rows[0] for cut in cuts), columns), cuts)

    def whole(name: str, *size: int) -> RankTensor:
        return RankTensor(size, (Cut(name, (0, size[0])),))

    def columns(name: str, rows: int, size: int) -> RankTensor:
        return RankTensor((rows, size // tp_size), (Cut(name, (0, rows), part(size)),))

    first, end = part(-(-shape.vocab_size // tp_size) * tp_size)
    inside = min(first, shape.vocab_size), min(end, shape.vocab_size)
    head_cuts = [Cut(HEAD, inside)] if inside[0] < inside[1] else []
    if end > shape.vocab_size:
        head_cuts.append(Cut(None, (0, end - max(first, shape.vocab_size))))
    tensors: Dict[str, RankTensor] = {}
    if stage == pp_size - 1:
        tensors["lm_head.weight"] = stack(hidden, *head_cuts)
        tensors["transformer.ln_f.weight"] = whole(LAST_NORM, hidden)
    if stage == 0:
        tensors["transformer.vocab_embedding.weight"] = whole(EMBEDDING, shape.vocab_size, hidden)
    for index in range(layers):
        hf, ours = f"model.layers.{stage * layers + index}.", f"transformer.layers.{index}."
        attention, mlp = f"{hf}self_attn.", f"{hf}mlp."
        tensors.update(
            {
                f"{ours}attention.qkv.weight": stack(
                    hidden,
                    Cut(f"{attention}q_proj.weight", part(hidden)),
                    Cut(f"{attention}k_proj.weight", kv),
                    Cut(f"{attention}v_proj.weight", kv),
                ),
                f"{ours}attention.dense.weight": columns(f"{attention}o_proj.weight", hidden, hidden),
                f"{ours}mlp.fc.weight": stack(hidden, Cut(f"{mlp}gate_proj.weight", part(shape.intermediate_size))),
                f"{ours}mlp.gate.weight": stack(hidden, Cut(f"{mlp}up_proj.weight", part(shape.intermediate_size))),
                f"{ours}mlp.proj.weight": columns(f"{mlp}down_proj.weight", hidden, shape.intermediate_size),
                f"{ours}input_layernorm.weight": whole(f"{hf}input_layernorm.weight", hidden),
                f"{ours}post_layernorm.weight": whole(f"{hf}post_attention_layernorm.weight", hidden),
            }
        )
    return tensors


def checkpoint_config(
    golden: Mapping[str, Any], model: HfModel, dtype: str, tp_size: int, pp_size: int = 1
) -> Dict[str, Any]:
    """config.json: the keys of the chosen version's golden file in their order, with this model's values."""
    shape = model.shape
    ours = {
        "architecture": "LlamaForCausalLM",
        "dtype": dtype,
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.n_layers,
        "num_attention_heads": shape.n_heads,
        "num_key_value_heads": shape.n_kv_heads,
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
    config["mapping"] = {key: ranks.get(key, value) for key, value in golden["mapping"].items()}
    return config


def cast(values: Raw, source: str, target: str) -> Raw:
    """Raw numbers of one safetensors dtype -> raw numbers of another, rounded to nearest even as torch does; NaN stays NaN.

    Too large a value becomes infinity, as in torch; the caller looks for that (see infinite).
    """
    if source == target:
        return values
    if source == "F16":
        single = values.view(np.float16).astype(np.float32).view(np.uint32)
    elif source == "BF16":
        single = np.left_shift(values, 16, dtype=np.uint32)
    else:
        single = values
    if target == "F32":
        return single
    if target == "F16":
        with np.errstate(over="ignore"):
            return single.view(np.float32).astype(np.float16).view(np.uint16)
    # Round to nearest even: add just under half of the last kept bit, and one more where that bit is set. What came from F16 is exact
    # or rounds the same way.
    return ((single + (0x7FFF + ((single >> 16) & 1))) >> 16).astype(np.uint16)


def infinite(values: Raw, dtype: str) -> int:
    """How many raw numbers are NaN or infinite: all bits of the exponent are set."""
    exponent = {"F16": 0x7C00, "BF16": 0x7F80, "F32": 0x7F800000}[dtype]
    sign = 1 << (8 * ITEM_BYTES[dtype] - 1)
    # The two maxima first: they take no memory, and nearly always they are the answer. Without a sign such a number is the largest of
    # the signed ones, with a sign it is the largest of the unsigned ones.
    if values.view(f"i{values.itemsize}").max(initial=0) < exponent and values.max(initial=0) < sign | exponent:
        return 0
    return int(np.count_nonzero((values & values.dtype.type(sign - 1)) >= exponent))


# --- shell --------------------------------------------------------------------------------------------------------------


def build_checkpoint(settings: Settings) -> None:
    """Fill the room, rank by rank; a rank file that an interrupted try finished is kept."""
    tp_size, pp_size = settings.tp_size, settings.pp_size
    arguments = {
        "tp_size": tp_size,
        "pp_size": pp_size,
        "dtype": settings.dtype,
        "trtllm_version": settings.trtllm_version,
    }
    with filling(settings.output, {"hf": settings.hf}, arguments, {"numpy": np.__version__}) as room:
        model = read_hf_model(settings.hf)
        dtype = settings.dtype or model.dtype
        impossible = why_impossible(model.shape, tp_size)
        if impossible:
            raise errors.split_impossible(settings.hf, tp_size, *impossible, possible_tp_sizes(model.shape))
        if model.shape.n_layers % pp_size:
            raise errors.stages_impossible(settings.hf, pp_size, model.shape.n_layers)
        golden = contracts.table("checkpoint-config", settings.trtllm_version)
        if (model.rope_scaling or {}).get("type") == "llama3" and _version(settings.trtllm_version) < LLAMA3_ROPE_SINCE:
            raise errors.model_unfit(
                settings.hf / "config.json",
                "rope scaling is of the type llama3",
                f"none, linear or dynamic with TensorRT-LLM {settings.trtllm_version}",
            )
        room.write_json("config.json", checkpoint_config(golden, model, dtype, tp_size, pp_size))
        plans = [
            {
                name: (DTYPES[dtype], tensor.shape)
                for name, tensor in rank_tensors(model.shape, tp_size, rank, pp_size).items()
            }
            for rank in range(tp_size * pp_size)
        ]
        total_bytes = sum(math.prod(shape) * ITEM_BYTES[code] for plan in plans for code, shape in plan.values())
        stages = f"PP={pp_size}, " if pp_size > 1 else ""
        say(
            "checkpoint",
            f"<- {errors.shown(settings.hf)}: {model.dtype} -> {dtype}, TP={tp_size}, {stages}{human_bytes(total_bytes)}",
        )
        with progress(total_bytes, "checkpoint") as bar:
            for rank, plan in enumerate(plans):
                name = f"rank{rank}.safetensors"
                if name in room.kept:
                    say("checkpoint", f"{name} was finished before; kept")
                    bar.update(room.kept[name].size_bytes)
                    room.add(name, room.kept[name])
                    continue
                reader = _RankReader(model, rank_tensors(model.shape, tp_size, rank, pp_size), DTYPES[dtype])
                room.add(name, safetensors_file.write(room.path / name, plan, reader.blocks, advance=bar.update))
        for rank, plan in enumerate(plans):  # the proof: what lies there is what was planned
            written = safetensors_file.read_header(room.path / f"rank{rank}.safetensors")
            seen = {name: (tensor.dtype, tensor.shape) for name, tensor in written.items()}
            assert seen == plan, f"rank{rank}.safetensors is not what was planned"
        room.facts.update({"dtype": dtype, "tp_size": tp_size, "pp_size": pp_size, "tensors_per_rank": len(plans[0])})


class _RankReader:
    """Gives the tensors of one rank by blocks of rows, cast, each value checked to be a number."""

    def __init__(self, model: HfModel, plan: Mapping[str, RankTensor], dtype: str) -> None:
        self.tensors, self.plan, self.dtype = model.tensors, plan, dtype

    def blocks(self, name: str) -> Iterator[Raw]:
        tensor = self.plan[name]
        for cut in tensor.cuts:
            if cut.source is None:
                raw = np.uint16 if ITEM_BYTES[self.dtype] == 2 else np.uint32
                yield np.zeros((cut.rows[1] - cut.rows[0], *tensor.shape[1:]), raw)
                continue
            stored = self.tensors[cut.source]
            for first, end in row_blocks(*cut.rows, stored.row_bytes):
                values = stored.rows(first, end)
                if cut.columns is not None:
                    values = values[:, slice(*cut.columns)]
                result = cast(np.ascontiguousarray(values), stored.dtype, self.dtype)
                if infinite(result, self.dtype):
                    _refuse(stored, self.dtype)
                yield result


def _refuse(stored: StoredTensor, target: str) -> None:
    """Look at the whole tensor again and report: the source itself is damaged, or its values are too large for the target."""
    total, damaged, too_large, largest = math.prod(stored.shape), 0, 0, 0.0
    for first, end in row_blocks(0, stored.shape[0], stored.row_bytes):
        values = stored.rows(first, end)
        damaged += infinite(values, stored.dtype)
        too_large += infinite(cast(values, stored.dtype, target), target)
        single = cast(values, stored.dtype, "F32").view(np.float32)
        largest = max(largest, float(np.abs(single).max()))
    if damaged:
        raise errors.weights_not_finite(stored.path, stored.name, damaged, total)
    limit = {"F16": 65504.0, "BF16": 3.3895e38, "F32": 3.4028e38}[target]
    raise errors.cast_overflows(
        stored.path,
        stored.name,
        too_large,
        total,
        largest,
        safetensors_file.DTYPE_NAMES[stored.dtype],
        safetensors_file.DTYPE_NAMES[target],
        limit,
    )


def _version(text: str) -> Tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf", type=Path, required=True, metavar="ROOM")
    parser.add_argument("--tp-size", type=int, required=True, metavar="N")
    parser.add_argument("--pp-size", type=int, default=1, metavar="N")
    parser.add_argument(
        "--dtype", type=lambda text: text or None, metavar="|".join(DTYPES), help="absent or empty: the source's own"
    )
    parser.add_argument("--trtllm-version", required=True, metavar="X.Y.Z")
    parser.add_argument("--quant", default="", metavar="|".join(quantize.WAYS), help="by TensorRT-LLM's own tools")
    parser.add_argument(
        "--examples", type=Path, default=Path(), metavar="FOLDER", help="of TensorRT-LLM, where these are"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="ROOM")
    args = vars(parser.parse_args())
    quant, examples = args.pop("quant"), args.pop("examples")
    if quant:
        args["dtype"] = args["dtype"] or read_hf_model(args["hf"]).dtype
        quantize.build_quantized(quantize.Settings(**args, quant=quant, examples=examples))
    else:
        build_checkpoint(Settings(**args))


if __name__ == "__main__":
    errors.run(main)
