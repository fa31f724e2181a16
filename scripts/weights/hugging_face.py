"""Reads a Llama model in Hugging Face's form: config.json and the headers of its .safetensors or .bin files,
checked against each other."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator, Mapping

from scripts import reports
from scripts.weights.files import BIN_INDEX, BIN_SINGLE, INDEX, SINGLE
from scripts.weights.safetensors import DTYPE_NAMES, DTYPES, ITEM_BYTES, Raw, StoredTensor, read_header
from scripts.weights.shape import (
    EMBEDDING,
    HEAD,
    QWEN2,
    QWEN2_DEFAULTS,
    LlamaShape,
    Shape,
    number,
    positive,
    read_json,
    rope_of,
    shape_of_config,
)
from scripts.weights.torch_file import read_torch_file

# In a synthetic model: which tensors have whose numbers
REPEATED = "repeated.json"


@dataclass(frozen=True)
class HfConfig:
    """A config.json of Hugging Face's. Defaults are those of transformers' LlamaConfig."""

    path: Path
    values: Mapping[str, Any]
    shape: LlamaShape

    @property
    def max_position_embeddings(self) -> int:
        default = QWEN2_DEFAULTS["max_position_embeddings"] if self.values.get("architectures") == QWEN2 else 2048
        return positive(self.values, "max_position_embeddings", self.path, default)

    @property
    def norm_eps(self) -> float:
        return number(self.values, "rms_norm_eps", self.path, 1e-6)

    @property
    def rope_theta(self) -> float:
        return number(rope_of(self.values), "rope_theta", self.path, 10000.0)

    @property
    def rope_scaling(self) -> dict[str, Any] | None:
        """None, or type and factor, in any of transformers' spellings."""
        rope = dict(rope_of(self.values))
        rope.pop("rope_theta", None)
        rope.pop("partial_rotary_factor", None)  # 1
        kind = rope.pop("rope_type", rope.pop("type", "default"))
        rope.pop("type", None)
        if (
            kind == "yarn"
        ):  # as in transformers' standardize_rope_params: a value beside the settings, else the model's positions
            said = rope.get("original_max_position_embeddings") or self.max_position_embeddings
            rope["original_max_position_embeddings"] = self.values.get("original_max_position_embeddings") or said
        return None if kind == "default" else {"type": kind, **rope}

    @property
    def tied(self) -> bool:
        """Whether the output layer is the embedding."""
        return bool(self.values.get("tie_word_embeddings"))


def read_hf_config(path: Path) -> HfConfig:
    """A config.json; a Problem unless it is a plain Llama's."""
    values = read_json(path)
    return HfConfig(path, values, shape_of_config(values, path))


@dataclass(frozen=True)
class HfModel:
    """A folder whose tensors are exactly those that its config.json says."""

    config: HfConfig
    dtype: str  # float16, bfloat16, float32
    stored: Mapping[str, StoredTensor]  # lm_head.weight included, also where it is the embedding
    files: tuple[Path, ...]  # the weight files, without the index

    @property
    def shape(self) -> LlamaShape:
        return self.config.shape

    @property
    def tensors(self) -> Mapping[str, tuple[str, Shape]]:
        """Hugging Face's tensor name -> its stored type and shape."""
        return {name: (tensor.dtype, tensor.shape) for name, tensor in self.stored.items()}

    def origin(self, hf_name: str) -> tuple[Path, str]:
        """The file that holds a tensor, and the tensor's name there."""
        return self.stored[hf_name].path, self.stored[hf_name].name

    def blocks(self, hf_name: str) -> Iterator[Raw]:
        """The rows of a tensor, in order: arrays of (rows, columns) or (rows,)."""
        return self.stored[hf_name].blocks()


