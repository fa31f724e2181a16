"""Says a byte-level BPE (GPT-2's kind, as SmolLM and Llama 3 have it) in the form of Hugging Face: tokenizer.json with its side files."""

from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence

from scripts import errors

# How a text is cut before pairs are joined, by llama.cpp's names (llama-vocab.cpp, llama_vocab_pre_type).
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _byte_level(use_regex: bool) -> Dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _sequence(*parts: Dict[str, Any]) -> Dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(parts)}


_LLAMA3 = _sequence(
    {"type": "Split", "pattern": {"Regex": LLAMA3}, "behavior": "Isolated", "invert": False}, _byte_level(False)
)
PRE_TOKENIZERS = {
    "gpt-2": _byte_level(True),
    # each digit by itself, then as GPT-2
    "smollm": _sequence({"type": "Digits", "individual_digits": True}, _byte_level(True)),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
}


def tokenizer_json(
    path: Path, tokens: Sequence[str], merges: Sequence[str], added: Mapping[int, bool], pre: str, bos_id: Optional[int]
) -> Dict[str, Any]:
    """tokenizer.json of a vocabulary. tokens: by id, in GPT-2's writing of bytes; merges: "a b", best first.

    added: ids of tokens that are matched whole in a text -> whether they are special. bos_id: the token that is put in front of
    every text, or None. Llama 3 takes a piece that is a token as it is, whatever the merges say (tiktoken does).
    """
    if pre not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS)
        raise errors.tokenizer_unfit(path, f"Its texts are cut the way that llama.cpp calls {pre!r}; known are {known}")
    if not tokens or len(set(tokens)) != len(tokens):
        raise errors.tokenizer_unreadable(path, f"of its {len(tokens)} tokens {len(set(tokens))} are different")
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


def _first(bos: str, bos_id: int) -> Dict[str, Any]:
    """Put <s>, or what it is called here, in front."""

    def words(*names: str) -> List[Dict[str, Any]]:
        found: List[Dict[str, Any]] = []
        for type_id, name in enumerate(names):
            found += [{"SpecialToken": {"id": bos, "type_id": type_id}}, {"Sequence": {"id": name, "type_id": type_id}}]
        return found

    special = {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}}
    return {"type": "TemplateProcessing", "single": words("A"), "pair": words("A", "B"), "special_tokens": special}


def tokenizer_config(special: Mapping[str, str], add_bos: bool) -> Dict[str, Any]:
    """tokenizer_config.json. special: bos_token, eos_token, ... -> its text."""
    return {
        "add_bos_token": add_bos,
        "add_eos_token": False,
        **special,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
