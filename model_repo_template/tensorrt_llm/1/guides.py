"""Answers that a grammar guides: which tokens may come next, computed beside the step by the package llguidance.

A guide's type and text are those of TensorRT-LLM's inputs guided_decoding_guide_type and guided_decoding_guide: json
(any object), json_schema, regex, ebnf_grammar (here: Lark's). The endpoint's readers check a guide with `why_not`
before it comes here; this module imports no PyTorch, so that they can.
"""

from __future__ import annotations

import functools
import json
import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import llguidance
import numpy as np
from numpy.typing import NDArray

log = logging.getLogger("torch engine")

TYPES = ("json", "json_schema", "regex", "ebnf_grammar")
MAX_GUIDE_BYTES = 64 << 10
# so many threads compute a step's masks; llguidance releases the interpreter's lock meanwhile. Two cost more CPU together
THREADS = 1 if len(os.sched_getaffinity(0)) < 4 else 2
# compiled grammars and checked guides that are remembered: clients ask with the same schema again and again
KEPT = 64
TRIED_BYTES = 64
# llguidance's own words for it are the name of an enumeration's value
UNFOLLOWABLE = "no answer can follow it"
# What a grammar may cost at its start, and per token: about a tenth of llguidance's own limits
LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 200_000,
    "step_lexer_fuel": 50_000,
    "step_max_items": 20_000,
    "max_lexer_states": 50_000,
}

# Only the spaces that Python's json writes: a small model fills its answer with line breaks if they are allowed. A schema's own
# `x-guidance` cannot ask that what llguidance does not know is left out of it.
JSON_OPTIONS: Any = {
    "whitespace_flexible": False, "whitespace_pattern": None, "item_separator": ", ", "key_separator": ": ",
    "coerce_one_of": False, "lenient": False,
}  # fmt: skip


def limits() -> Any:
    """What one grammar may cost."""
    return llguidance.LLParserLimits(**LIMITS)


def grammar_of(kind: str, text: str) -> str:
    """llguidance's form of a guide. Raises ValueError if it has none."""
    matcher = llguidance.LLMatcher
    if kind == "json":
        return str(matcher.grammar_from_json_schema('{"type": "object"}', overrides=JSON_OPTIONS))
    if kind == "json_schema":
        # the schema that is true allows any value, as the empty one does
        text = "{}" if text.strip() == "true" else text
        return str(matcher.grammar_from_json_schema(text, overrides=JSON_OPTIONS))
    if kind == "regex":
        return str(matcher.grammar_from_regex(text))
    if kind == "ebnf_grammar":
        return str(matcher.grammar_from_lark(text))
    raise ValueError(f"guided_decoding_guide_type is {kind[:40]!r}; it must be one of {', '.join(TYPES)}")


@functools.lru_cache(KEPT)
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
    said = str(matcher.get_error()).partition("<state>")[0] if matcher.is_error() else ""
    return UNFOLLOWABLE if "NoExtension" in said else said


def without_spellings(folder: Path) -> tuple[str, int | None]:
    """A tokenizer.json in which no text spells a special token, and the id of one of them, the end's if it is named.

    llguidance tokenizes the text that a grammar leaves no choice about. If that text is `</s>`, it is these four characters.
    """
    described = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    special = {token["content"]: token["id"] for token in described.get("added_tokens") or [] if token.get("special")}
    named = {content: f"\U0010fffd{token_id}" for content, token_id in special.items()}
    for token in described.get("added_tokens") or []:
        token["content"] = named.get(token["content"], token["content"])
    model = described["model"]
    if isinstance(model.get("vocab"), dict):
        model["vocab"] = {named.get(piece, piece): token_id for piece, token_id in model["vocab"].items()}
    if model.get("unk_token") in named:
        model["unk_token"] = named[model["unk_token"]]
    config = folder / "tokenizer_config.json"
    end = json.loads(config.read_text(encoding="utf-8")).get("eos_token") if config.is_file() else None
    end = end.get("content") if isinstance(end, dict) else end
    return json.dumps(described), special.get(end, next(iter(special.values()), None))


