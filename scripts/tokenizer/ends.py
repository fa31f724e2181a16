"""Which tokens end an answer. The room config decides it once and keeps the list in generation_config.json.

The engines, Triton's text models and the endpoint read that list and no other file. Every answer ends at the first of
these tokens, as with transformers' `generate`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts import reports


def ids_of(value: Any, name: str, path: Path) -> list[int]:
    """eos_token_id of a file: a number, a list of numbers, or nothing. A Problem for anything else."""
    listed = value if isinstance(value, list) else [] if value is None else [value]
    if any(type(token) is not int for token in listed):
        raise reports.weights.weights_contradict(
            path, name, "it must be a token id, a list of token ids, or null", f"it is {value!r}"
        )
    return listed


def end_ids(said: Sequence[tuple[Path, Any]], own: Sequence[int | None], vocab_size: int) -> list[int]:
    """Every token that the model names as an end, in the order of the files, each once.

    said: (a file, its eos_token_id); own: the end tokens of the tokenizer itself.
    An id outside the vocabulary is dropped.
    """
    found = [token for path, value in said for token in ids_of(value, "eos_token_id", path)]
    found += [token for token in own if token is not None]
    return [token for token in dict.fromkeys(found) if 0 <= token < vocab_size]


def generation_config(values: Mapping[str, Any], ends: Sequence[int], bos_id: int | None) -> dict[str, Any]:
    """generation_config.json with the list in it; a single end is written as a number, as transformers does."""
    named = {"eos_token_id": ends[0] if len(ends) == 1 else list(ends)} if ends else {}
    return {**({} if bos_id is None else {"bos_token_id": bos_id}), **values, **named}
