"""Reads a SentencePiece tokenizer.model and writes it in Hugging Face's form: tokenizer.json with its side files.

The token ids of both are equal for any text. The protobuf is read here by hand (four fields of each message are
needed), so that the rooms need neither sentencepiece nor a particular version of protobuf.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from scripts import reports
from scripts.weights import files

# sentencepiece_model.proto: ModelProto.SentencePiece.Type and TrainerSpec.ModelType
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
TYPE_NAMES = {5: "unused"}
MODEL_TYPES = {1: "unigram", 2: "BPE", 3: "word", 4: "character"}
BPE = 2
SPACE = "\u2581"  # how SentencePiece writes a space
MODEL_MAX_BYTES = 64 << 20


@dataclass(frozen=True)
class Piece:
    """One token: its text, its score (the higher, the earlier it is merged) and what kind it is."""

    text: str
    score: float
    type: int


@dataclass(frozen=True)
class SentencePieceModel:
    """A tokenizer.model that is BPE with byte fallback and changes nothing but spaces, as Llama 2's is."""

    pieces: tuple[Piece, ...]
    unk_id: int
    bos_id: int
    eos_id: int

    @property
    def vocab_size(self) -> int:
        return len(self.pieces)


def path_of(folder: Path) -> Path:
    """tokenizer.model beside the weights, or one level up, where Meta's download leaves it for all sizes."""
    for path in files.tokenizers_of(folder):
        if path.is_file():
            return path
    raise reports.weights.weights_file_missing(
        folder, files.TOKENIZER, sorted(path.name for path in folder.glob("*token*"))
    )


def read_tokenizer_model(path: Path) -> SentencePieceModel:
    """Read and check a tokenizer.model; if it is not Llama 2's kind, a Problem names its kind."""
    try:
        with path.open("rb") as file:
            data = file.read(MODEL_MAX_BYTES)
    except OSError as error:
        raise reports.weights.tokenizer_unreadable(path, error.strerror or type(error).__name__) from None
    if _is_tiktoken(data):
        raise reports.weights.tokenizer_unfit(path, "It is a tiktoken file (lines of base64 and a rank, as in Llama 3)")
    try:
        return parse_model(data, path)
    except (ValueError, struct.error, IndexError) as error:
        raise reports.weights.tokenizer_unreadable(path, f"not a whole SentencePiece model ({error})") from None


def parse_model(data: bytes, path: str | Path = "tokenizer.model") -> SentencePieceModel:
    """tokenizer.model's bytes -> the model. ValueError if the bytes are not protobuf,
    a Problem if it is not a Llama kind.

    Field numbers: sentencepiece's src/sentencepiece_model.proto.
    """
    pieces: list[Piece] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    denormalizer: dict[int, Any] = {}
    for number, value in _fields(data):
        if number == 1:
            fields = dict(_fields(_message(value)))
            score = struct.unpack("<f", fields[2])[0] if 2 in fields else 0.0
            pieces.append(Piece(_message(fields.get(1, b"")).decode(), score, fields.get(3, NORMAL)))
        elif number == 2:
            trainer.update(_fields(_message(value)))
        elif number == 3:
            normalizer.update(_fields(_message(value)))
        elif number == 5:
            denormalizer.update(_fields(_message(value)))
    if not pieces:
        raise ValueError("no pieces in it")
    _refuse_other_kinds(path, pieces, trainer, normalizer, denormalizer)
    # int64 varints: an absent token is -1
    ids = {
        name: _signed(trainer.get(number, default))
        for name, number, default in (("unk_id", 40, 0), ("bos_id", 41, 1), ("eos_id", 42, 2))
    }
    for name, kind in (("unk_id", UNKNOWN), ("bos_id", CONTROL), ("eos_id", CONTROL)):
        if not 0 <= ids[name] < len(pieces) or pieces[ids[name]].type != kind:
            raise reports.weights.tokenizer_unfit(
                path, f"Its {name} is {ids[name]}, which is not such a piece among its {len(pieces)}"
            )
    return SentencePieceModel(tuple(pieces), **ids)