def read_hf_model(folder: Path, config: HfConfig | None = None) -> HfModel:
    """Read and check a folder; opens headers only, never weights. A Problem names the first thing that does not fit.

    config: the folder's config.json, if it was read before.
    """
    config = config or read_hf_config(folder / "config.json")
    found: dict[str, StoredTensor] = {}
    files = [folder / name for name in weight_files(folder)]
    for path in files:
        part = read_header(path) if path.suffix == ".safetensors" else read_bin(path)
        twice = sorted(set(part) & set(found))
        if twice:
            raise reports.weights.weights_unreadable(path, f"{twice[0]} is in it and in {found[twice[0]].path.name}")
        found.update(part)
    # rotary frequencies are computed, not learnt; transformers before 4.32 stored them
    found = {name: tensor for name, tensor in found.items() if not name.endswith("rotary_emb.inv_freq")}
    for name, same in repeated(folder).items():
        if same not in found or name in found:
            raise reports.weights.weights_unreadable(folder / REPEATED, f"{name} cannot have the numbers of {same}")
        found[name] = found[same]
    if config.tied and EMBEDDING in found:
        found[HEAD] = found[EMBEDDING]
    shapes = {name: tensor.shape for name, tensor in found.items()}
    check_tensors(folder, "config.json", config.shape.hf_tensors(), shapes)
    return HfModel(config, _dtype_of(config.values, found, config.path), found, tuple(files))


def repeated(folder: Path) -> dict[str, str]:
    """Tensors of a synthetic model that have another one's numbers:
    name -> that tensor (scripts/synthetic.py writes the file)."""
    path = folder / REPEATED
    if not path.is_file():
        return {}
    try:
        names = json.loads(path.read_bytes())
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise ValueError("it is not an object of names")
    except (ValueError, RecursionError) as error:
        raise reports.weights.weights_unreadable(path, f"{error}") from None
    return dict(names)


def read_bin(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a .bin (torch.save); only its directory is read, and its pickle is not run.
    A Problem if it is anything else."""
    found = read_torch_file(path)
    for name, tensor in found.items():
        if tensor.dtype not in ITEM_BYTES:
            raise reports.weights.model_unfit(path, f"{name} is of the type {tensor.dtype}", ", ".join(DTYPES))
    return {
        name: StoredTensor(path, name, tensor.dtype, tensor.shape, tensor.start, tensor.crc32)
        for name, tensor in found.items()
    }


def check_tensors(
    where: Path, says: str, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]
) -> None:
    """A Problem for a missing, an unknown or a mis-shaped tensor."""
    missing, unknown = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or unknown:
        raise reports.weights.tensor_names_differ(where, says, missing, unknown, len(expected), len(found))
    for name, shape in expected.items():
        if tuple(found[name]) != tuple(shape):
            raise reports.weights.weights_contradict(
                where, name, f"{says} says {list(shape)}", f"the tensor has {list(found[name])}"
            )


def weight_files(folder: Path) -> list[str]:
    """The .safetensors files of a model, or else its .bin files, in order. No name leaves the folder."""
    kind = "*.safetensors"
    index, single = INDEX, SINGLE
    if not any(folder.glob(kind)) and not (folder / INDEX).is_file() and any(folder.glob("pytorch_model*.bin*")):
        kind, index, single = "*.bin", BIN_INDEX, BIN_SINGLE
    here = sorted(path.name for path in folder.glob(kind))
    if not (folder / index).is_file():
        if not (folder / single).is_file():
            raise reports.weights.weights_file_missing(folder, f"{single} or {index}", here)
        return [single]
    weight_map = read_json(folder / index).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(name, str) for name in weight_map.values())
    ):
        raise reports.weights.weights_unreadable(folder / index, "it has no weight_map of names")
    files = sorted(set(weight_map.values()))
    if single not in files and (folder / single).is_file():
        raise reports.weights.weights_extra_file(folder, [single], files[0])
    for name in files:
        if not re.fullmatch(r"[\w.-]+" + re.escape(kind[1:]), name):
            raise reports.weights.weights_unreadable(
                folder / index, f"it names {name!r}, which is not a {kind[1:]} file of this folder"
            )
        if not (folder / name).is_file():
            raise reports.weights.weights_file_missing(folder, name, here)
    return files


def _dtype_of(config: Mapping[str, Any], tensors: Mapping[str, StoredTensor], path: Path) -> str:
    """The dtype of all tensors. If they are mixed,
    the one that config.json names (torch_dtype before transformers 5, dtype since)."""
    stored = {tensor.dtype for tensor in tensors.values()}
    if len(stored) == 1:
        return DTYPE_NAMES[stored.pop()]
    named = config.get("torch_dtype", config.get("dtype"))
    if named not in DTYPE_NAMES.values():
        raise reports.weights.model_unfit(
            path,
            f"torch_dtype is {named} and the tensors are mixed ({', '.join(sorted(stored))})",
            ", ".join(DTYPE_NAMES.values()),
        )
    return str(named)
