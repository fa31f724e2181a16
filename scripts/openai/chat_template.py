"""Chat: a conversation becomes token ids by the model's own template, rendered by Jinja in a sandbox.

Only the template makes special tokens. A special token that is spelt out in a message is plain text, also if the
message and the template's own text spell it together.
"""

from __future__ import annotations

import datetime
import json
import re
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, meta
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

# A template comes with a model, from outside: its output may be at most many times as long as the messages.
MAX_OUTPUT_CHARACTERS = 32 << 20
MAX_TEMPLATE_CHARACTERS = 1 << 20
MAX_SECONDS = 2.0


# what templates call the parts of tools and calls
NAMES = frozenset(
    [
        "arguments",
        "description",
        "enum",
        "function",
        "id",
        "items",
        "name",
        "parameters",
        "properties",
        "required",
        "type",
    ]
)


class Refused(ValueError):
    """A conversation that the template does not take; the text goes to the client."""


def template_of(folder: Path) -> str | None:
    """The template of a tokenizer folder; None if it has none (a base model).

    As in transformers: chat_template.jinja comes before tokenizer_config.json,
    and of several templates `default` is used.
    """
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def environment() -> ImmutableSandboxedEnvironment:
    """Jinja as transformers sets it up for chat templates (utils/chat_template_utils.py),
    without what tools and images need."""

    def raise_exception(message: str) -> NoReturn:
        raise Refused(str(message))

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    jinja = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    jinja.filters["tojson"] = tojson
    jinja.globals["raise_exception"] = raise_exception
    jinja.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return jinja


