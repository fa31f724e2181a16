"""Fills the room config: a Llama in Hugging Face's form without its weights, that is config.json and the tokenizer.

Room:   config
Reads:  the weights' folder without the weights: Meta's params.json and tokenizer.model, Hugging Face's config.json and
tokenizer,
        or the metadata of a GGUF file; and the headers of the weight files (names, sizes, checksums)
Writes: config.json, generation_config.json, tokenizer.json and its side files
Needs:  numpy; for a GGUF file the package gguf
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from scripts import reports
from scripts.room import filling, human_bytes, is_room, read_manifest, say
from scripts.tokenizer import byte_bpe, hugging_face, proof, sentencepiece
from scripts.tokenizer.hugging_face import json_bytes
from scripts.weights import gguf
from scripts.weights.bounded import bounded
from scripts.weights.folder import check_file
from scripts.weights.forms import Weights, form_of, open_meta
from scripts.weights.hugging_face import read_hf_config, read_hf_model
from scripts.weights.shape import EMBEDDING, HEAD, LlamaShape, max_positions, read_params, shape_of_config


@dataclass(frozen=True)
class Settings:
    """The room's settings. max_position_embeddings None: as the model says."""

    weights: Path
    output: Path
    max_position_embeddings: int | None = None

    def __post_init__(self) -> None:
        if self.max_position_embeddings is not None and self.max_position_embeddings < 1:
            raise reports.settings.bad_setting(
                "CONTEXT",
                self.max_position_embeddings,
                "a number of tokens above 0",
                reports.make("config", CONTEXT=4096),
            )


@dataclass(frozen=True)
class Described:
    """A model without its weights. files: name -> content; positions_from: where the number of positions comes from."""

    form: str
    weights: Weights
    files: Mapping[str, bytes]
    positions: int
    positions_from: str
    # notes for the user about values that differ from what a file says
    notes: tuple[str, ...] = ()

    @property
    def facts(self) -> dict[str, Any]:
        """The facts for the manifest."""
        return {
            "form": self.form,
            "shards": len(self.weights.files),
            "dtype": self.weights.dtype,
            "parameters": self.parameters,
        }

    @property
    def parameters(self) -> int:
        """How many parameters the model has; an output layer that is the embedding counts once."""
        shapes = self.weights.shape.hf_tensors()
        if self.weights.origin(HEAD) == self.weights.origin(EMBEDDING):
            del shapes[HEAD]
        return sum(math.prod(shape) for shape in shapes.values())

    @property
    def came(self) -> str:
        size_bytes = sum(path.stat().st_size for path in self.weights.files)
        return f"{FORMS[self.form]}, {len(self.weights.files)} weight file(s), {human_bytes(size_bytes)}"


FORMS = {"meta": "Meta's form", "hf": "Hugging Face's form", "gguf": "a GGUF file"}


# --- core: values in, values out --------------------------------------------------------------------------------------


def hf_config(
    shape: LlamaShape,
    dtype: str,
    positions: int,
    bos_id: int | None,
    eos_id: int | None,
    norm_eps: float,
    rope_theta: float,
    rope_scaling: Mapping[str, Any] | None = None,
    tied: bool = False,
) -> dict[str, Any]:
    """config.json, with the keys of transformers 4.36; transformers 5 reads them too (torch_dtype, rope_theta)."""
    config = {
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
        "rms_norm_eps": norm_eps,
        "rope_scaling": rope_scaling,
        "rope_theta": rope_theta,
        "tie_word_embeddings": tied,
        "torch_dtype": dtype,
        "use_cache": True,
        "vocab_size": shape.vocab_size,
    }
    return {**config, "head_dim": shape.head_dim} if shape.head_dim else config


# --- shell ------------------------------------------------------------------------------------------------------------


def describe(settings: Settings) -> Described:
    """A model from its folder, without its weights; a Problem for anything wrong with it, also for what only the server
    would notice."""
    read = {"meta": _from_meta, "hf": _from_hf, "gguf": _from_gguf}
    described, sources = read[form_of(settings.weights)](settings)
    vocab_size = described.weights.shape.vocab_size
    proof.open_as_served(described.files, lambda name: sources.get(name) or sources["tokenizer.json"], vocab_size)
    return described


# The result of a form's reader: the model, and for files of the room the user's file that each was made from (default:
# tokenizer.json's).
Read = tuple[Described, Mapping[str, Path]]


