"""The dimensions of a Llama model: read from Meta's params.json or Hugging Face's config.json,
and the tensors that follow from them.

Needs nothing but the standard library: `make plan` and `make doctor` run before anything is installed.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Mapping, Tuple

from scripts import reports

Shape = Tuple[int, ...]

# A Mistral without its window is a Llama.
MISTRAL = ["MistralForCausalLM"]
# A Qwen2 (2.5 too) is a Llama with biases on q, k and v.
QWEN2 = ["Qwen2ForCausalLM"]
ARCHITECTURES = (["LlamaForCausalLM"], MISTRAL, QWEN2)
MODEL_TYPES = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "mistral", "Qwen2ForCausalLM": "qwen2"}
# transformers' defaults for what config.json leaves out (configuration_qwen2.py);
# the other models have Llama's defaults
QWEN2_DEFAULTS = {"max_position_embeddings": 32768, "num_key_value_heads": 32}

# The factor of Llama 3.1 and later that stretches positions; params.json does not have it (llama-models, sku_list.py
# and the published config.json of each). By (dim, layers): 3.1 8B, 70B (3.3 too), 405B; 3.2 1B, 3B.
# The other numbers are equal for all.
SCALED_ROPE = {(4096, 32): 8, (8192, 80): 8, (16384, 126): 8, (2048, 16): 32, (3072, 28): 32}
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}

# Llama 3.1 405B has 126
LAYERS_MAX = 1000
# kinds of rope scaling; the torch engine has all of them, for TensorRT-LLM see scripts/nvidia/abilities.py
ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn")

JSON_MAX_BYTES = 64 << 20

EMBEDDING, HEAD, LAST_NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


@dataclass(frozen=True)
class LlamaShape:
    """The numbers that decide every tensor's shape. head_dim: None if it is hidden_size / n_heads, as in Meta's models.

    attention_bias: which layers of attention have a bias: '' none, 'qkv' all but the last (Qwen2), 'all'. mlp_bias:
    whether all three layers of the MLP have one.
    """

    hidden_size: int
    intermediate_size: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int
    head_dim: int | None = None
    attention_bias: str = ""
    mlp_bias: bool = False

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden_size // self.n_heads

    def hf_tensors(self) -> dict[str, Shape]:
        """Hugging Face's tensor names -> shapes; a linear layer's weight is (output, input)."""
        hidden, intermediate = self.hidden_size, self.intermediate_size
        q_size, kv_size = self.n_heads * self.head_size, self.n_kv_heads * self.head_size
        layer = {
            "self_attn.q_proj": (q_size, hidden),
            "self_attn.k_proj": (kv_size, hidden),
            "self_attn.v_proj": (kv_size, hidden),
            "self_attn.o_proj": (hidden, q_size),
            "mlp.gate_proj": (intermediate, hidden),
            "mlp.up_proj": (intermediate, hidden),
            "mlp.down_proj": (hidden, intermediate),
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }
        tensors: dict[str, Shape] = {
            EMBEDDING: (self.vocab_size, hidden),
            LAST_NORM: (hidden,),
            HEAD: (self.vocab_size, hidden),
        }
        for index in range(self.n_layers):
            tensors.update({f"model.layers.{index}.{name}.weight": shape for name, shape in layer.items()})
            tensors.update({f"model.layers.{index}.{name}.bias": layer[name][:1] for name in self.biased})
        return tensors

    @property
    def biased(self) -> list[str]:
        """The linear layers of a layer that have a bias, by Hugging Face's names."""
        attention = {"": "", "qkv": "qkv", "all": "qkvo"}[self.attention_bias]
        mlp = ("gate", "up", "down") if self.mlp_bias else ()
        return [*(f"self_attn.{letter}_proj" for letter in attention), *(f"mlp.{name}_proj" for name in mlp)]


@dataclass(frozen=True)
class Params:
    """params.json. The defaults are those of Meta's ModelArgs (llama/model.py)."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int | None  # None if the file says -1: as many as the tokenizer has
    multiple_of: int
    ffn_dim_multiplier: float | None
    norm_eps: float
    rope_theta: float
    max_seq_len: int | None
    rope_scaling: Mapping[str, Any] | None = None  # in the words of Hugging Face's config.json

    @property
    def intermediate_size(self) -> int:
        """Meta's rule: 2/3 of 4 * dim, times ffn_dim_multiplier,
        up to the next multiple_of (llama/model.py, FeedForward)."""
        size = int(2 * 4 * self.dim / 3)
        if self.ffn_dim_multiplier is not None:
            size = int(self.ffn_dim_multiplier * size)
        return self.multiple_of * -(-size // self.multiple_of)

    def shape(self, vocab_size: int) -> LlamaShape:
        """The same in the names of LlamaShape, with the tokenizer's vocab_size."""
        return LlamaShape(self.dim, self.intermediate_size, self.n_layers, self.n_heads, self.n_kv_heads, vocab_size)


