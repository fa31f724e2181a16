"""Fills the room hf: one whole Llama model in Hugging Face's form, from Meta's files,
a Hugging Face folder or a GGUF file.

Room:   hf
Reads:  the weights' folder: params.json, consolidated.NN.pth, tokenizer.model (beside them or one level up); or
config.json,
        *.safetensors or *.bin, tokenizer.json; or one *.gguf
Writes: what the room config holds, and model.safetensors (several with an index above 5 GB)
Needs:  numpy; for a GGUF file the package gguf
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from scripts import build_config, reports
from scripts.build_config import Settings
from scripts.room import Filling, filling, progress, say
from scripts.weights import safetensors
from scripts.weights.bounded import bounded
from scripts.weights.files import INDEX, SINGLE
from scripts.weights.forms import Weights, watched
from scripts.weights.hugging_face import read_hf_config, read_hf_model
from scripts.weights.safetensors import Raw
from scripts.weights.shape import HEAD, Shape

# transformers' own limit for one file (save_pretrained, max_shard_size)
FILE_MAX_BYTES = 5_000_000_000


# --- core: values in, values out --------------------------------------------------------------------------------------


def file_plan(tensors: Mapping[str, tuple[str, Shape]], max_bytes: int) -> dict[str, list[str]]:
    """File name -> its tensors: one file if all fit, else files of at most max_bytes,
    filled in stored order (one tensor at least)."""
    sizes = {name: math.prod(shape) * safetensors.ITEM_BYTES[dtype] for name, (dtype, shape) in tensors.items()}
    groups: list[list[str]] = [[]]
    filled = 0
    for name in safetensors.stored_order(tensors):
        if groups[-1] and filled + sizes[name] > max_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += sizes[name]
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{index:05d}-of-{len(groups):05d}.safetensors": group for index, group in enumerate(groups, 1)}


# --- shell ------------------------------------------------------------------------------------------------------------


def build_hf(settings: Settings) -> None:
    """Fill the room; a Problem for whatever is wrong with the source."""
    with watched(settings.weights, "hf") as unchanged:
        described = build_config.describe(settings)
        say("hf", f"<- {reports.shown(settings.weights)}: {described.came}")
        arguments = {"form": described.form, "max_position_embeddings": settings.max_position_embeddings}
        with filling(settings.output, arguments=arguments, tools={"numpy": np.__version__}) as room:
            for name, data in described.files.items():
                room.write(name, data)
            if all(path.suffix == ".safetensors" for path in described.weights.files):
                _link_weights(room, settings.weights, described.weights)
            else:
                _write_weights(room, described.weights)
            read_hf_model(room.path)  # the proof: headers, index and config.json agree
            unchanged()
            room.facts.update(described.facts)
            positions = f"{described.positions} positions: {described.positions_from}"
            say("hf", f"{described.parameters:,} parameters, {described.weights.dtype}; {positions}")


def _link_weights(room: Filling, folder: Path, weights: Weights) -> None:
    """Link the .safetensors files of a Hugging Face folder: no byte is copied, each is read once for its hash."""
    with progress(sum(path.stat().st_size for path in weights.files), "hf") as bar:
        for path in weights.files:
            room.link(path.name, path, safetensors.fingerprint(path, bar.update))
    if (folder / INDEX).is_file():  # also a single file may have a name that only the index says
        room.write(INDEX, (folder / INDEX).read_bytes())


def _write_weights(room: Filling, weights: Weights) -> None:
    tensors = dict(weights.tensors)
    if read_hf_config(room.path / "config.json").tied:
        del tensors[HEAD]
    plan = file_plan(tensors, FILE_MAX_BYTES)
    total_bytes = sum(math.prod(shape) * safetensors.ITEM_BYTES[dtype] for dtype, shape in tensors.values())

    def blocks(name: str) -> Iterator[Sequence[Raw]]:
        return ([block] for block in weights.blocks(name))

    with progress(total_bytes, "hf") as bar:
        for file, names in plan.items():
            if file in room.kept:
                say("hf", f"{file} was finished before; kept")
                bar.update(room.kept[file].size_bytes)
                room.add(file, room.kept[file])
                continue
            part = {name: tensors[name] for name in names}
            # transformers refuses a file whose metadata does not name a framework
            safetensors.write_together(room, [file], part, blocks, {"format": "pt"}, bar.update)
    if len(plan) > 1:
        weight_map = {name: file for file, names in plan.items() for name in names}
        room.write_json(
            INDEX, {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    build_config.add_arguments(parser)
    settings = Settings(**vars(parser.parse_args()))

    def prove() -> None:
        build_config.describe(settings)

    # a bounded child reads the stranger's files first; then the weights may take as long as they need
    if status := bounded(prove, settings.weights):
        sys.exit(status)
    build_hf(settings)


if __name__ == "__main__":
    reports.run(main)
