"""Reads a Llama model in Hugging Face's form: config.json and the headers of its .safetensors files, checked against each other."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Tuple

from scripts import errors
from scripts.llama_shape import EMBEDDING, HEAD, LlamaShape, number, positive, read_json, rope_of, shape_of_config
from scripts.safetensors_file import DTYPE_NAMES, StoredTensor, read_header

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@dataclass(frozen=True)
class HfModel:
    """A folder whose tensors are exactly those that its config.json says. Defaults are those of transformers' LlamaConfig."""

    folder: Path
    config: Mapping[str, Any]
    shape: LlamaShape
    dtype: str  # float16, bfloat16, float32
    tensors: Mapping[str, StoredTensor]  # lm_head.weight included, also where it is the embedding
    files: Tuple[str, ...]  # the weight files, without the index

    @property
    def max_position_embeddings(self) -> int:
        return positive(self.config, "max_position_embeddings", self.folder / "config.json", 2048)

    @property
    def norm_eps(self) -> float:
        return number(self.config, "rms_norm_eps", self.folder / "config.json", 1e-6)

    @property
    def rope_theta(self) -> float:
        return number(rope_of(self.config), "rope_theta", self.folder / "config.json", 10000.0)

    @property
    def rope_scaling(self) -> Optional[Dict[str, Any]]:
        """None, or type and factor, whichever of transformers' spellings config.json has."""
        rope = dict(rope_of(self.config))
        rope.pop("rope_theta", None)
        kind = rope.pop("rope_type", rope.pop("type", "default"))
        rope.pop("type", None)
        return None if kind == "default" else {"type": kind, **rope}


def read_hf_model(folder: Path) -> HfModel:
    """Read and check a folder; opens headers only, never weights. A Problem names the first thing that does not fit."""
    path = folder / "config.json"
    config = read_json(path)
    shape = shape_of_config(config, path)
    files = weight_files(folder)
    found: Dict[str, StoredTensor] = {}
    for name in files:
        part = read_header(folder / name)
        twice = sorted(set(part) & set(found))
        if twice:
            raise errors.weights_unreadable(folder / name, f"{twice[0]} is in it and in {found[twice[0]].path.name}")
        found.update(part)
    # rotary frequencies are computed, not learnt; transformers before 4.32 stored them
    found = {name: tensor for name, tensor in found.items() if not name.endswith("rotary_emb.inv_freq")}
    expected = shape.hf_tensors()
    if config.get("tie_word_embeddings") and EMBEDDING in found:
        found[HEAD] = found[EMBEDDING]
    check_tensors(folder, "config.json", expected, {name: tensor.shape for name, tensor in found.items()})
    return HfModel(folder, config, shape, _dtype_of(config, found, path), found, tuple(files))


def check_tensors(
    where: Path, says: str, expected: Mapping[str, Tuple[int, ...]], found: Mapping[str, Tuple[int, ...]]
) -> None:
    """A Problem for a missing, an unknown or a mis-shaped tensor."""
    missing, unknown = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or unknown:
        raise errors.tensor_names_differ(where, says, missing, unknown, len(expected), len(found))
    for name, shape in expected.items():
        if tuple(found[name]) != tuple(shape):
            raise errors.weights_contradict(
                where, name, f"{says} says {list(shape)}", f"the tensor has {list(found[name])}"
            )


def weight_files(folder: Path) -> List[str]:
    """The .safetensors files of a model, in the index's order; no name leaves the folder."""
    if not (folder / INDEX).is_file():
        if not (folder / SINGLE).is_file():
            raise errors.weights_file_missing(
                folder, f"{SINGLE} or {INDEX}", sorted(p.name for p in folder.glob("*.safetensors"))
            )
        return [SINGLE]
    index = read_json(folder / INDEX)
    weight_map = index.get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(name, str) for name in weight_map.values())
    ):
        raise errors.weights_unreadable(folder / INDEX, "it has no weight_map of names")
    files = sorted(set(weight_map.values()))
    if SINGLE not in files and (folder / SINGLE).is_file():
        raise errors.weights_extra_file(folder, [SINGLE], files[0])
    for name in files:
        if not re.fullmatch(r"[\w.-]+\.safetensors", name):
            raise errors.weights_unreadable(
                folder / INDEX, f"it names {name!r}, which is no .safetensors file of this folder"
            )
        if not (folder / name).is_file():
            raise errors.weights_file_missing(folder, name, sorted(p.name for p in folder.glob("*.safetensors")))
    return files


def _dtype_of(config: Mapping[str, Any], tensors: Mapping[str, StoredTensor], path: Path) -> str:
    """The dtype that all tensors have; where they are mixed, what config.json says (torch_dtype before transformers 5, dtype since)."""
    stored = {tensor.dtype for tensor in tensors.values()}
    if len(stored) == 1:
        return DTYPE_NAMES[stored.pop()]
    named = config.get("torch_dtype", config.get("dtype"))
    if named not in DTYPE_NAMES.values():
        raise errors.model_unfit(
            path,
            f"torch_dtype is {named} and the tensors are mixed ({', '.join(sorted(stored))})",
            ", ".join(DTYPE_NAMES.values()),
        )
    return str(named)
