"""Reads a Llama model in Hugging Face's form: config.json and the headers of its .safetensors files, checked against each other."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Tuple

from scripts import errors
from scripts.llama_shape import EMBEDDING, HEAD, LlamaShape
from scripts.safetensors_file import DTYPE_NAMES, StoredTensor, read_header

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
JSON_MAX_BYTES = 64 << 20


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
        return number(_rope(self.config), "rope_theta", self.folder / "config.json", 10000.0)

    @property
    def rope_scaling(self) -> Optional[Dict[str, Any]]:
        """None, or type and factor, whichever of transformers' spellings config.json has."""
        rope = dict(_rope(self.config))
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


def shape_of_config(config: Mapping[str, Any], path: Path) -> LlamaShape:
    """config.json -> dimensions; a Problem where it is no plain Llama."""
    architectures = config.get("architectures")
    if architectures != ["LlamaForCausalLM"]:
        raise errors.model_unfit(path, f"architectures is {architectures}", "['LlamaForCausalLM']")
    for name, allowed in (
        ("hidden_act", "silu"),
        ("attention_bias", False),
        ("mlp_bias", False),
        ("quantization_config", None),
    ):
        value = config.get(name)
        if value not in (None, allowed):
            shown = value.get("quant_method", "set") if isinstance(value, dict) else value
            raise errors.model_unfit(path, f"{name} is {shown}", str(allowed))
    heads = positive(config, "num_attention_heads", path)
    hidden = positive(config, "hidden_size", path)
    kv_heads = positive(config, "num_key_value_heads", path, heads)
    head_size = positive(config, "head_dim", path, hidden // heads)
    if head_size * heads != hidden or head_size % 2 or heads % kv_heads:
        raise errors.model_unfit(
            path,
            f"hidden_size {hidden}, {heads} heads, {kv_heads} key/value heads, head_dim {head_size}",
            "heads * head_dim = hidden_size, an even head_dim, and key/value heads that divide the heads",
        )
    for name in ("rope_scaling", "rope_parameters"):
        if not isinstance(config.get(name) or {}, dict):
            raise errors.weights_contradict(path, name, "it must be null or an object", f"it is {config[name]!r}")
    kind = _rope(config).get("rope_type", _rope(config).get("type", "default"))
    if kind not in ("default", "linear", "dynamic", "llama3"):
        raise errors.model_unfit(path, f"rope scaling is of the type {kind}", "default, linear, dynamic, llama3")
    return LlamaShape(
        hidden_size=hidden,
        intermediate_size=positive(config, "intermediate_size", path),
        n_layers=positive(config, "num_hidden_layers", path),
        n_heads=heads,
        n_kv_heads=kv_heads,
        vocab_size=positive(config, "vocab_size", path),
    )


def positive(config: Mapping[str, Any], name: str, path: Path, default: Optional[int] = None) -> int:
    """A whole number above 0 from a config file; a Problem for anything else. None and absent give the default."""
    value = config.get(name)
    value = default if value is None else value
    if type(value) is not int or not 0 < value < 1 << 31:
        raise errors.weights_contradict(path, name, "it must be a whole number above 0", f"it is {value!r}")
    return value


def number(config: Mapping[str, Any], name: str, path: Path, default: float) -> float:
    """A finite number above 0 from a config file; a Problem for anything else. None and absent give the default."""
    value = config.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise errors.weights_contradict(path, name, "it must be a number above 0", f"it is {value!r}")
    return float(value)


def read_json(path: Path) -> Dict[str, Any]:
    """A JSON object from a file of the user's; a Problem where there is none."""
    try:
        with path.open("rb") as file:
            value = json.loads(file.read(JSON_MAX_BYTES))
    except FileNotFoundError:
        raise errors.weights_file_missing(
            path.parent, path.name, sorted(p.name for p in path.parent.glob("*"))
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise errors.weights_unreadable(path, f"no JSON ({error})") from None
    if not isinstance(value, dict):
        raise errors.weights_unreadable(path, f"a JSON {type(value).__name__}, not an object")
    return value


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


def _rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Rotary settings: transformers 5 keeps all in rope_parameters, before there were rope_theta and rope_scaling."""
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = {"rope_theta": config["rope_theta"]} if config.get("rope_theta") is not None else {}
    return {**theta, **parameters}
