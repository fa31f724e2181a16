"""Finds calls of tools in a model's text while it comes, and gives them OpenAI's form.

The template decides how a model writes a call. Each known form has a parser:

    hermes  <tool_call>{"name": ..., "arguments": {...}}</tool_call>, several in a row       Hermes 2 and 3, Qwen 2.5
            and 3
    llama3  {"name": ..., "parameters": {...}} and nothing else, several with `;` between    Llama 3.1 to 3.3

A call is streamed while the model writes it: its name once that is known, then its arguments, unchanged. Text that only
looks like a call stays text.
"""

from __future__ import annotations

import json
import re
import uuid
from typing import Any, NamedTuple

Delta = dict[str, Any]

# If the name has not come after so much text, it is not a call
MAX_HEAD_CHARACTERS = 64 << 10
# Models are trained to write the name first; any other order is read when the call has ended
HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*"([^"\\]{1,256})"\s*,\s*"(?:arguments|parameters)"\s*:\s*')
# how the head of a call begins, and the same without spaces
CALL = '{"name": "'
BEGINS = CALL.replace(" ", "")
# parts of a grammar: any text, what begins like a call, and the spaces between an opening, a call and a closing
ANY, GAP = r"(.|\n)*", r"/[ \n]{0,2}/"
BEGINS_CALL = r'\s*\{\s*"name"\s*:\s*"'
# as in the engine's guides.py for a schema alone
JSON_OPTIONS = {
    "whitespace_flexible": False, "whitespace_pattern": None, "item_separator": ", ", "key_separator": ": ",
    "coerce_one_of": False, "lenient": False,
}  # fmt: skip
TURN = re.compile(r'["{}\[\]]')
STRING_END = re.compile(r'["\\]')


class Form(NamedTuple):
    """How a call is written: the text around it, and the name of its arguments."""

    opening: str
    closing: str
    arguments: str


FORMS = {"hermes": Form("<tool_call>", "</tool_call>", "arguments"), "llama3": Form("", "", "parameters")}


def form_of(template: str) -> str | None:
    """The form of calls that a chat template teaches, judged by its source; None: not a known form."""
    if "<tool_call>" in template and "<function=" not in template and "<arg_key>" not in template:
        return "hermes"
    if "tool_calls" in template and '"parameters": ' in template and '{"name": ' in template:
        return "llama3"
    return None


def beginning(form: str, name: str | None) -> str:
    """The text that the answer must begin with to be a call of this tool, or of any tool."""
    return FORMS[form].opening + CALL + ("" if name is None else f'{name}", "{FORMS[form].arguments}":')


def grammar(
    form: str, tools: list[tuple[str, dict[str, Any]]], begun: bool, most: int, content: dict[str, Any] | None = None
) -> str:
    """A grammar for answers that call these tools, (name, schema of the arguments) each, in llguidance's form of Lark.

    begun: the answer continues after `beginning(form, None)`, so it calls; else its text is free until it opens a call.
    most: 1 ends it with its first call, 0: any number. content:
    a schema of the text that it may write instead of a call; None: any text.
    """
    opening, closing, arguments = FORMS[form]
    # a line break may come last
    more = "" if most == 1 else f" more* {GAP}" if opening else " more*"
    rules = [
        "body: " + " | ".join(f"tool_{number}" for number in range(len(tools))),
        f"call: {GAP} {_lark(CALL)} body",
        f"more: {GAP} {_lark(opening)} call" if opening else "more: /; ?/ call",
        f"end: {_lark('}')} {GAP} {_lark(closing)}" if closing else f"end: {_lark('}')}",
    ]
    for number, (name, schema) in enumerate(tools):
        head = name + '", "' + arguments + '": '
        rules.append(f"tool_{number}: {_lark(head)} %json {_json(schema)} end")
    if begun:
        start = [f"start: body{more}"]
    elif content is not None:
        start = [f"start: {_lark(opening) if opening else ''} call{more} | content", f"content: %json {_json(content)}"]
    elif opening:
        # lazy: it ends as soon as the opening does, so no text holds one
        start = ["start: open call | TEXT" if most == 1 else "start: (open call)* TEXT", f"TEXT: /{ANY}/"]
        start.append(f"open[lazy]: /{ANY}{opening}/")
    else:
        start = [f"start: call{more} | TEXT", f"TEXT: /{ANY}/ & ~/{BEGINS_CALL}{ANY}/"]
    return "\n".join([*start, *rules])