def tokenizer_json(
    model: SentencePieceModel,
    added: Mapping[int, Mapping[str, Any]] = MappingProxyType({}),
    around: tuple[int | None, int | None] | None = None,
    spaces: str | None = None,
) -> dict[str, Any]:
    """The model as tokenizer.json: it gives the ids of SentencePiece for any text,
    with <s> in front if special tokens are wanted.

    Strip the special `added_tokens` from it (or set encode_special_tokens), and a special token that is spelt out in a
    text is plain text: SentencePiece never reads `</s>` in a text as the end token.
    User-defined pieces are matched whole in any text.

    added: tokens besides the pieces, by id: content, and transformers' lstrip, rstrip, single_word, special.
    around: the ids that a text begins and ends with; None: none; absent: <s> in front.
    spaces: where transformers adds a space if the text does not begin with one: `first`: at the start; `always`: also
    after added tokens (its `legacy` tokenizers); None: SentencePiece's own way for a text without added tokens,
    in front of any text.
    """
    texts = {token_id: piece.text for token_id, piece in enumerate(model.pieces)}
    texts.update({token_id: str(token["content"]) for token_id, token in added.items()})
    kinds = {token_id: piece.type for token_id, piece in enumerate(model.pieces)}
    found = {token_id: kind == CONTROL for token_id, kind in kinds.items() if kind in (CONTROL, USER_DEFINED)}
    found.update(dict.fromkeys((model.unk_id, model.bos_id, model.eos_id), True))
    found.update({token_id: bool(token.get("special")) for token_id, token in added.items()})

    def flagged(token_id: int) -> dict[str, Any]:
        flags = {name: bool(added.get(token_id, {}).get(name)) for name in ("single_word", "lstrip", "rstrip")}
        special = found[token_id]
        return {"id": token_id, "content": texts[token_id], **flags, "normalized": False, "special": special}

    begin, end = (model.bos_id, None) if around is None else around

    def placed(name: str, type_id: int) -> list[dict[str, Any]]:
        sequence = {"Sequence": {"id": name, "type_id": type_id}}
        before, after = (
            [] if token_id is None else [{"SpecialToken": {"id": texts[token_id], "type_id": type_id}}]
            for token_id in (begin, end)
        )
        return [*before, sequence, *after]

    outside = {texts[token_id]: token_id for token_id in (begin, end) if token_id is not None}
    template = {
        "type": "TemplateProcessing",
        "single": placed("A", 0),
        "pair": [*placed("A", 0), *placed("B", 1)],
        "special_tokens": {
            text: {"id": text, "ids": [token_id], "tokens": [text]} for text, token_id in outside.items()
        },
    }
    # the leading space that SentencePiece calls the dummy prefix
    prefix: dict[str, Any] = {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": SPACE},
                {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
            ],
        },
        "pre_tokenizer": None,
    }
    if spaces is not None:
        metaspace = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": spaces, "split": False}
        prefix = {"normalizer": None, "pre_tokenizer": metaspace}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [flagged(token_id) for token_id in sorted(found)],
        **prefix,
        "post_processor": template if outside else None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": model.pieces[model.unk_id].text,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {piece.text: token_id for token_id, piece in enumerate(model.pieces)},
            # "a b" and not ["a", "b"]: tokenizers 0.15 in NVIDIA's older containers reads only the former,
            # 0.23 reads both
            "merges": [f"{left} {right}" for left, right in merges(model)],
        },
    }