def _from_meta(settings: Settings) -> Read:
    folder = settings.weights
    params = read_params(folder / "params.json")
    tokenizer_path = sentencepiece.path_of(folder)
    if tokenizer_path.parent != folder:
        check_file(tokenizer_path, tokenizer_path.parent.resolve())
    tiktoken = byte_bpe.is_tiktoken(tokenizer_path)
    read = (
        partial(byte_bpe.read_tiktoken, since_3_1=params.rope_scaling is not None)
        if tiktoken
        else sentencepiece.read_tokenizer_model
    )
    pieces: byte_bpe.Tiktoken | sentencepiece.SentencePieceModel = read(tokenizer_path)
    if params.vocab_size not in (None, pieces.vocab_size):
        raise reports.weights.vocabulary_differs(tokenizer_path, pieces.vocab_size, params.vocab_size or 0)
    model = open_meta(folder, pieces.vocab_size, tokenizer_path)
    positions, source = max_positions(settings.max_position_embeddings, params)
    config = hf_config(
        model.shape, model.dtype, positions, pieces.bos_id, pieces.eos_id, params.norm_eps, params.rope_theta, params.rope_scaling
    )  # fmt: skip
    files = {"config.json": json_bytes(config)}
    if isinstance(pieces, byte_bpe.Tiktoken):
        files.update(
            {name: json_bytes(value) for name, value in byte_bpe.tiktoken_files(tokenizer_path, pieces).items()}
        )
        files["tokenizer.model"] = tokenizer_path.read_bytes()
    else:
        files["generation_config.json"] = json_bytes({"bos_token_id": pieces.bos_id, "eos_token_id": pieces.eos_id})
        files.update(_sentencepiece_files(tokenizer_path, pieces))
    sources = {"config.json": folder / "params.json", "tokenizer.json": tokenizer_path}
    return Described("meta", model, files, positions, source), sources


def _from_hf(settings: Settings) -> Read:
    folder = settings.weights
    config = read_hf_config(folder / "config.json")
    model = read_hf_model(folder, config)
    _same_positions(settings, config.max_position_embeddings, "config.json")
    tokenizer = hugging_face.read_tokenizer(folder, config.values, model.shape.vocab_size)
    files = {"config.json": hugging_face.small_file(folder / "config.json"), **tokenizer.files}
    described = Described("hf", model, files, config.max_position_embeddings, "config.json", tokenizer.notes)
    there = {name: folder / name for name in files if (folder / name).is_file()}
    return described, {"tokenizer.json": tokenizer.path, **there}


def _from_gguf(settings: Settings) -> Read:
    model = gguf.read_gguf(settings.weights)
    said = model.config
    shape = shape_of_config({**said, "architectures": ["LlamaForCausalLM"]}, model.path)
    weights = model.weights(shape)
    positions = said["max_position_embeddings"]
    _same_positions(settings, positions, model.path.name)
    tokenizer_files = model.tokenizer_files()
    ids = tokenizer_files["generation_config.json"]
    config = hf_config(
        shape, weights.dtype, positions, ids.get("bos_token_id"), model.eos_id, said["rms_norm_eps"], said["rope_theta"],
        said.get("rope_scaling"), said["tie_word_embeddings"],
    )  # fmt: skip
    files = {name: json_bytes(value) for name, value in {"config.json": config, **tokenizer_files}.items()}
    return Described("gguf", weights, files, positions, model.path.name), {"tokenizer.json": model.path}


def _same_positions(settings: Settings, positions: int, says: str) -> None:
    asked = settings.max_position_embeddings
    if asked not in (None, positions):
        raise reports.settings.bad_setting(
            "CONTEXT", asked, f"{positions}, as {says} says", reports.make("config", CONTEXT=positions)
        )


def _sentencepiece_files(path: Path, pieces: sentencepiece.SentencePieceModel) -> dict[str, bytes]:
    return {
        "tokenizer.json": json_bytes(sentencepiece.tokenizer_json(pieces)),
        "tokenizer_config.json": json_bytes(sentencepiece.tokenizer_config(pieces)),
        "special_tokens_map.json": json_bytes(sentencepiece.special_tokens_map(pieces)),
        "tokenizer.model": path.read_bytes(),
    }


def build_config(settings: Settings) -> None:
    """Fill the room."""
    described = describe(settings)
    say("config", f"<- {reports.shown(settings.weights)}: {described.came}")
    arguments = {"form": described.form, "max_position_embeddings": settings.max_position_embeddings}
    with filling(settings.output, arguments=arguments, tools={"numpy": np.__version__}) as room:
        for name, data in described.files.items():
            room.write(name, data)
        read_hf_config(room.path / "config.json")  # the proof: it describes a Llama
        room.facts.update(described.facts)
        if is_room(settings.weights):  # make fetched them, so their hashes are known
            room.facts["weights"] = read_manifest(settings.weights)["files"]
        for note in described.notes:
            say("config", note)
        say(
            "config",
            f"{described.parameters:,} parameters, {described.weights.dtype}; {described.positions} positions: "
            f"{described.positions_from}",
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    settings = Settings(**vars(parser.parse_args()))
    sys.exit(bounded(lambda: build_config(settings), settings.weights))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of both rooms that describe a model, this one and hf."""
    parser.add_argument("--weights", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--max-position-embeddings",
        type=lambda text: int(text) if text else None,
        metavar="N",
        help="absent or empty: as the model says",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="ROOM")


if __name__ == "__main__":
    reports.run(main)