class Guides:
    """Makes guides for one tokenizer, and the masks of all answers of a step together, in a thread beside the step.

    tokenizer: a folder with tokenizer.json; it is read when the first guide comes.
    """

    def __init__(self, tokenizer: Path, vocab_size: int) -> None:
        self._folder, self.vocab_size = tokenizer, vocab_size
        # what is new is made ready here, and what runs does not wait for it
        self._starting = ThreadPoolExecutor(1, thread_name_prefix="guides")
        self._masking = ThreadPoolExecutor(1, thread_name_prefix="masks")
        self._executor: Any = None
        self._tokenizer: Any = None
        self._end: int | None = None
        # compiled grammars, the latest last; a copy of one costs nothing
        self._known: dict[tuple[str, str], Any] = {}

    def guide(self, kind: str, text: str, end_ids: Sequence[int]) -> Guide:
        """The guide of one answer. It returns at once; a thread does the work."""
        ends = [token for token in end_ids if 0 <= token < self.vocab_size]
        return Guide(self, self._starting.submit(self._start, kind, text), ends)

    def _start(self, kind: str, text: str) -> Any:
        if self._tokenizer is None:
            described, self._end = without_spellings(self._folder)
            self._tokenizer = llguidance.LLTokenizer(described, n_vocab=self.vocab_size, eos_token=self._end)
            self._executor = llguidance.LLExecutor(num_threads=THREADS)
        made = self._known.pop((kind, text), None)
        if made is None:
            made = llguidance.LLMatcher(self._tokenizer, grammar_of(kind, text), log_level=0, limits=limits())
        self._known[kind, text] = made
        if len(self._known) > KEPT:
            self._known.pop(next(iter(self._known)))
        return made.deep_copy()

    def ahead(self, answers: Sequence[tuple[Guide, Sequence[int]]]) -> None:
        """Begin to look for the tokens that may follow each answer; answers have more tokens at each call.
        `Guide.allowed` waits for it."""
        news = []
        for row, (guide, tokens) in enumerate(answers):
            news.append((guide, list(tokens[guide.taken :])))
            guide.taken, guide.row = len(tokens), row
        masks = self._masking.submit(self._masks, news)
        for guide, _ in answers:
            guide.masks = masks

    def _masks(self, news: Sequence[tuple[Guide, list[int]]]) -> NDArray[np.uint32]:
        """What may follow: a bit per token, the lowest first, (answers, vocab_size / 32 rounded up)."""
        matchers = [guide.matcher.result() for guide, _ in news]
        # what failed before stays so
        alive = [matcher.consume_tokens(new) if new else not matcher.is_error()
                 for matcher, (_, new) in zip(matchers, news)]  # fmt: skip
        words = -(-self.vocab_size // 32)
        bits = np.zeros((len(news), words), dtype=np.uint32)
        if running := [(matcher, row) for row, matcher in enumerate(matchers) if alive[row]]:
            try:
                self._executor.unsafe_compute_mask_ptr(running, bits.ctypes.data, 4 * words, len(news))
            except ValueError as problem:  # a single matcher raises; several keep their errors
                log.warning("a mask failed: %s", json.dumps(str(problem)[:200]))
        for row, (matcher, (guide, _)) in enumerate(zip(matchers, news)):
            if matcher.is_error():
                log.warning("a guide failed: %s", json.dumps(matcher.get_error()[:200]))
                bits[row] = 0
            # the request says which tokens end it, whatever the tokenizer's own is
            elif guide.end_ids != [self._end]:
                for token, may in [(self._end, False), *((end, matcher.is_accepting()) for end in guide.end_ids)]:
                    if token is not None:
                        bit = np.uint32(1 << token % 32)
                        bits[row, token // 32] = bits[row, token // 32] | bit if may else bits[row, token // 32] & ~bit
        return bits


class Guide:
    """One answer's place in its grammar. taken: so many of its tokens are known here; row: its place in `masks`."""

    def __init__(self, guides: Guides, matcher: Future[Any], end_ids: Sequence[int]) -> None:
        self.guides, self.matcher, self.end_ids = guides, matcher, list(end_ids)
        self.taken = self.row = 0
        self.masks: Future[NDArray[np.uint32]] | None = None

    @property
    def ready(self) -> bool:
        """Its grammar is compiled."""
        return self.matcher.done()

    def when_ready(self, call: Callable[[], None]) -> None:
        """Call this when it is ready, from another thread, or at once."""
        self.matcher.add_done_callback(lambda _: call())

    def allowed(self, guides: Sequence[Guide]) -> NDArray[np.uint32]:
        """What may follow in answers of one step, a bit per token (guides, vocab_size / 32 rounded up), the lowest bit
        first: nothing if a grammar costs too much."""
        assert self.masks is not None
        masks, rows = self.masks.result(), [guide.row for guide in guides]
        return masks if rows == list(range(len(masks))) else masks[rows]
