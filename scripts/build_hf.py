"""Fills the room hf: one Llama model in Hugging Face's form, from Meta's files or from a Hugging Face folder.

Room:   hf
Reads:  params.json, consolidated.NN.pth, tokenizer.model (beside them or one level up); or config.json, *.safetensors, tokenizer.json
Writes: config.json, generation_config.json, model.safetensors (several with an index above 5 GB), tokenizer.json and its side files
Needs:  numpy
"""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Tuple

import numpy as np

from scripts import errors, safetensors_file, tokenizer
from scripts.hf_model import INDEX, SINGLE, read_hf_model
from scripts.llama_shape import LlamaShape, Params, Shape, max_positions, read_json, read_params
from scripts.meta_weights import MetaModel, joined, read_shard, shard_paths
from scripts.room import Filling, filling, human_bytes, progress, say, sha256_of

# transformers' own limit for one file (save_pretrained, max_shard_size)
FILE_MAX_BYTES = 5_000_000_000

# What is taken from a Hugging Face folder besides its weights: data that transformers reads. Never code.
COPIED = (
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
COPIED_MAX_BYTES = 64 << 20


@dataclass(frozen=True)
class Settings:
    """What the room is asked to be."""

    weights: Path
    output: Path
    max_position_embeddings: Optional[int] = None

    def __post_init__(self) -> None:
        if self.max_position_embeddings is not None and self.max_position_embeddings < 1:
            raise errors.bad_setting(
                "CONTEXT", self.max_position_embeddings, "a number of tokens above 0", errors.make("hf", CONTEXT=4096)
            )


# --- core: values in, values out ---------------------------------------------------------------------------------------


def form_of(names: List[str]) -> Optional[str]:
    """Which form the files of a folder have: "meta", "hf", "bin", "both", or None."""
    meta = "params.json" in names or any(name.startswith("consolidated.") and name.endswith(".pth") for name in names)
    if meta:
        return "both" if "config.json" in names else "meta"
    if any(name.endswith(".safetensors") or name == INDEX for name in names):
        return "hf"
    if any(name.startswith("pytorch_model") and name.endswith((".bin", ".bin.index.json")) for name in names):
        return "bin"
    return "hf" if "config.json" in names else None


def hf_config(
    shape: LlamaShape, params: Params, dtype: str, positions: int, bos_id: int, eos_id: int
) -> Dict[str, Any]:
    """config.json, with the keys of transformers 4.36; transformers 5 reads them too (torch_dtype, rope_theta)."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "hidden_act": "silu",
        "hidden_size": shape.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": shape.intermediate_size,
        "max_position_embeddings": positions,
        "model_type": "llama",
        "num_attention_heads": shape.n_heads,
        "num_hidden_layers": shape.n_layers,
        "num_key_value_heads": shape.n_kv_heads,
        "pretraining_tp": 1,
        "rms_norm_eps": params.norm_eps,
        "rope_scaling": None,
        "rope_theta": params.rope_theta,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "use_cache": True,
        "vocab_size": shape.vocab_size,
    }


def file_plan(tensors: Mapping[str, Tuple[str, Shape]], max_bytes: int) -> Dict[str, List[str]]:
    """File name -> its tensors: one file if all fit, else files of at most max_bytes, filled in stored order (one tensor at least)."""
    sizes = {name: math.prod(shape) * safetensors_file.ITEM_BYTES[dtype] for name, (dtype, shape) in tensors.items()}
    groups: List[List[str]] = [[]]
    filled = 0
    for name in safetensors_file.stored_order(tensors):
        if groups[-1] and filled + sizes[name] > max_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += sizes[name]
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{index:05d}-of-{len(groups):05d}.safetensors": group for index, group in enumerate(groups, 1)}


# --- shell --------------------------------------------------------------------------------------------------------------


def build_hf(settings: Settings) -> None:
    """Fill the room; a Problem for whatever is wrong with the source."""
    folder = settings.weights
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    form = form_of(names)
    if form == "both":
        meta = [name for name in names if name == "params.json" or name.endswith(".pth")]
        raise errors.weights_both_forms(
            folder, meta, [name for name in names if name == "config.json" or name.endswith(".safetensors")]
        )
    if form == "bin":
        raise errors.weights_in_bin(folder, [name for name in names if name.endswith(".bin")])
    if form is None:
        raise errors.weights_unknown_form(folder, names)
    (_from_meta if form == "meta" else _from_hf)(settings)


def _from_meta(settings: Settings) -> None:
    folder = settings.weights
    paths = shard_paths(folder)
    params = read_params(folder / "params.json")
    tokenizer_path = tokenizer.path_of(folder)
    pieces = tokenizer.read_tokenizer_model(tokenizer_path)
    if params.vocab_size not in (None, pieces.vocab_size):
        raise errors.vocabulary_differs(tokenizer_path, pieces.vocab_size, params.vocab_size or 0)
    say(
        "hf",
        f"<- {errors.shown(folder)}: Meta's form, {len(paths)} shard(s), "
        f"{human_bytes(sum(path.stat().st_size for path in paths))}",
    )
    shards = [read_shard(path) for path in paths]
    model = joined(folder, shards, params, tokenizer_path, pieces.vocab_size)
    positions, source = max_positions(settings.max_position_embeddings, params)
    arguments = {"form": "meta", "max_position_embeddings": settings.max_position_embeddings}
    with filling(settings.output, arguments=arguments, tools={"numpy": np.__version__}) as room:
        files = _write_weights(room, model)
        room.write_json(
            "config.json", hf_config(model.shape, params, model.dtype, positions, pieces.bos_id, pieces.eos_id)
        )
        room.write_json("generation_config.json", {"bos_token_id": pieces.bos_id, "eos_token_id": pieces.eos_id})
        _write_tokenizer(room, tokenizer_path, pieces)
        read_hf_model(room.path)  # the proof: headers, index and config.json agree
        n_parameters = sum(math.prod(shape) for shape in model.shape.hf_tensors().values())
        room.facts.update({"form": "meta", "shards": len(paths), "dtype": model.dtype, "parameters": n_parameters})
        say(
            "hf",
            f"{n_parameters:,} parameters, {model.dtype}, {len(files)} weight file(s); {positions} positions: {source}",
        )


def _from_hf(settings: Settings) -> None:
    folder = settings.weights
    model = read_hf_model(folder)
    positions = model.max_position_embeddings
    if settings.max_position_embeddings not in (None, positions):
        asked = settings.max_position_embeddings
        raise errors.bad_setting(
            "CONTEXT", asked, f"{positions}, as config.json says", errors.make("hf", CONTEXT=positions)
        )
    total_bytes = sum((folder / name).stat().st_size for name in model.files)
    say(
        "hf",
        f"<- {errors.shown(folder)}: Hugging Face's form, {len(model.files)} weight file(s), {human_bytes(total_bytes)}",
    )
    with filling(settings.output, arguments={"form": "hf"}, tools={"numpy": np.__version__}) as room:
        with progress(total_bytes, "hf") as bar:
            for name in model.files:
                record = sha256_of(folder / name)
                room.link(name, folder / name, record)
                bar.update(record.size_bytes)
        for name in ("config.json", *COPIED, *([INDEX] if len(model.files) > 1 else [])):
            if (folder / name).is_file():
                room.write(name, _small_file(folder / name))
        _copy_tokenizer(room, folder, model.shape.vocab_size)
        read_hf_model(room.path)
        n_parameters = sum(math.prod(tensor.shape) for tensor in model.tensors.values())
        room.facts.update({"form": "hf", "shards": len(model.files), "dtype": model.dtype, "parameters": n_parameters})
        say("hf", f"{n_parameters:,} parameters, {model.dtype}; {positions} positions: config.json")


def _copy_tokenizer(room: Filling, folder: Path, vocab_size: int) -> None:
    """tokenizer.json as it is, or made from tokenizer.model where there is none; a Problem where it has more tokens than the model."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        path = tokenizer.path_of(folder)
        pieces = tokenizer.read_tokenizer_model(path)
        size = pieces.vocab_size
        _write_tokenizer(room, path, pieces)
    else:
        model = read_json(path).get("model")
        vocab = model.get("vocab") if isinstance(model, dict) else None
        if not isinstance(vocab, (dict, list)):
            raise errors.tokenizer_unreadable(path, "it has no model with a vocabulary")
        size = len(vocab)
        room.write("tokenizer.json", _small_file(path))
        if (folder / "tokenizer.model").is_file():
            room.write("tokenizer.model", _small_file(folder / "tokenizer.model"))
    if size > vocab_size:  # fewer is usual: embeddings are often padded
        raise errors.vocabulary_differs(path, size, vocab_size)


def _small_file(path: Path) -> bytes:
    with path.open("rb") as file:
        data = file.read(COPIED_MAX_BYTES + 1)
    if len(data) > COPIED_MAX_BYTES:
        raise errors.weights_unreadable(path, f"it has more than {COPIED_MAX_BYTES} bytes")
    return data


def _write_weights(room: Filling, model: MetaModel) -> List[str]:
    tensors = {name: (safetensors_file.DTYPES[model.dtype], shape) for name, shape in model.shape.hf_tensors().items()}
    plan = file_plan(tensors, FILE_MAX_BYTES)
    total_bytes = sum(math.prod(shape) * safetensors_file.ITEM_BYTES[dtype] for dtype, shape in tensors.values())
    with progress(total_bytes, "hf") as bar:
        for file, names in plan.items():
            part = {name: tensors[name] for name in names}
            # transformers refuses a file whose metadata does not name a framework
            room.add(file, safetensors_file.write(room.path / file, part, model.blocks, {"format": "pt"}, bar.update))
    if len(plan) > 1:
        weight_map = {name: file for file, names in plan.items() for name in names}
        room.write_json(
            INDEX, {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        )
    return list(plan)


def _write_tokenizer(room: Filling, path: Path, pieces: tokenizer.SentencePieceModel) -> None:
    room.write_json("tokenizer.json", tokenizer.tokenizer_json(pieces))
    room.write_json("tokenizer_config.json", tokenizer.tokenizer_config(pieces))
    room.write_json("special_tokens_map.json", tokenizer.special_tokens_map(pieces))
    room.write("tokenizer.model", path.read_bytes())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--max-position-embeddings",
        type=lambda text: int(text) if text else None,
        metavar="N",
        help="absent or empty: as the model says",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="ROOM")
    build_hf(Settings(**vars(parser.parse_args())))


if __name__ == "__main__":
    errors.run(main)