def read_params(path: Path) -> Params:
    """params.json -> Params; a Problem for values that cannot be."""
    return params_of(read_json(path), path)


def params_of(params: Mapping[str, Any], path: Path) -> Params:
    """The content of a params.json -> Params; `path` is where a Problem says it came from."""
    n_heads = positive(params, "n_heads", path)
    kv_heads = positive(params, "n_kv_heads", path, n_heads)
    dim = positive(params, "dim", path)
    if dim % n_heads or dim // n_heads % 2 or n_heads % kv_heads:
        raise reports.weights.weights_contradict(
            path,
            "n_heads",
            "the heads must divide dim into even parts, the key/value heads the heads",
            f"dim is {dim}, n_heads {n_heads}, n_kv_heads {kv_heads}",
        )
    rope_scaling = None
    if params.get("use_scaled_rope"):
        factor = params.get("rope_scaling_factor") or SCALED_ROPE.get((dim, positive(params, "n_layers", path)))
        if not isinstance(factor, (int, float)) or factor <= 0:
            known = ", ".join(f"dim {dim} with {layers} layers" for dim, layers in SCALED_ROPE)
            raise reports.weights.model_unfit(
                path,
                f"use_scaled_rope is true, with dim {dim} and {params.get('n_layers')} layers",
                f"{known}; or a rope_scaling_factor",
            )
        rope_scaling = {"rope_type": "llama3", "factor": float(factor), **LLAMA3_ROPE}
    vocab_size = None if params.get("vocab_size", -1) == -1 else positive(params, "vocab_size", path)
    max_seq_len = None if params.get("max_seq_len") is None else positive(params, "max_seq_len", path)
    multiplier = params.get("ffn_dim_multiplier")
    return Params(
        dim=dim,
        n_layers=positive(params, "n_layers", path),
        n_heads=n_heads,
        n_kv_heads=kv_heads,
        vocab_size=vocab_size,
        multiple_of=positive(params, "multiple_of", path, 256),
        ffn_dim_multiplier=None if multiplier is None else number(params, "ffn_dim_multiplier", path, 1.0),
        norm_eps=number(params, "norm_eps", path, 1e-5),
        rope_theta=number(params, "rope_theta", path, 10000.0),
        max_seq_len=max_seq_len,
        rope_scaling=rope_scaling,
    )


def max_positions(asked: int | None, params: Params) -> tuple[int, str]:
    """(max_position_embeddings, where it comes from).
    Meta's files do not say how long the texts of the training were."""
    if asked is not None:
        return asked, "as asked"
    if params.max_seq_len is not None:
        return params.max_seq_len, "max_seq_len in params.json"
    if params.rope_scaling is not None:
        return 131072, "Llama 3.1 and later (its model card), told by use_scaled_rope"
    if params.rope_theta == 500000.0:
        return 8192, "Llama 3 (its model card), told by rope_theta 500000"
    if params.rope_theta == 1000000.0:
        return 16384, "Code Llama (its paper, section 2.3), told by rope_theta 1000000"
    return 4096, "Llama 2 (its paper, section 2.2)"