def _lark(text: str) -> str:
    """A string of a grammar."""
    return json.dumps(text)


def _json(schema: dict[str, Any]) -> str:
    """A schema in a grammar, with the options of guides.py."""
    return json.dumps({**schema, "x-guidance": JSON_OPTIONS})


class Calls:
    """Separates the text and the calls of one answer.

    begun: the text that the answer had to begin with (`beginning`); most: after so many calls it is over, 0: never;
    reason: its finish_reason if there are calls.
    """

    def __init__(self, form: str, begun: str = "", most: int = 0, reason: str = "tool_calls") -> None:
        self.form, self.most, self.reason, self.forced = FORMS[form], most, reason, bool(begun)
        self.count, self.over = 0, False
        self._state = self._text if self.form.opening else self._start
        self._buffer, self._gap, self._depth, self._in_string = "", "", 0, False
        self._ready = self.push(begun) if begun else []

    def push(self, text: str) -> list[Delta]:
        """The deltas of a piece of the answer: {"content": ...} and {"tool_calls": [...]}."""
        self._buffer += text
        out, self._ready = getattr(self, "_ready", []), []
        while not self.over and self._state(out):
            pass
        return out

    def finish(self) -> list[Delta]:
        """What is left at the end of the answer."""
        out: list[Delta] = []
        if self.over:
            return out
        if self._state == self._head:
            self._whole(self._buffer, out)
        elif self._state in (self._text, self._start):
            self._say(self._buffer, out)
        elif self._state == self._raw:
            self._argue(self._buffer, out)
        self._buffer = ""
        return out

    # --- states: each takes what it can from the buffer, and says whether another state has work ---

    def _text(self, out: list[Delta]) -> bool:
        before, found, behind = self._buffer.partition(self.form.opening)
        if found:
            self._say(before.rstrip(), out)
            self._gap = before[len(before.rstrip()) :]
            self._buffer, self._state = behind, self._head
            return True
        # text that may begin an opening waits; the spaces before a call are not part of the answer
        end = len(self._buffer) - _held(self._buffer, self.form.opening)
        end = len(self._buffer[:end].rstrip())
        self._say(self._buffer[:end] if self.count == 0 or self._buffer[:end].strip() else "", out)
        self._buffer = self._buffer[end:]
        return False

    def _start(self, out: list[Delta]) -> bool:
        begun = self._buffer.lstrip()
        if begun:
            self._state = self._head if begun[0] == "{" else self._plain
        return bool(begun)

    def _plain(self, out: list[Delta]) -> bool:
        self._say(self._buffer, out)
        self._buffer = ""
        return False

    def _head(self, out: list[Delta]) -> bool:
        if (head := HEAD.match(self._buffer)) and (self.forced or self._buffer[head.end() : head.end() + 1] == "{"):
            self._call(head[1], out)
            self._buffer, self._state, self._depth, self._in_string = self._buffer[head.end() :], self._first, 0, False
            return True
        if self.form.closing and self.form.closing in self._buffer:
            whole, _, self._buffer = self._buffer.partition(self.form.closing)
            self._state = self._text
            self._whole(whole, out)
            return True
        begun = "".join(self._buffer[:64].split())
        unlike = not self.form.closing and not (begun.startswith(BEGINS) or BEGINS.startswith(begun))
        if unlike or len(self._buffer) > MAX_HEAD_CHARACTERS:
            self._say(self._gap + self.form.opening, out)
            self._state = self._plain
            return True
        return False

    def _first(self, out: list[Delta]) -> bool:
        """The arguments' first character: the start of an object, or else the forced call is not one."""
        self._buffer = self._buffer.lstrip()
        if self._buffer:
            self._state = self._value if self._buffer[0] == "{" else self._raw
        return bool(self._buffer)

    def _value(self, out: list[Delta]) -> bool:
        at, text = 0, self._buffer
        while at < len(text):
            found = (STRING_END if self._in_string else TURN).search(text, at)
            if found is None:
                break
            at = found.end()
            if found[0] == "\\":
                if at == len(text):  # the escaped character has not come yet
                    at -= 1
                    self._argue(text[:at], out)
                    self._buffer = text[at:]
                    return False
                at += 1
            elif found[0] == '"':
                self._in_string = not self._in_string
            else:
                self._depth += 1 if found[0] in "{[" else -1
                if self._depth == 0:
                    self._argue(text[:at], out)
                    self._buffer, self._state = text[at:], self._tail
                    self._ended()
                    return True
        self._argue(text, out)
        self._buffer = ""
        return False

    def _raw(self, out: list[Delta]) -> bool:
        before, found, behind = self._buffer.partition(self.form.closing or "\0")
        if found:
            self._argue(before, out)
            self._buffer, self._state = behind, self._text
            self._ended()
            return True
        end = len(before) - _held(before, self.form.closing)
        self._argue(before[:end], out)
        self._buffer = before[end:]
        return False

    def _tail(self, out: list[Delta]) -> bool:
        """After a call's arguments: its end, and perhaps another call."""
        if self.form.closing:
            _, found, behind = self._buffer.partition(self.form.closing)
            if found:
                self._buffer, self._state = behind, self._text
            else:
                self._buffer = self._buffer[-len(self.form.closing) :]
            return bool(found)
        self._buffer = self._buffer.lstrip(" \t\r\n};,")
        if self._buffer:
            self._state = self._head if self._buffer[0] == "{" else self._plain
        return bool(self._buffer)

    # --- deltas ---

    def _say(self, text: str, out: list[Delta]) -> None:
        if text:
            out.append({"content": text})

    def _call(self, name: str, out: list[Delta]) -> None:
        function = {"name": name, "arguments": ""}
        told = {"index": self.count, "id": "call_" + uuid.uuid4().hex[:24], "type": "function", "function": function}
        out.append({"tool_calls": [told]})
        self.count += 1

    def _argue(self, text: str, out: list[Delta]) -> None:
        if text:
            out.append({"tool_calls": [{"index": self.count - 1, "function": {"arguments": text}}]})

    def _whole(self, text: str, out: list[Delta]) -> None:
        """A call that was not streamed; or text that only looks like one and stays text."""
        try:
            call = json.loads(text)
            name, given = call["name"], call.get("arguments", call.get("parameters"))
            # only a call in tags may leave out its arguments: a JSON object alone is an ordinary answer
            given = {} if given is None and self.form.opening else given
            if not isinstance(name, str) or not isinstance(given, (dict, str)):
                raise ValueError
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            self._say(self._gap + self.form.opening + text, out)
            self._buffer = self.form.closing + self._buffer if self._state == self._text else self._buffer
            return
        self._call(name, out)
        self._argue(given if isinstance(given, str) else json.dumps(given, ensure_ascii=False), out)
        self._ended()

    def _ended(self) -> None:
        self.over = bool(self.most) and self.count >= self.most


def _held(text: str, word: str) -> int:
    """How many of a text's last characters may be the beginning of a word."""
    return next((n for n in range(min(len(word) - 1, len(text)), 0, -1) if text.endswith(word[:n])), 0)


def joined(deltas: list[Delta]) -> tuple[str, list[dict[str, Any]]]:
    """All deltas of an answer as its text and its calls."""
    text: list[str] = []
    calls: dict[int, Any] = {}
    for delta in deltas:
        text.append(delta.get("content", ""))
        for told in delta.get("tool_calls", ()):
            call = calls.setdefault(told["index"], {"id": told.get("id"), "type": "function", "function": {}})
            function = call["function"]
            function.setdefault("name", told["function"].get("name"))
            function.setdefault("arguments", [])
            function["arguments"].append(told["function"]["arguments"])
    for call in calls.values():
        call["function"]["arguments"] = "".join(call["function"]["arguments"])
    return "".join(text), list(calls.values())