def tokenizer_config(model: SentencePieceModel) -> dict[str, Any]:
    """tokenizer_config.json. It names the plain class,
    because transformers 5 rebuilds a LlamaTokenizer from its parts."""
    return {
        "add_bos_token": True,
        "add_eos_token": False,
        **special_tokens_map(model),
        "clean_up_tokenization_spaces": False,
        # without it transformers 4 adds token_type_ids, which Llama's generate() refuses
        "model_input_names": ["input_ids", "attention_mask"],
        # a special token that is spelt out in a text is plain text
        "split_special_tokens": True,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def special_tokens_map(model: SentencePieceModel) -> dict[str, str]:
    """special_tokens_map.json, which transformers before version 5 read."""
    return {
        f"{name}_token": model.pieces[token_id].text
        for name, token_id in (("bos", model.bos_id), ("eos", model.eos_id), ("unk", model.unk_id))
    }


def merges(model: SentencePieceModel) -> list[tuple[str, str]]:
    """The pairs that BPE joins, best first.

    SentencePiece joins the neighbours whose union has the best score; Hugging Face joins the neighbours that come first
    in a list of pairs. So the list has every way to split a piece into two pieces, in the order of the union's score.
    Among the splits of one piece the shorter left part comes first. Both take the leftmost of equal pairs.
    """
    normal = {piece.text: piece.score for piece in model.pieces if piece.type == NORMAL}
    pairs = [
        (-score, at, text[:at], text[at:])
        for text, score in normal.items()
        for at in range(1, len(text))
        if text[:at] in normal and text[at:] in normal
    ]
    return [(left, right) for _, _, left, right in sorted(pairs)]


def _refuse_other_kinds(
    path: str | Path,
    pieces: list[Piece],
    trainer: dict[int, Any],
    normalizer: dict[int, Any],
    denormalizer: dict[int, Any],
) -> None:
    """A Problem for every setting that would give other token ids than the BPE of tokenizer_json."""

    def unfit(what: str) -> reports.Problem:
        return reports.weights.tokenizer_unfit(path, what)

    model_type = trainer.get(3, 1)
    if model_type != BPE:
        raise unfit(f"It is a SentencePiece model of type {MODEL_TYPES.get(model_type, model_type)}, not BPE")
    if not trainer.get(35, 0):
        raise unfit("It has no byte fallback")
    if trainer.get(24, 0):
        raise unfit("It writes spaces after words (treat_whitespace_as_suffix), not before them")
    # add_dummy_prefix, remove_extra_whitespaces, escape_whitespaces: on by default
    switches = tuple(bool(normalizer.get(number, 1)) for number in (3, 4, 5))
    name = _message(normalizer.get(1, b"")).decode()
    if normalizer.get(2) or denormalizer.get(2) or switches != (True, False, True):
        raise unfit(
            f"Its normalizer is {name!r} with add_dummy_prefix, remove_extra_whitespaces, escape_whitespaces = "
            f"{switches} instead of Llama 2's 'identity' with (True, False, True)"
        )
    check_pieces(path, pieces)


def check_pieces(path: str | Path, pieces: Sequence[Piece]) -> None:
    """A Problem if the pieces, whatever file they come from, are not those of a BPE that tokenizer_json can write."""

    def unfit(what: str) -> reports.Problem:
        return reports.weights.tokenizer_unfit(path, what)

    missing = {f"<0x{byte:02X}>" for byte in range(256)} - {piece.text for piece in pieces if piece.type == BYTE}
    if missing:
        raise unfit(f"It has no byte fallback ({len(missing)} of 256 byte pieces are missing)")
    for token_id, piece in enumerate(pieces):
        if piece.type not in (NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE):
            raise unfit(
                f"Its piece {token_id}, {piece.text!r}, is of the type {TYPE_NAMES.get(piece.type, piece.type)}"
            )
    if len({piece.text for piece in pieces}) != len(pieces):
        raise unfit("Two of its pieces have the same text")
    known = {piece.text for piece in pieces if piece.type in (NORMAL, USER_DEFINED)}
    for piece in pieces:
        if piece.type != NORMAL:
            continue
        if " " in piece.text:
            raise unfit(
                f"Its piece {piece.text!r} holds a space, which the list of merges in tokenizer.json cannot write"
            )
        # SentencePiece also joins characters that are not pieces themselves, Hugging Face does not
        alone = set(piece.text) - known
        if alone:
            raise unfit(f"Its piece {piece.text!r} holds {min(alone)!r}, which is not a piece by itself")
    # equal scores: SentencePiece takes the leftmost of different pieces, which a list of pairs cannot express
    joined = [piece.score for piece in pieces if piece.type == NORMAL and len(piece.text) > 1]
    if len(set(joined)) != len(joined):
        raise unfit("Two of its pieces have the same score")


def _is_tiktoken(data: bytes) -> bool:
    """Lines such as `IQ== 0`."""
    line = data[:200].split(b"\n")[0].split()
    return len(line) == 2 and line[1].isdigit() and all(byte < 128 for byte in line[0]) and data[0] > 32


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """The (number, value) pairs of a protobuf message: varints as int, everything else as bytes."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire == 2:
            size, at = _varint(data, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire} at byte {at}")
        if at + size > len(data):
            raise ValueError(f"cut off at byte {len(data)}")
        yield number, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
    raise ValueError(f"no varint at byte {at}")


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _message(value: Any) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a number where text belongs")
    return value