def shape_of_config(config: Mapping[str, Any], path: Path) -> LlamaShape:
    """config.json -> dimensions; a Problem if it is not a plain Llama."""
    architectures = config.get("architectures")
    if architectures not in ARCHITECTURES:
        raise reports.weights.model_unfit(
            path, f"architectures is {architectures}", " or ".join(map(str, ARCHITECTURES))
        )
    kind = config.get("model_type")
    if kind not in (None, MODEL_TYPES[architectures[0]]):  # other code computes it, which came with its auto_map
        raise reports.weights.model_unfit(path, f"model_type is {kind!r}", repr(MODEL_TYPES[architectures[0]]))
    defaults = QWEN2_DEFAULTS if architectures == QWEN2 else {}
    positions = positive(config, "max_position_embeddings", path, defaults.get("max_position_embeddings", 2048))
    # by default transformers' Mistral has a window of 4096; its Qwen2 has one only with use_sliding_window
    window = config.get("sliding_window", 4096 if architectures in (MISTRAL, QWEN2) else None)
    if architectures == QWEN2 and not config.get("use_sliding_window"):
        window = None
    if window is not None and not (type(window) is int and window >= positions):
        raise reports.weights.model_unfit(
            path, f"sliding_window is {window!r}", f"null, or at least the {positions} positions of the model"
        )
    for name, allowed in (
        ("hidden_act", "silu"),
        ("quantization_config", None),
    ):
        value = config.get(name)
        if value not in (None, allowed):
            shown = value.get("quant_method", "set") if isinstance(value, dict) else value
            raise reports.weights.model_unfit(path, f"{name} is {shown}", str(allowed))
    heads = positive(config, "num_attention_heads", path)
    hidden = positive(config, "hidden_size", path)
    unsaid = defaults.get("num_key_value_heads", heads) if "num_key_value_heads" not in config else heads
    kv_heads = positive(config, "num_key_value_heads", path, unsaid)
    head_size = positive(config, "head_dim", path, hidden // heads)
    if (config.get("head_dim") is None and hidden % heads) or head_size % 2 or heads % kv_heads:
        raise reports.weights.model_unfit(
            path,
            f"hidden_size {hidden}, {heads} heads, {kv_heads} key/value heads, head_dim {config.get('head_dim')}",
            "an even head_dim (by default hidden_size / heads), and key/value heads that divide the heads",
        )
    for name in ("rope_scaling", "rope_parameters"):
        if not isinstance(config.get(name) or {}, dict):
            raise reports.weights.weights_contradict(
                path, name, "it must be null or an object", f"it is {config[name]!r}"
            )
    kind = rope_kind(rope_of(config))
    if kind not in ROPE_KINDS:
        raise reports.weights.model_unfit(path, f"rope scaling is of the type {kind}", ", ".join(ROPE_KINDS))
    turned = rope_of(config).get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if turned not in (None, 1):
        raise reports.weights.model_unfit(
            path, f"partial_rotary_factor is {turned!r}", "null or 1: whole heads are rotated"
        )
    _check_rope(rope_of(config), kind, path)
    bias = {name: config.get(name) for name in ("attention_bias", "mlp_bias")}
    for name, value in bias.items():
        if value not in (None, False, True):
            raise reports.weights.weights_contradict(path, name, "it must be true or false", f"it is {value!r}")
    if architectures == MISTRAL and any(bias.values()):
        raise reports.weights.model_unfit(
            path, f"a Mistral with {' and '.join(name for name in bias if bias[name])}", "none of it"
        )
    # transformers' Qwen2 has its biases whatever config.json says
    attention_bias, mlp_bias = (
        ("qkv", False) if architectures == QWEN2 else ("all" if bias["attention_bias"] else "", bool(bias["mlp_bias"]))
    )
    layers = positive(config, "num_hidden_layers", path)
    if layers > LAYERS_MAX:
        raise reports.weights.model_unfit(path, f"num_hidden_layers is {layers}", f"at most {LAYERS_MAX}")
    return LlamaShape(
        hidden_size=hidden,
        intermediate_size=positive(config, "intermediate_size", path),
        n_layers=layers,
        n_heads=heads,
        n_kv_heads=kv_heads,
        vocab_size=positive(config, "vocab_size", path),
        head_dim=head_size if head_size * heads != hidden else None,
        attention_bias=attention_bias,
        mlp_bias=mlp_bias,
    )


def shape_of_checkpoint(config: Mapping[str, Any]) -> LlamaShape:
    """A TensorRT-LLM checkpoint's config.json, or `pretrained_config` of its engines,
    with Hugging Face's names except for head_size."""
    return LlamaShape(
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        n_layers=config["num_hidden_layers"],
        n_heads=config["num_attention_heads"],
        n_kv_heads=config["num_key_value_heads"],
        vocab_size=config["vocab_size"],
        head_dim=config.get("head_size"),
        attention_bias="all" if config.get("attn_bias") else "",
        mlp_bias=bool(config.get("mlp_bias")),
    )


def _check_rope(rope: Mapping[str, Any], kind: str, path: Path) -> None:
    """A Problem if a kind of rope scaling lacks one of its numbers, or a number is impossible."""
    if kind == "default":
        return
    if number(rope, "factor", path) < 1:
        raise reports.weights.weights_contradict(
            path, "factor of the rope scaling", "it must be at least 1", f"it is {rope['factor']!r}"
        )
    if kind == "yarn":
        for name in ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim"):
            if rope.get(name) is not None:
                number(rope, name, path)
        positive(rope, "original_max_position_embeddings", path, 1)
    if kind == "llama3":
        positive(rope, "original_max_position_embeddings", path)
        low, high = number(rope, "low_freq_factor", path), number(rope, "high_freq_factor", path)
        if low >= high:
            raise reports.weights.weights_contradict(
                path, "low_freq_factor", "it must be less than high_freq_factor", f"they are {low:g} and {high:g}"
            )


def positive(config: Mapping[str, Any], name: str, path: Path, default: int | None = None) -> int:
    """A whole number above 0 from a config file; a Problem for anything else. None and absent give the default."""
    value = config.get(name)
    value = default if value is None else value
    if type(value) is not int or not 0 < value < 1 << 31:
        raise reports.weights.weights_contradict(path, name, "it must be a whole number above 0", f"it is {value!r}")
    return value


def number(config: Mapping[str, Any], name: str, path: Path, default: float | None = None) -> float:
    """A finite number above 0 from a config file; a Problem for anything else. None and absent give the default,
    if there is one."""
    value = config.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise reports.weights.weights_contradict(path, name, "it must be a number above 0", f"it is {value!r}")
    return float(value)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of the user's; a Problem if there is none."""
    try:
        with path.open("rb") as file:
            value = json.loads(file.read(JSON_MAX_BYTES))
    except FileNotFoundError:
        raise reports.weights.weights_file_missing(
            path.parent, path.name, sorted(p.name for p in path.parent.glob("*"))
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise reports.weights.weights_unreadable(path, f"no JSON ({error})") from None
    if not isinstance(value, dict):
        raise reports.weights.weights_unreadable(path, f"a JSON {type(value).__name__}, not an object")
    return value


def rope_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Rotary settings. transformers 5 keeps them all in rope_parameters, earlier versions in rope_theta and
    rope_scaling. If both are there, transformers takes rope_scaling (convert_rope_params_to_dict)."""
    parameters = config.get("rope_scaling") or config.get("rope_parameters") or {}
    theta = {"rope_theta": config["rope_theta"]} if config.get("rope_theta") is not None else {}
    return {**theta, **parameters}


def rope_kind(rope: Mapping[str, Any]) -> str:
    """Which scaling rotary settings have, in either of transformers' spellings."""
    return str(rope.get("rope_type", rope.get("type", "default")))


def llama3_divisors(head_size: int, theta: float, scaling: Mapping[str, Any]) -> list[float]:
    """The numbers by which Llama 3.1's scaling divides the frequency of each pair of a head (head_size / 2),
    fast pairs first.

    transformers' modeling_rope_utils, _compute_llama3_parameters;
    llama.cpp stores the same numbers as rope_freqs.weight.
    """
    factor, low, high = (float(scaling[name]) for name in ("factor", "low_freq_factor", "high_freq_factor"))
    original = scaling["original_max_position_embeddings"]
    divisors = []
    for pair in range(head_size // 2):
        turns = original * theta ** (-2 * pair / head_size) / (2 * math.pi)
        mixed = min(max((turns - low) / (high - low), 0.0), 1.0)
        divisors.append(1 / ((1 - mixed) / factor + mixed))
    return divisors


def possible_tp_sizes(shape: LlamaShape, limit: int = 64) -> list[int]:
    """The tp sizes up to `limit` that upstream can split this model into."""
    return [tp for tp in range(1, limit + 1) if why_impossible(shape, tp) is None]


def why_impossible(shape: LlamaShape, tp_size: int, pad_heads: bool = False) -> tuple[str, int, str] | None:
    """None, or (what, its size, the rule that it breaks). Upstream:
    convert_checkpoint.py and layers/attention.py of v0.8.0."""
    if not pad_heads:
        if shape.n_heads % tp_size:
            return "the number of heads", shape.n_heads, "each rank takes the same number of whole heads"
        if shape.n_kv_heads % tp_size and tp_size % shape.n_kv_heads:
            return "the number of key/value heads", shape.n_kv_heads, "it must be a multiple of TP or divide TP"
    if shape.intermediate_size % tp_size:
        return "the feed-forward size", shape.intermediate_size, "each rank takes the same number of its rows"
    return None


def padded_heads(shape: LlamaShape, tp_size: int) -> tuple[int, int]:
    """(heads, key/value heads) after heads of zeros are added until tp_size ranks can share them.
    Numbers that divide already stay.

    Whole groups are added (9 heads in 3 groups at TP=2: 12 in 4). If several ranks share a group, each group grows
    instead (14 heads in 2 groups at TP=4: 16 in 2).
    """
    group, n_kv_heads = shape.n_heads // shape.n_kv_heads, shape.n_kv_heads
    if tp_size % n_kv_heads:
        n_kv_heads = -(-n_kv_heads // tp_size) * tp_size
    ranks_of_group = max(1, tp_size // n_kv_heads)
    return -(-group // ranks_of_group) * ranks_of_group * n_kv_heads, n_kv_heads
