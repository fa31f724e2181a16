"""Writes a byte-level BPE (GPT-2's kind, as in SmolLM and Llama 3) in Hugging Face's form:
tokenizer.json with its side files."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts import reports

TIKTOKEN_MAX_BYTES = 64 << 20

# How a text is cut before pairs are joined, by llama.cpp's names (llama-vocab.cpp, llama_vocab_pre_type).
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _sequence(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(parts)}


_LLAMA3 = _sequence(
    {"type": "Split", "pattern": {"Regex": LLAMA3}, "behavior": "Isolated", "invert": False}, _byte_level(False)
)
PRE_TOKENIZERS = {
    "gpt-2": _byte_level(True),
    # each digit by itself, then as in GPT-2
    "smollm": _sequence({"type": "Digits", "individual_digits": True}, _byte_level(True)),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
}


def tokenizer_json(
    path: Path, tokens: Sequence[str], merges: Sequence[str], added: Mapping[int, bool], pre: str, bos_id: int | None
) -> dict[str, Any]:
    """tokenizer.json of a vocabulary. tokens: by id, in GPT-2's writing of bytes; merges: "a b", best first.

    added: ids of tokens that are matched whole in a text -> whether they are special. bos_id: the token in front of
    every text, or None. If a piece of text is a token, Llama 3 takes it whatever the merges say, as tiktoken does.
    """
    if pre not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS)
        raise reports.weights.tokenizer_unfit(
            path, f"Its texts are cut the way that llama.cpp calls {pre!r}; the known ways are {known}"
        )
    if not tokens or len(set(tokens)) != len(tokens):
        raise reports.weights.tokenizer_unreadable(
            path, f"it has {len(tokens)} tokens, but only {len(set(tokens))} different ones"
        )
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": number, "content": tokens[number], **flags, "special": special}
            for number, special in sorted(added.items())
        ],
        "normalizer": None,
        "pre_tokenizer": PRE_TOKENIZERS[pre],
        "post_processor": None if bos_id is None else _first(tokens[bos_id], bos_id),
        "decoder": _byte_level(True),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": PRE_TOKENIZERS[pre] is _LLAMA3,
            "vocab": {token: number for number, token in enumerate(tokens)},
            # "a b" and not ["a", "b"], see tokenizer.py
            "merges": list(merges),
        },
    }


def _first(bos: str, bos_id: int) -> dict[str, Any]:
    """Put <s>, or the token with that role, in front."""

    def words(*names: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for type_id, name in enumerate(names):
            found += [{"SpecialToken": {"id": bos, "type_id": type_id}}, {"Sequence": {"id": name, "type_id": type_id}}]
        return found

    special = {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}}
    return {"type": "TemplateProcessing", "single": words("A"), "pair": words("A", "B"), "special_tokens": special}


def tokenizer_config(special: Mapping[str, str], add_bos: bool) -> dict[str, Any]:
    """tokenizer_config.json. special: bos_token, eos_token, ... -> its text."""
    return {
        "add_bos_token": add_bos,
        "add_eos_token": False,
        **special,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


# --- Llama 3's tokenizer.model: tiktoken's file, lines of base64 and a rank -------------------------------------------


@dataclass(frozen=True)
class Tiktoken:
    """The tokens of such a file, bytes by rank; Llama 3's special tokens come after them."""

    tokens: tuple[bytes, ...]
    special: tuple[str, ...]

    @property
    def vocab_size(self) -> int:
        return len(self.tokens) + len(self.special)

    @property
    def bos_id(self) -> int:
        return len(self.tokens)

    @property
    def eos_id(self) -> int:
        return len(self.tokens) + 1

    @property
    def end_ids(self) -> list[int]:
        """What ends an answer: the text's end, and as in Meta's tokenizer.py (stop_tokens) a chat's turn;
        since 3.1 a message too."""
        turns = [name for name in ("<|eom_id|>", "<|eot_id|>") if name in self.special]
        return [self.eos_id, *(self.bos_id + self.special.index(name) for name in turns)]