class ChatTemplate:
    """A template and the tokenizer that it writes for.

    text: model_repo/tensorrt_llm_bls/1/text.py's Text of the same folder.
    """

    def __init__(self, template: str, folder: Path, text: Any) -> None:
        if len(template) > MAX_TEMPLATE_CHARACTERS:
            raise ValueError(
                f"the chat template has {len(template)} characters; at most {MAX_TEMPLATE_CHARACTERS} are taken"
            )
        self.source, self.text = template, text
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        described = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        added = [token for token in described.get("added_tokens") or [] if token.get("special")]
        self.special: dict[str, int] = {token["content"]: token["id"] for token in added}
        # bos_token and so on, under the names that templates use
        self.names = {
            name: _content(value) for name, value in config.items() if name.endswith("_token") and _content(value)
        }
        # the longest first, as the tokenizers package finds them; lstrip and rstrip remove the spaces beside a token
        spelt = sorted(added, key=lambda token: -len(token["content"]))
        self.swallows_before = {token["content"] for token in added if token.get("lstrip")}
        self.swallows_behind = {token["content"] for token in added if token.get("rstrip")}
        self.spelling = re.compile("|".join(re.escape(token["content"]) for token in spelt) or r"(?!)")
        self.continues = self._space_only_at_the_start(described)

    @cached_property
    def template(self) -> Template:
        """It is compiled when it is first used, where its work is bounded:
        Jinja computes constants while it compiles."""
        return environment().from_string(self.source)

    @cached_property
    def knows_tools(self) -> bool:
        """Whether the template writes what tools there are."""
        try:
            with deadline(MAX_SECONDS):
                return "tools" in meta.find_undeclared_variables(environment().parse(self.source))
        except (TemplateError, Refused, RecursionError):
            return False

    @property
    def knows_results(self) -> bool:
        """Whether the template writes results of calls: turns of the role tool."""
        return any(word in self.source for word in ("'tool'", '"tool"', "'tool_response'", '"tool_response"'))

    def _space_only_at_the_start(self, described: Mapping[str, Any]) -> bool:
        """Whether text after a special token is tokenized without the space that SentencePiece writes before a text.

        Llama 2's rule is that every stretch between special tokens gets one; that of later tokenizers (Metaspace,
        prepend_scheme `first`) that only the start of everything does.
        """
        if not self.special:
            return False
        whole = Tokenizer.from_str(json.dumps({**described, "padding": None, "truncation": None}))
        spelt, token_id = next(iter(self.special.items()))
        ids = whole.encode(f"{spelt}x", add_special_tokens=False).ids
        [alone] = self.text.encode(["x"], add_special_tokens=False)
        return bool(ids != [token_id, *alone])

    def render(self, messages: Sequence[Mapping[str, Any]], more: Mapping[str, Any] = {}) -> str:
        """The conversation as text, special tokens spelt out. Raises Refused if the template says so or fails."""
        try:
            pieces, size = [], 0
            with deadline(MAX_SECONDS):
                for piece in self.template.generate(
                    {"add_generation_prompt": True, **self.names, **more, "messages": list(messages)}
                ):
                    size += len(piece)
                    if size > MAX_OUTPUT_CHARACTERS:
                        raise Refused(f"the chat template wrote more than {MAX_OUTPUT_CHARACTERS} characters")
                    pieces.append(piece)
            return "".join(pieces)
        except Refused:
            raise
        except (
            TemplateError,
            ArithmeticError,
            TypeError,
            ValueError,
            LookupError,
            AttributeError,
            RecursionError,
            MemoryError,
        ) as error:
            raise Refused(f"the model's chat template does not take these messages: {error}") from None

    def token_ids(
        self, messages: Sequence[Mapping[str, Any]], begun: str = "", more: Mapping[str, Any] = {}
    ) -> list[int]:
        """The conversation as token ids, up to where the answer begins, and what it begins with.

        messages: turns in the form that templates read: texts, tool_calls; begun: the answer's first text, which we
        give; more: other names for the template (tools, a client's chat_template_kwargs).
        """
        mark = _unused([self.source, *self.names.values(), *texts_of(list(messages)), *texts_of(dict(more))])
        # a template that writes JSON may escape the mark, as json.dumps does by default
        escaped = json.dumps(mark)[1:-1]
        masked = [
            {key: value if key == "role" else self._masked_all(value, mark) for key, value in m.items()}
            for m in messages
        ]
        rendered = self.render(masked, {name: self._masked_all(value, mark) for name, value in more.items()}) + begun
        stretches, specials, at = [], [], 0
        for match in self.spelling.finditer(rendered):
            before = rendered[at : match.start()]
            stretches.append(before.rstrip() if match[0] in self.swallows_before else before)
            specials.append(self.special[match[0]])
            at = match.end()
            while match[0] in self.swallows_behind and rendered[at : at + 1].isspace():
                at += 1
        stretches = [stretch.replace(mark, "").replace(escaped, "") for stretch in (*stretches, rendered[at:])]
        encoded = iter(self._encoded([stretch for stretch in stretches if stretch], starts=bool(stretches[0])))
        ids: list[int] = []
        for n, stretch in enumerate(stretches):
            ids += next(encoded) if stretch else []
            ids += specials[n : n + 1]
        return ids

    def _encoded(self, stretches: Sequence[str], starts: bool) -> list[list[int]]:
        """Token ids of stretches of plain text; starts: whether the first of them is the start of everything."""
        if not self.continues:
            return list(self.text.encode(stretches, add_special_tokens=False))
        # after a line break there is no space either: tokenize one line break more and remove it again
        [line] = self.text.encode(["\n"], add_special_tokens=False)
        first = [stretches[0]] if starts and stretches else []
        later = self.text.encode(["\n" + stretch for stretch in stretches[len(first) :]], add_special_tokens=False)
        return [*self.text.encode(first, add_special_tokens=False), *(ids[len(line) :] for ids in later)]

    def _masked_all(self, value: Any, mark: str) -> Any:
        """The same of every text in a value of JSON. Names that templates look for stay as they are."""
        if isinstance(value, str):
            return self._masked(value, mark)
        if isinstance(value, dict):
            return {
                key if key in NAMES else self._masked(key, mark): self._masked_all(one, mark)
                for key, one in value.items()
            }
        return [self._masked_all(one, mark) for one in value] if isinstance(value, list) else value

    def _masked(self, value: str, mark: str) -> str:
        """A message's text with a mark inside everything that spells a special token,
        alone or together with text before or after it.

        Nothing else changes, so that a template which looks into a message (for `</think>`,
        for its end) sees what is there.
        """
        value = self.spelling.sub(lambda match: match[0][0] + mark + match[0][1:], value)
        end, start = value.rstrip(), len(value) - len(value.lstrip())
        head, tail = 0, 0
        for token in self.special:
            head = max(head, next((n for n in range(len(token) - 1, 0, -1) if value.startswith(token[-n:], start)), 0))
            tail = max(tail, next((n for n in range(len(token) - 1, 0, -1) if end.endswith(token[:n])), 0))
        if tail:
            value = end[: len(end) - tail + 1] + mark + end[len(end) - tail + 1 :] + value[len(end) :]
        if head:
            value = value[: start + head - 1] + mark + value[start + head - 1 :]
        return value


def texts_of(value: Any) -> Iterator[str]:
    """Every text in a value of JSON, names of objects too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, one in value.items():
            yield key
            yield from texts_of(one)
    elif isinstance(value, list):
        for one in value:
            yield from texts_of(one)


def _content(token: object) -> str:
    """A special token of tokenizer_config.json, written as a string or as an object with `content`."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else ""


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Ends Python code that uses the CPU for longer, with Refused: Jinja's loops are Python's.

    Only the process's own bound ends a long operation in C (reader.py). A timer's signal reaches only the main thread;
    another thread has no bound.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def late(number: int, frame: Any) -> NoReturn:
        raise Refused(f"the chat template took longer than {seconds:g} s")

    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def _unused(texts: Sequence[str]) -> str:
    """A private-use character that occurs in none of the texts. Raises Refused if they have every one."""
    used = set().union(*map(set, texts))
    for first, last in ((0xF0000, 0x10FFFD), (0xE000, 0xF8FF)):
        for code in range(last, first - 1, -1):
            if chr(code) not in used:
                return chr(code)
    raise Refused("the messages use every private-use character, and one is needed to tell text from special tokens")
