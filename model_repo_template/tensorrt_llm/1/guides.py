"""Answers that a grammar guides: which tokens may come next, computed beside the step by the package llguidance.

A guide's type and text are those of TensorRT-LLM's inputs guided_decoding_guide_type and guided_decoding_guide: json
(any object), json_schema, regex, ebnf_grammar (here: Lark's). The endpoint's readers check a guide with `why_not`
before it comes here; this module imports no PyTorch, so that they can.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import llguidance
import numpy as np
from numpy.typing import NDArray

log = logging.getLogger("torch engine")

TYPES = ("json", "json_schema", "regex", "ebnf_grammar")
MAX_GUIDE_BYTES = 64 << 10
# so many threads compute a step's masks; llguidance releases the interpreter's lock meanwhile
THREADS = 2
TRIED_BYTES = 64
# What a grammar may cost at its start, and per token: about a tenth of llguidance's own limits
LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 200_000,
    "step_lexer_fuel": 50_000,
    "step_max_items": 20_000,
    "max_lexer_states": 50_000,
}

# Only the spaces that Python's json writes: a small model fills its answer with line breaks if they are allowed
SPACES: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def limits() -> Any:
    """What one grammar may cost."""
    return llguidance.LLParserLimits(**LIMITS)


def grammar_of(kind: str, text: str) -> str:
    """llguidance's form of a guide. Raises ValueError if it has none."""
    matcher = llguidance.LLMatcher
    if kind == "json":
        return str(matcher.grammar_from_json_schema('{"type": "object"}', overrides=SPACES))
    if kind == "json_schema":
        # the schema that is true allows any value, as the empty one does
        text = "{}" if text.strip() == "true" else text
        return str(matcher.grammar_from_json_schema(text, overrides=SPACES))
    if kind == "regex":
        return str(matcher.grammar_from_regex(text))
    if kind == "ebnf_grammar":
        return str(matcher.grammar_from_lark(text))
    raise ValueError(f"guided_decoding_guide_type is {kind[:40]!r}; it must be one of {', '.join(TYPES)}")


def why_not(kind: str, text: str) -> str | None:
    """Why a guide cannot be used; None when it can."""
    if (size := len(text.encode())) > MAX_GUIDE_BYTES:
        return f"it has {size} bytes; at most {MAX_GUIDE_BYTES} are taken"
    try:
        said = str(llguidance.LLMatcher.validate_grammar(grammar_of(kind, text), None, limits=limits()))
    except ValueError as problem:
        said = str(problem)
    if not said or said.startswith("WARNING"):  # warnings are about what JSON Schema leaves open
        said = tried(grammar_of(kind, text))
    return " ".join(said.split())[:300] or None


def tried(grammar: str) -> str:
    """Takes an answer's first bytes, each time the first one that may follow; returns what goes wrong, or an empty
    text.

    A grammar whose first steps cost more than `limits` fails here and not in the engine.
    """
    matcher = llguidance.LLMatcher(llguidance.LLTokenizer("byte"), grammar, log_level=0, limits=limits())
    for _ in range(TRIED_BYTES):
        if matcher.is_error() or matcher.is_stopped():
            break
        allowed = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8), bitorder="little")[:256]
        if not allowed.any() or not matcher.consume_token(int(allowed.argmax())):
            break
    return str(matcher.get_error()).partition("<state>")[0] if matcher.is_error() else ""


class Guides:
    """Makes guides for one tokenizer. tokenizer: a folder with tokenizer.json, which is read for the first guide."""

    def __init__(self, tokenizer: Path, vocab_size: int) -> None:
        self._folder, self.vocab_size = tokenizer, vocab_size
        self.pool = ThreadPoolExecutor(THREADS, thread_name_prefix="guides")
        self._tokenizer: Future[Any] | None = None

    def tokenizer(self) -> Any:
        """llguidance's view of the vocabulary. Threads of the pool call this."""
        assert self._tokenizer is not None
        return self._tokenizer.result()

    def guide(self, kind: str, text: str, end_ids: Sequence[int]) -> Guide:
        """The guide of one answer. It returns at once; the pool does the work."""
        if self._tokenizer is None:
            path = str(self._folder / "tokenizer.json")
            self._tokenizer = self.pool.submit(llguidance.LLTokenizer, path, n_vocab=self.vocab_size)
        return Guide(self, kind, text, end_ids)


class Guide:
    """One answer's place in its grammar. The engine's thread calls `ahead` when a step begins, and `allowed` when its
    logits are there."""

    def __init__(self, guides: Guides, kind: str, text: str, end_ids: Sequence[int]) -> None:
        self._guides, self._taken = guides, 0
        self._end_ids = [token for token in end_ids if 0 <= token < guides.vocab_size]
        self._matcher: Future[Any] = guides.pool.submit(self._start, kind, text)
        self._mask: Future[NDArray[np.bool_]] | None = None

    def ahead(self, tokens: Sequence[int]) -> None:
        """Begin to look for what may follow the answer's tokens; there are more of them at each call."""
        new, self._taken = list(tokens[self._taken :]), len(tokens)
        self._mask = self._guides.pool.submit(self._next, new)

    def allowed(self) -> NDArray[np.bool_]:
        """Which tokens may follow, bool (vocab_size,); none if the grammar costs too much."""
        assert self._mask is not None
        return self._mask.result()

    def _start(self, kind: str, text: str) -> Any:
        return llguidance.LLMatcher(self._guides.tokenizer(), grammar_of(kind, text), log_level=0, limits=limits())

    def _next(self, new: list[int]) -> NDArray[np.bool_]:
        matcher = self._matcher.result()
        if not (matcher.consume_tokens(new) if new else not matcher.is_error()):
            log.warning("a guide failed: %s", json.dumps(matcher.get_error()[:200]))
            return np.zeros(self._guides.vocab_size, dtype=np.bool_)
        packed = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
        allowed = np.unpackbits(packed, bitorder="little")[: self._guides.vocab_size].astype(np.bool_)
        # the request says which tokens end the answer, whatever the tokenizer's own end is
        allowed[self._end_ids] = matcher.is_accepting()
        return allowed