def special_tokens(since_3_1: bool) -> tuple[str, ...]:
    """Llama 3's 256 special tokens (llama3's tokenizer.py; since 3.1 llama-models'): a token without a name is
    reserved, with a number."""
    named = {0: "begin_of_text", 1: "end_of_text", 6: "start_header_id", 7: "end_header_id", 9: "eot_id"}
    if since_3_1:
        named.update({4: "finetune_right_pad_id", 8: "eom_id", 10: "python_tag"})
    reserved = iter(range(256))
    return tuple(f"<|{named[i] if i in named else f'reserved_special_token_{next(reserved)}'}|>" for i in range(256))


def is_tiktoken(path: Path) -> bool:
    """Whether the file's first line looks like `IQ== 0`."""
    try:
        with path.open("rb") as file:
            line = file.readline(200).split()
        return len(line) == 2 and line[1] == b"0" and len(base64.b64decode(line[0], validate=True)) > 0
    except (OSError, ValueError):
        return False


def read_tiktoken(path: Path, since_3_1: bool) -> Tiktoken:
    """Read and check such a file; a Problem if it is cut off or anything else."""
    with path.open("rb") as file:
        data = file.read(TIKTOKEN_MAX_BYTES + 1)
    tokens: list[bytes] = []
    for number, line in enumerate(data.splitlines()):
        try:
            word, rank = line.split()
            if int(rank) != number:
                raise ValueError(f"rank {int(rank)} in line {number + 1}")
            tokens.append(base64.b64decode(word, validate=True))
        except ValueError as error:
            raise reports.weights.tokenizer_unreadable(
                path, f"line {number + 1} is not base64 and its rank ({error})"
            ) from None
    if (
        len(data) > TIKTOKEN_MAX_BYTES
        or len(set(tokens)) != len(tokens)
        or not {bytes([b]) for b in range(256)} <= set(tokens)
    ):
        raise reports.weights.tokenizer_unreadable(
            path, f"its {len(tokens)} tokens are not all different, or lack one of the 256 bytes"
        )
    return Tiktoken(tuple(tokens), special_tokens(since_3_1))


def tiktoken_files(path: Path, model: Tiktoken) -> dict[str, Any]:
    """tokenizer.json and its side files, as values: for any text tiktoken's ids, with <|begin_of_text|> in front."""
    written = _byte_characters()
    tokens = ["".join(written[byte] for byte in token) for token in model.tokens] + list(model.special)
    known = {token: rank for rank, token in enumerate(model.tokens)}
    merges: list[str] = []
    for token in model.tokens:
        # every way to make it of two tokens, as in transformers' converter, the earlier parts first
        ways = [(token[:at], token[at:]) for at in range(1, len(token)) if token[:at] in known and token[at:] in known]
        for left, right in sorted(ways, key=lambda way: (known[way[0]], known[way[1]])):
            merges.append(f"{tokens[known[left]]} {tokens[known[right]]}")
    added = dict.fromkeys(range(len(model.tokens), model.vocab_size), True)
    special = {"bos_token": tokens[model.bos_id], "eos_token": tokens[model.eos_id]}
    return {
        "tokenizer.json": tokenizer_json(path, tokens, merges, added, "llama-bpe", model.bos_id),
        "tokenizer_config.json": tokenizer_config(special, True),
        "special_tokens_map.json": special,
        # a model that was not trained for chats never says the end of a turn
        "generation_config.json": {"bos_token_id": model.bos_id, "eos_token_id": model.end_ids},
    }


def _byte_characters() -> list[str]:
    """How GPT-2 writes the 256 bytes: visible characters of Latin-1 as they are,
    the others as characters from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    return [chr(byte) if byte in visible else chr(0x100 + others.index(byte)) for byte in range(256)]
