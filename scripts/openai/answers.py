"""An answer on its way: token ids become text, cut at stop strings, with OpenAI's data for each token;
whole or as chunks."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from scripts.openai.tools import Calls, joined

Entry = dict[str, Any]


class Choice:
    """One alternative. It does not know HTTP.

    stream: engine.Stream, or anything that has its ids, log_probs, ended and failure; text: text.py's Text; stops:
    a StopStrings of it.
    """

    def __init__(
        self, index: int, stream: Any, text: Any, stops: Any, max_tokens: int, end_ids: Iterable[int] = ()
    ) -> None:
        self.index, self.stream, self.text, self.stops = index, stream, text, stops
        self.max_tokens, self.end_ids = max_tokens, frozenset(end_ids)
        self.detokenizer = text.stream()
        self.n_tokens, self.n_shown = 0, 0
        self.finish_reason: str | None = None
        self.starts_with_space = False
        self.prefix = ""
        # the prefix's tokens, if they are reported: with its text, once the engine has sent their log probabilities
        self.echoed: list[int] = []
        self.begins = 0
        # if the answer may call tools
        self.calls: Calls | None = None
        # the sum of its tokens' log probabilities, if requested
        self.log_prob = 0.0
        # tokens whose text is not shown yet: (where it begins in the answer, token id, log probability)
        self.untold: list[Any] = []
        self.decoded = 0

    def take(self, most: int | None = None) -> Part:
        """Take what is new, at most so many tokens; afterwards finish_reason is set if the answer is over."""
        stream = self.stream
        ids, log_probs, ended = stream.ids, stream.log_probs, stream.ended
        if most is not None and len(ids) > most:
            ids, stream.ids, ended = ids[:most], ids[most:], False
            log_probs, stream.log_probs = log_probs[:most], log_probs[most:]
        else:
            stream.ids, stream.log_probs = [], []
        if self.finish_reason is not None:
            return Part("", [])
        # an end that is a stop word comes with the answer, end_id does not; neither is part of the text
        end = next((n for n, token in enumerate(ids) if token in self.end_ids), None)
        ids, log_probs, reached_end = ids[:end], log_probs[:end], end is not None
        if not self.max_tokens:  # the engine makes at least one
            ids, log_probs, reached_end = [], [], False
        self.n_tokens += len(ids)
        self.log_prob += sum(log_probs)
        shown, stopped = self.stops.push(self._decoded(ids, log_probs))
        if stopped:
            self.finish_reason = "stop"
            stream.cancel()
        elif ended and stream.failure is None:
            self.finish_reason = "length" if self.n_tokens >= self.max_tokens and not reached_end else "stop"
            rest, stopped = self.stops.push(self.detokenizer.finish())
            shown += rest if stopped else rest + self.stops.finish()
            self.finish_reason = "stop" if stopped else self.finish_reason
        self.n_shown += len(shown)
        told = [one for one in self.untold if one[0] < self.n_shown or (self.finish_reason and not stopped)]
        self.untold = [] if self.finish_reason else self.untold[len(told) :]
        if self.starts_with_space and shown:
            # for the spaces that SentencePiece's decoder removes
            shown, self.starts_with_space = shown[1:] if shown[0] == " " else shown, False
        prefix, self.prefix = self.prefix, ""
        if self.echoed:
            told = [(self.begins + offset, token, log_prob) for offset, token, log_prob in told]
            told = self._of_prompt(prefix) + told if prefix else told
        if self.calls is not None:
            return Part(shown, told, self._called(self.calls, shown))
        return Part(prefix + shown, told)

    def _of_prompt(self, prompt: str) -> list[Any]:
        """The prompt's tokens, in the form of the answer's; the first one has no log probability (None)."""
        stream, told, at = self.text.stream(), [], 0
        for token, log_prob in zip(self.echoed, [None, *self.stream.prompt_log_probs]):
            told.append((at, token, log_prob))
            at += len(stream.push([token]))
        # for a space that SentencePiece puts in front and the prompt does not have
        added = max(0, at + len(stream.finish()) - len(prompt))
        return [(min(max(0, offset - added), len(prompt)), token, log_prob) for offset, token, log_prob in told]

    def _called(self, calls: Calls, shown: str) -> list[Entry]:
        """The deltas of what is new. The answer is over after the last call that it may have."""
        deltas = calls.push(shown)
        if calls.over and self.finish_reason is None:
            self.finish_reason = "stop"
            self.stream.cancel()
        if self.finish_reason is not None:
            deltas += calls.finish()
            if calls.count and self.finish_reason == "stop":
                self.finish_reason = calls.reason
        return deltas

    def _decoded(self, ids: Sequence[int], log_probs: Sequence[float]) -> str:
        if not log_probs:
            return self.detokenizer.push(ids)  # type: ignore[no-any-return]
        pieces = []
        for token, log_prob in zip(ids, log_probs):
            self.untold.append((self.decoded, token, log_prob))
            pieces.append(self.detokenizer.push([token]))
            self.decoded += len(pieces[-1])
        return "".join(pieces)


@dataclass
class Part:
    """Text that can be sent now, and its tokens, if they are requested."""

    text: str
    tokens: list[Any]
    # separates text from calls, if there may be calls
    deltas: list[Entry] | None = None


@dataclass
class Job:
    """One request to the endpoint: all its alternatives."""

    model: str
    chat: bool
    choices: list[Choice]
    prompt_tokens: int
    logprobs: bool = False
    include_usage: bool = False
    # how many of a prompt's answers are sent, the likeliest ones; 0: all (best_of)
    n: int = 1
    keep: int = 0
    # set when there is something to take, or when the client has left
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    left: bool = False
    created: int = field(default_factory=lambda: int(time.time()))
    id: str = ""

    def __post_init__(self) -> None:
        self.id = ("chatcmpl-" if self.chat else "cmpl-") + uuid.uuid4().hex
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        self._head = ("data: " + _json(head)[:-1] + ',"choices":[').encode()
        self._usage = b',"usage":null' if self.include_usage else b""
        # what is before and after the text in the event of a token that has nothing but text
        self._before = b',"delta":{"content":' if self.chat else b',"text":'
        after = b"}" if self.chat else b""
        self._after = after + b',"logprobs":null,"finish_reason":null}]' + self._usage + b"}\n\n"

    @property
    def failure(self) -> Any:
        return next((choice.stream.failure for choice in self.choices if choice.stream.failure is not None), None)

    @property
    def done(self) -> bool:
        return all(choice.finish_reason is not None for choice in self.choices)

    def cancel(self) -> None:
        for choice in self.choices:
            choice.stream.cancel()

    def usage(self) -> dict[str, int]:
        n = sum(choice.n_tokens for choice in self.choices)
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": n, "total_tokens": self.prompt_tokens + n}

    # --- streamed ---

    def opening(self) -> bytes:
        """The chunk with the role, before the first token; only in chat."""
        if not self.chat:
            return b""
        role = {"role": "assistant", "content": "", "refusal": None}
        return b"".join(
            self._event({"index": c.index, "delta": role, "logprobs": None, "finish_reason": None})
            for c in self.choices
        )

    def events(self) -> bytes:
        """Server-sent events for everything that is new. Events are complete, so no character is ever split."""
        out: list[bytes] = []
        for choice in self.choices:
            shown = choice.prefix and not choice.echoed
            if choice.finish_reason is not None or not (choice.stream.ids or choice.stream.ended or shown):
                continue
            # tokens that arrived together are their own events, in one write
            self._plain(choice, out)
            if not choice.stream.ids and not choice.stream.ended:
                continue
            for _ in range(max(1, len(choice.stream.ids))):
                self._told_of(choice, choice.take(1), out)
                if choice.finish_reason is not None:
                    break
        return b"".join(out)

    def _plain(self, choice: Choice, out: list[bytes]) -> None:
        """The events of tokens that are only text, as nearly all are. The last token is not:
        it may say how the answer ends."""
        stream = choice.stream
        if self.logprobs or choice.prefix or choice.starts_with_space or choice.stops.stops or choice.calls:
            return
        ids, stream.ids = stream.ids, []
        if stream.ended and ids:
            stream.ids = [ids.pop()]
        choice.n_tokens += len(ids)
        for token in ids:
            if text := choice.detokenizer.push((token,)):
                choice.n_shown += len(text)
                out.append(
                    b'%s{"index":%d%s%s%s' % (self._head, choice.index, self._before, _text(text).encode(), self._after)
                )

    def _told_of(self, choice: Choice, part: Part, out: list[bytes]) -> None:
        """The events for what was taken from one alternative."""
        if part.deltas is not None:
            tokens = part.tokens
            for delta in part.deltas or ([{"content": ""}] if tokens else []):
                out.append(self._event(self._delta(choice, delta, tokens, None)))
                tokens = []
        elif part.text and not part.tokens and not self.logprobs and (self.chat or choice.finish_reason is None):
            # the usual case
            text = _text(part.text).encode()
            out.append(b'%s{"index":%d%s%s%s' % (self._head, choice.index, self._before, text, self._after))
        elif self.chat and (part.text or part.tokens):
            out.append(self._event(self._delta(choice, {"content": part.text}, part.tokens, None)))
        elif not self.chat and (part.text or part.tokens or choice.finish_reason is not None):
            logprobs = self._legacy(choice, part.tokens) if self.logprobs else None
            shown = {"index": choice.index, "text": part.text, "logprobs": logprobs}
            out.append(self._event({**shown, "finish_reason": choice.finish_reason}))
        if self.chat and choice.finish_reason is not None:
            out.append(self._event(self._delta(choice, {}, [], choice.finish_reason)))

    def closing(self) -> bytes:
        usage = b""
        if self.include_usage:
            usage = self._head + b'],"usage":' + _json(self.usage()).encode() + b"}\n\n"
        return usage + b"data: [DONE]\n\n"

    def _event(self, choice: dict[str, Any]) -> bytes:
        return self._head + _json(choice).encode() + b"]" + self._usage + b"}\n\n"

    def _delta(self, choice: Choice, delta: dict[str, Any], tokens: list[Any], reason: str | None) -> dict[str, Any]:
        logprobs = self._told(choice, tokens) if self.logprobs and tokens else None
        return {"index": choice.index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    # --- whole ---

    def whole(self, parts: Sequence[list[Part]]) -> dict[str, Any]:
        """The answer in one piece; parts: all parts of each choice, in order."""
        choices: list[dict[str, Any]] = []
        told = self._best(list(zip(self.choices, parts))) if self.keep else zip(self.choices, parts)
        for choice, own in told:
            shown, tokens = "".join(part.text for part in own), [token for part in own for token in part.tokens]
            if self.chat:
                logprobs = self._told(choice, tokens) if self.logprobs else None
                message: dict[str, Any] = {"role": "assistant", "content": shown, "refusal": None}
                if choice.calls is not None:
                    shown, calls = joined([delta for part in own for delta in part.deltas or []])
                    message["content"] = shown if shown or not calls else None
                    if calls:
                        message["tool_calls"] = calls
                choices.append({"index": choice.index, "message": message, "logprobs": logprobs})
            else:
                legacy = self._legacy(choice, tokens) if self.logprobs else None
                choices.append({"index": choice.index, "text": shown, "logprobs": legacy})
            choices[-1]["finish_reason"] = choice.finish_reason
        kind = "chat.completion" if self.chat else "text_completion"
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return {**head, "choices": choices, "usage": self.usage()}

    def _best(self, answers: list[Any]) -> list[Any]:
        """The likeliest of each prompt's answers, by the log probability of a token (OpenAI's best_of),
        the best first."""
        best = []
        for first in range(0, len(answers), self.n):
            own = sorted(answers[first : first + self.n], key=lambda one: -one[0].log_prob / max(1, one[0].n_tokens))
            best += own[: self.keep]
        for index, (choice, _) in enumerate(best):
            choice.index = index
        return best

    def _told(self, choice: Choice, tokens: Sequence[Any]) -> dict[str, Any]:
        content = []
        for _, token, log_prob in tokens:
            spelt = spelling(choice.text, token)
            content.append(
                {
                    "token": spelt.decode("utf-8", "replace"),
                    "bytes": list(spelt),
                    "logprob": log_prob,
                    "top_logprobs": [
                        {"token": one.decode("utf-8", "replace"), "bytes": list(one), "logprob": value}
                        for one, value in ((spelling(choice.text, t), v) for t, v in getattr(log_prob, "top", ()))
                    ],
                }
            )
        return {"content": content, "refusal": None}

    def _legacy(self, choice: Choice, tokens: Sequence[Any]) -> dict[str, Any]:
        return {
            "tokens": [spelling(choice.text, token).decode("utf-8", "replace") for _, token, _ in tokens],
            "token_logprobs": [log_prob for _, _, log_prob in tokens],
            "top_logprobs": [
                {spelling(choice.text, t).decode("utf-8", "replace"): value for t, value in log_prob.top}
                if log_prob is not None
                else None
                for _, _, log_prob in tokens
            ]
            if any(getattr(log_prob, "top", None) for _, _, log_prob in tokens)
            else None,
            "text_offset": [offset for offset, _, _ in tokens],
        }


# UTF-8 as it is, and no spaces
_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
_text = json.encoder.encode_basestring


def spelling(text: Any, token: int) -> bytes:
    """The bytes that a token stands for."""
    piece: str | bytes = text.pieces.get(token, b"")
    return piece if isinstance(piece, bytes) else piece.encode()
