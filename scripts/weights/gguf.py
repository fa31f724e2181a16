"""Reads a Llama from a GGUF file, or from its parts: its config and tokenizer in Hugging Face's form, its weights
dequantized to float32 as in transformers.

The package gguf (requirements/gguf.txt) reads the file and dequantizes; it is imported only where there is such a file.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Iterator, Mapping

import numpy as np

from scripts import reports
from scripts.tokenizer import byte_bpe, ends, sentencepiece
from scripts.weights.hugging_face import check_tensors
from scripts.weights.meta import pairs_to_halves
from scripts.weights.safetensors import Raw, row_blocks
from scripts.weights.shape import EMBEDDING, HEAD, LAST_NORM, LLAMA3_ROPE, LlamaShape, Shape, llama3_divisors

# llama.cpp's names -> Hugging Face's (gguf-py, tensor_mapping.py)
GLOBAL = {"token_embd.weight": EMBEDDING, "output_norm.weight": LAST_NORM, "output.weight": HEAD}
LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
# token_type of llama.cpp (llama.h, llama_token_type); those of SentencePiece have the same numbers
CONTROL, USER_DEFINED = 3, 4
# llama.cpp's defaults by the kind of tokenizer (llama-vocab.cpp, llama_vocab::impl::load)
DEFAULT_IDS = {"llama": {"bos": 1, "eos": 2, "unknown": 0}, "gpt2": {"bos": 11, "eos": 11}}
# The kinds of gpt2 tokenizers that begin a text with BOS unless the file says otherwise;
# `llama` always does (same function).
BEGIN_WITH_BOS = ("llama3", "llama-v3", "llama-bpe")
# Texts of tokens that end a turn or a message, used if no key names such a token (the same function)
TURN_ENDS = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<EOT>", "_<EOT>")
MESSAGE_END = "<|eom_id|>"
# Llama 3.1's rope scaling as llama.cpp's converter stores it:
# a divisor for each pair of a head (conversion of LlamaModel)
ROPE_FREQS = "rope_freqs.weight"
PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
# how llama.cpp writes "none" as uint32
NO_TOKEN = 0xFFFFFFFF
# the types of the entries in the tokenizer's lists
LISTS = {"tokens": str, "merges": str, "scores": float, "token_type": int}
# size in bytes of each kind of value in GGUF, by its number (ggml's docs/gguf.md);
# strings and arrays carry their length
KIND_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
STRING, ARRAY = 8, 9
# The package makes an object of each entry, which takes 3 us.
# Llama 3's 280,147 merges are the longest list of any Llama.
ENTRIES_MAX = 1 << 22
NAME_MAX_BYTES = 1 << 16  # ggml's own limit
AXES_MAX = 4  # ggml's GGML_MAX_DIMS


@dataclass(frozen=True)
class GgufWeights:
    """The tensors of a GGUF file, dequantized block by block: numbers of float32."""

    files: tuple[Path, ...]
    shape: LlamaShape
    names: Mapping[str, str]  # Hugging Face's tensor name -> llama.cpp's
    stored: Mapping[str, Any]  # llama.cpp's name -> gguf.ReaderTensor
    places: Mapping[str, Path]  # llama.cpp's name -> the file
    dtype: str = "float32"

    @property
    def tensors(self) -> Mapping[str, tuple[str, Shape]]:
        """Hugging Face's tensor name -> its type and shape, dequantized."""
        return {name: ("F32", shape) for name, shape in self.shape.hf_tensors().items()}

    def origin(self, hf_name: str) -> tuple[Path, str]:
        """The file that holds a tensor, and the tensor's name there."""
        return self.places[self.names[hf_name]], self.names[hf_name]

    def blocks(self, hf_name: str) -> Iterator[Raw]:
        """The rows of a tensor, in order: arrays of (rows, columns) or (rows,).

        llama.cpp rotates neighbours as Meta does, so q and k are in Meta's order.
        """
        import gguf

        stored = self.stored[self.names[hf_name]]
        rows, *rest = self.tensors[hf_name][1]
        row_bytes = 4 * int(np.prod(rest))
        permuted = hf_name.endswith(("q_proj.weight", "k_proj.weight"))
        # a norm is one row for GGUF: if it is quantized, its bytes are not our rows
        spans = row_blocks(0, rows, row_bytes, self.shape.head_size if permuted else 1) if rest else [(0, rows)]
        for first, end in spans:
            try:
                values = gguf.dequantize(stored.data[first:end] if rest else stored.data, stored.tensor_type)
                values = values.astype(np.float32, copy=False).reshape(end - first, *rest)
            except (ValueError, TypeError, LookupError, NotImplementedError) as error:
                kind = f"{stored.name} is of the type {stored.tensor_type.name}"
                raise reports.weights.weights_unreadable(
                    self.places[stored.name], f"{kind}, which cannot be dequantized ({error})"
                ) from None
            raw = np.ascontiguousarray(values).view(np.uint32)
            yield pairs_to_halves(raw, self.shape.head_size) if permuted else raw


@dataclass(frozen=True)
class GgufModel:
    """One model. fields: its metadata, name -> value; path: the file that has it; places: the file of each tensor."""

    path: Path
    fields: Mapping[str, Any]
    stored: Mapping[str, Any]
    places: Mapping[str, Path]

    @property
    def tied(self) -> bool:
        """Whether the output layer is the embedding: then the file has no tensor for it."""
        return "output.weight" not in self.stored

    def number(self, name: str, default: Any = None) -> Any:
        """A field of the architecture; a Problem if it is missing, or not a plain number."""
        value = self.fields.get(f"llama.{name}", default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1 << 31:
            raise reports.weights.weights_contradict(
                self.path, f"llama.{name}", "it must be a number above 0", f"it is {value!r}"
            )
        return value

    @property
    def config(self) -> dict[str, Any]:
        """Its metadata, in the words of Hugging Face's config.json."""
        heads, hidden = self.number("attention.head_count"), self.number("embedding_length")
        turned = self.number("rope.dimension_count", hidden // heads)
        head_dim = self.number("attention.key_length", turned)
        if turned != head_dim:
            raise reports.weights.model_unfit(
                self.path, f"llama.rope.dimension_count is {turned} of the {head_dim} of a head", "all of a head"
            )
        config = {
            "hidden_size": hidden,
            "intermediate_size": self.number("feed_forward_length"),
            "num_hidden_layers": self.number("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self.number("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "max_position_embeddings": self.number("context_length"),
            # it is stored in single precision: take the shortest decimal number that rounds to it
            "rms_norm_eps": float(str(np.float32(self.number("attention.layer_norm_rms_epsilon")))),
            "rope_theta": float(str(np.float32(self.number("rope.freq_base", 10000.0)))),
            "vocab_size": len(self.fields.get("tokenizer.ggml.tokens") or ()),
            "tie_word_embeddings": self.tied,
        }
        if self.scaling == "linear":
            config["rope_scaling"] = {"type": "linear", "factor": float(self.number("rope.scaling.factor"))}
        if self.scaling == "yarn":
            factor = self.fields.get("llama.rope.scaling.factor")
            if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not factor >= 1:
                raise reports.weights.weights_contradict(
                    self.path,
                    "llama.rope.scaling.factor",
                    "for yarn it must be a number of at least 1",
                    f"it is {factor!r}",
                )
            factor = float(factor)
            original = self.number("rope.scaling.original_context_length", config["max_position_embeddings"])
            config["rope_scaling"] = {"type": "yarn", "factor": factor, "original_max_position_embeddings": original}
        if ROPE_FREQS in self.stored:
            stretched = self._stretched(head_dim, config["rope_theta"])
            if stretched and "rope_scaling" in config:
                raise reports.weights.model_unfit(
                    self.path, f"rope scaling is both {self.scaling} and {ROPE_FREQS}", "one of them"
                )
            config.update({"rope_scaling": stretched} if stretched else {})
        return config

    def _stretched(self, head_dim: int, theta: float) -> dict[str, Any] | None:
        """Llama 3.1's scaling by the divisors that the file has, None if all are 1; a Problem for any others."""
        import gguf

        stored = self.stored[ROPE_FREQS]
        divisors = np.asarray(gguf.dequantize(stored.data, stored.tensor_type), np.float32).reshape(-1)
        if divisors.size == head_dim // 2 and np.all(divisors == 1):
            return None
        factor = float(divisors.max(initial=0))
        scaling = {"rope_type": "llama3", "factor": factor, **LLAMA3_ROPE}
        if divisors.size != head_dim // 2 or not np.allclose(
            divisors, llama3_divisors(head_dim, theta, scaling), rtol=1e-5
        ):
            raise reports.weights.model_unfit(
                self.places[ROPE_FREQS], f"its rope scaling ({ROPE_FREQS}) is not Llama 3.1's", "Llama 3.1's, or none"
            )
        return scaling

    @property
    def scaling(self) -> str:
        return str(self.fields.get("llama.rope.scaling.type", "none"))

    def weights(self, shape: LlamaShape) -> GgufWeights:
        """Its tensors, compared with the shape; a Problem if they do not match."""
        names = {hf: ours for ours, hf in GLOBAL.items()}
        for layer in range(shape.n_layers):
            names.update(
                {f"model.layers.{layer}.{hf}.weight": f"blk.{layer}.{ours}.weight" for ours, hf in LAYER.items()}
            )
        if self.tied:
            names[HEAD] = names[EMBEDDING]
        # llama.cpp writes the sizes in reverse
        found = {name: tuple(int(size) for size in reversed(tensor.shape)) for name, tensor in self.stored.items()}
        expected = {names[hf]: size for hf, size in shape.hf_tensors().items()}
        found.pop(ROPE_FREQS, None)
        check_tensors(self.path, "the metadata", expected, found)
        return GgufWeights(tuple(dict.fromkeys(self.places.values())), shape, names, self.stored, self.places)

    def tokenizer_files(self) -> dict[str, Any]:
        """tokenizer.json and its side files, as values; the chat template is in tokenizer_config.json."""
        field = {name: self.fields.get(f"tokenizer.ggml.{name}") for name in ("model", "pre", "tokens", "token_type")}
        tokens = field["tokens"] or []
        llama = field["model"] == "llama"
        defaults = DEFAULT_IDS.get(str(field["model"]), {})
        ids = {
            f"{name}_token": self._token_id(long, len(tokens), needed, defaults.get(long))
            for name, long, needed in (
                ("bos", "bos", True),
                ("eos", "eos", True),
                ("unk", "unknown", llama),
                ("pad", "padding", False),
            )
        }
        special = {name: tokens[number] for name, number in ids.items() if number is not None}
        template = self.fields.get("tokenizer.chat_template")
        add_bos = bool(self.fields.get("tokenizer.ggml.add_bos_token", llama or str(field["pre"]) in BEGIN_WITH_BOS))
        if llama:
            pieces = self._pieces(tokens, field["token_type"] or [], ids)
            made = sentencepiece.tokenizer_json(pieces, around=(pieces.bos_id if add_bos else None, None))
            config = {**sentencepiece.tokenizer_config(pieces), "add_bos_token": add_bos}
        elif field["model"] == "gpt2":
            types = dict(enumerate(field["token_type"] or []))
            if len(types) not in (0, len(tokens)):
                raise reports.weights.tokenizer_unreadable(
                    self.path, f"it has {len(tokens)} tokens and {len(types)} types"
                )
            added = {number: types[number] == CONTROL for number in types if types[number] in (CONTROL, USER_DEFINED)}
            merges = self.fields.get("tokenizer.ggml.merges") or []
            bos = ids["bos_token"] if add_bos else None
            made = byte_bpe.tokenizer_json(self.path, tokens, merges, added, str(field["pre"] or "default"), bos)
            config = byte_bpe.tokenizer_config(special, add_bos)
        else:
            raise reports.weights.tokenizer_unfit(
                self.path, f"Its tokenizer is of the kind {field['model']!r}, not llama or gpt2"
            )
        if isinstance(template, str):
            config["chat_template"] = template
        return {
            "tokenizer.json": made,
            "tokenizer_config.json": config,
            "special_tokens_map.json": special,
            "generation_config.json": ends.generation_config(
                {}, self._ends(tokens, ids["eos_token"]), ids["bos_token"]
            ),
        }

    @property
    def eos_id(self) -> int | None:
        """The end of a text."""
        defaults = DEFAULT_IDS.get(str(self.fields.get("tokenizer.ggml.model")), {})
        return self._token_id("eos", len(self.fields.get("tokenizer.ggml.tokens") or ()), True, defaults.get("eos"))

    def _ends(self, tokens: list[str], eos_id: int | None) -> list[int]:
        """The tokens that end an answer: eos, eot, eom. If no key names the latter two,
        llama.cpp finds them by their texts."""
        places = {token: token_id for token_id, token in enumerate(tokens)}
        eot, eom = (self._token_id(name, len(tokens), True, None) for name in ("eot", "eom"))
        found = [eos_id, eot, places.get(MESSAGE_END) if eom is None else eom]
        if eot is None and (eos_id is None or tokens[eos_id] not in TURN_ENDS):
            found += [places.get(token) for token in TURN_ENDS]
        return ends.end_ids([], found, len(tokens))

    def _token_id(self, name: str, n_tokens: int, needed: bool, default: int | None) -> int | None:
        """The id of a special token, or None; a Problem if the model needs one that is not among the tokens."""
        value = self.fields.get(f"tokenizer.ggml.{name}_token_id", default)
        if value is None or value == NO_TOKEN:
            return None
        if type(value) is int and 0 <= value < n_tokens:
            return value
        if needed:
            raise reports.weights.tokenizer_unreadable(
                self.path, f"its {name}_token_id is {value!r}, which is none of its {n_tokens} tokens"
            )
        return None

    def _pieces(self, tokens: Any, types: Any, ids: Mapping[str, Any]) -> sentencepiece.SentencePieceModel:
        scores = self.fields.get("tokenizer.ggml.scores") or []
        if not len(tokens) == len(scores) == len(types):
            raise reports.weights.tokenizer_unreadable(
                self.path, f"it has {len(tokens)} tokens, {len(scores)} scores and {len(types)} types"
            )
        if not self.fields.get("tokenizer.ggml.add_space_prefix", True):
            raise reports.weights.tokenizer_unfit(self.path, "It puts no space in front (add_space_prefix is false)")
        missing = [name for name in ("unk_token", "bos_token", "eos_token") if ids[name] is None]
        if missing:
            raise reports.weights.tokenizer_unfit(self.path, f"It says that it has no {missing[0]}")
        pieces = tuple(sentencepiece.Piece(*piece) for piece in zip(tokens, scores, types))
        sentencepiece.check_pieces(self.path, pieces)
        return sentencepiece.SentencePieceModel(pieces, ids["unk_token"], ids["bos_token"], ids["eos_token"])


def read_gguf(folder: Path) -> GgufModel:
    """The model of a folder's GGUF file, or of all parts that one was split into; only metadata is read. A Problem if
    it is damaged or not a Llama."""
    paths = parts_of(folder)
    path = paths[0]
    fields: dict[str, Any] = {}
    stored: dict[str, Any] = {}
    places: dict[str, Path] = {}
    for part in paths:
        said, tensors = _read(part)
        fields = fields or said
        numbers = {name: said.get(f"split.{name}") for name in ("no", "count")}
        if len(paths) > 1 and numbers != {"no": paths.index(part), "count": len(paths)}:
            raise reports.weights.weights_contradict(
                part,
                "split.no and split.count",
                f"the names of the files say {paths.index(part)} of {len(paths)}",
                f"they are {numbers}",
            )
        twice = sorted(tensors.keys() & stored.keys())
        if twice:
            raise reports.weights.weights_unreadable(part, f"{twice[0]} is in it and in {places[twice[0]].name}")
        stored.update(tensors)
        places.update(dict.fromkeys(tensors, part))
    model = GgufModel(path, fields, stored, places)
    architecture = fields.get("general.architecture")
    if architecture != "llama":
        raise reports.weights.model_unfit(path, f"general.architecture is {architecture!r}", "llama")
    for name in ("expert_count", "attention.sliding_window"):
        if fields.get(f"llama.{name}"):
            raise reports.weights.model_unfit(path, f"llama.{name} is {fields[f'llama.{name}']}", "none of it")
    if model.scaling not in ("none", "linear", "yarn"):
        raise reports.weights.model_unfit(path, f"rope scaling is of the type {model.scaling}", "none, linear, yarn")
    return model


def parts_of(folder: Path) -> list[Path]:
    """The one GGUF file of a folder, or all parts of a split one, in order; a Problem for a missing part,
    and for several models."""
    paths = sorted(folder.glob("*.gguf"))
    parts = [PART.fullmatch(path.name) for path in paths]
    first = parts[0] if parts else None
    if first is None or any(part is None or part[1] != first[1] or part[3] != first[3] for part in parts):
        if len(paths) == 1:
            return paths
        raise reports.weights.several_ggufs(folder, [path.name for path in paths])
    count = int(first[3])
    names = [f"{first[1]}-{number:05d}-of-{first[3]}.gguf" for number in range(1, count + 1)]
    missing = [name for name in names if folder / name not in paths]
    if missing or len(paths) != count:
        raise reports.weights.weights_file_missing(
            folder, missing[0] if missing else names[0], [path.name for path in paths]
        )
    return [folder / name for name in names]


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(metadata, tensors) of one file; a Problem if it is damaged."""
    import gguf

    try:
        with path.open("rb") as file:
            _check_header(file, path.stat().st_size)
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        stored = {tensor.name: tensor for tensor in reader.tensors}
        for name, kind in LISTS.items():
            values = fields.get(f"tokenizer.ggml.{name}", [])
            if not isinstance(values, list) or any(type(value) is not kind for value in values):
                raise ValueError(f"tokenizer.ggml.{name} is not a list of {kind.__name__}")
    except (
        OSError,
        ValueError,
        LookupError,
        struct.error,
        TypeError,
        AttributeError,
        OverflowError,
        MemoryError,
    ) as error:
        raise reports.weights.weights_unreadable(path, f"it is cut off, damaged or no GGUF file ({error})") from None
    return fields, stored


def _check_header(file: BinaryIO, size_bytes: int) -> None:
    """ValueError for lengths that the file cannot have. The package believes every length: after the end of the file it
    would read nothing, and a flipped number would keep it busy for hours."""

    def numbers(form: str) -> tuple[Any, ...]:
        return struct.unpack(f"<{form}", file.read(struct.calcsize(f"<{form}")))

    def skip(length: int, most: int) -> None:
        if length > min(most, size_bytes - file.tell()):
            raise ValueError(f"a length of {length} at byte {file.tell()}, the file has {size_bytes}")
        file.seek(length, 1)

    if numbers("4s") != (b"GGUF",) or not 0 < numbers("I")[0] < 1 << 16:
        raise ValueError("it does not begin as GGUF does, or is big-endian")
    n_tensors, n_fields = numbers("QQ")
    n_entries = n_tensors + n_fields
    for _ in range(n_fields):
        skip(numbers("Q")[0], NAME_MAX_BYTES)
        [kind], count = numbers("I"), 1
        if kind == ARRAY:
            kind, count = numbers("IQ")
        if kind not in KIND_BYTES and kind != STRING:
            raise ValueError(f"a value of the kind {kind} at byte {file.tell()}")
        n_entries += count
        if n_entries > ENTRIES_MAX:
            raise ValueError(f"{n_entries} entries before byte {file.tell()}, {ENTRIES_MAX} are the limit")
        if kind == STRING:
            for _ in range(count):
                skip(numbers("Q")[0], size_bytes)
        else:
            skip(count * KIND_BYTES[kind], size_bytes)
    for _ in range(n_tensors):
        skip(numbers("Q")[0], NAME_MAX_BYTES)
        [axes] = numbers("I")
        if not 0 < axes <= AXES_MAX:
            raise ValueError(f"a tensor of {axes} axes at byte {file.tell()}")
        skip(axes * 8 + 12, size_bytes)
