"""Reads a request: its body is parsed, checked, put through the chat template and tokenized,
in a process with bounded time and memory.

A client can make all of this work expensive, so none of it runs on a loop that others wait for. A reader is a child
with a bound on memory and on the CPU time of each request. If it exceeds either bound it dies, its request is refused,
and the parent forks another. Its answer holds the engine's requests as bytes:
the worker adds an id and a seed to each and sends them.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import re
import resource
import signal
import socket
import struct
import sys
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from pydantic import ValidationError

from scripts.openai import messages, tools
from scripts.openai.chat_template import ChatTemplate, Refused, texts_of
from scripts.openai.engine import TOKENS, Engine, Question, inputs_of, is_greedy
from scripts.openai.wrong import ApiError

# CPU seconds of one request, whole ones (setrlimit(2)), and memory beyond what the process has at its start
CPU_SECONDS, MEMORY_BYTES = 3, 1 << 30
# If the engine sees stop strings as tokens (STREAMING=off): bytes of all of them, times the prompts
MAX_STOP_WORK = 16 << 10
# Characters that echo repeats, in all answers together; with logprobs: tokens that it tells of,
# the likeliest ones beside each counted
MAX_ECHO_CHARACTERS, MAX_ECHO_TOKENS = 4 << 20, 1 << 18
# A schema, a regular expression; what llguidance may spend on one is in guides.py
MAX_GUIDE_BYTES = 64 << 10
# a message to or from a reader: its length, then it
LENGTH = struct.Struct(">I")
# prctl(2)
PR_SET_PDEATHSIG = 1

Body = TypeVar("Body", bound=messages.Sampling)


@dataclass
class Asked:
    """A request that can be answered.

    shared: bytes of the engine's request that all answers have; own: what each prompt adds. An answer's number is
    prompt * n + alternative.
    """

    chat: bool = False
    stream: bool = False
    include_usage: bool = False
    n: int = 1
    max_tokens: int = 1
    prompt_tokens: int = 0
    logprobs: bool = False
    stops: list[str] = field(default_factory=list)
    shown: list[str] = field(default_factory=list)
    # the prompts' tokens, if echo reports them (with logprobs)
    told: list[list[int]] = field(default_factory=list)
    # the seed of the first answer, which the next ones count up; None: nothing is random
    seed: int | None = None
    starts_with_space: bool = False
    # whether the end of the model's answer counts
    ignore_eos: bool = False
    # how many likely tokens are sent with each one (top_logprobs)
    likeliest: int = 0
    # how many of the n are sent, the likeliest (best_of); 0: all
    keep: int = 0
    # how calls are read (tools.Calls); None: the answer is text
    calls: dict[str, Any] | None = None
    shared: bytes = b""
    own: list[bytes] = field(default_factory=list)

    @property
    def count(self) -> int:
        return self.n * len(self.own)

    def packed(self) -> bytes:
        """The fields as JSON, then all bytes in a row."""
        told = {name: value for name, value in asdict(self).items() if name not in ("shared", "own")}
        told["sizes"] = [len(self.shared), *map(len, self.own)]
        head = json.dumps(told).encode()
        return b"".join([LENGTH.pack(len(head)), head, self.shared, *self.own])


def unpacked(data: bytes) -> Asked:
    """The reverse: bytes to a request. Raises ApiError if the reader refused."""
    behind = LENGTH.size + LENGTH.unpack_from(data)[0]
    told = json.loads(data[LENGTH.size : behind])
    if (error := told.pop("error", None)) is not None:
        raise ApiError(*error)
    parts = []
    for size in told.pop("sizes"):
        parts.append(data[behind : behind + size])
        behind += size
    return Asked(**{f.name: told[f.name] for f in fields(Asked) if f.name in told}, shared=parts[0], own=parts[1:])


def refused(error: ApiError) -> bytes:
    head = json.dumps({"error": [error.status, error.message, error.param, error.code]}).encode()
    return LENGTH.pack(len(head)) + head


class Reader:
    """Everything that a request is checked against.

    name: the model's id; text: Text of the room's tokenizer; template: None for a base model; aliases: more names of
    it;
    why_not: from the torch engine's guides.py, says why a guide cannot be used; None: only the engine knows.
    """

    def __init__(
        self,
        name: str,
        engine: Engine,
        text: Any,
        template: ChatTemplate | None,
        capacity: int,
        aliases: Sequence[str] = (),
        why_not: Callable[[str, str], str | None] | None = None,
    ) -> None:
        self.names, self.why_not = (name, *aliases), why_not
        self.name, self.engine, self.text, self.template, self.capacity = name, engine, text, template, capacity
        self.limits = engine.limits
        self.max_prompt_bytes = self.limits.max_input_len * text.longest_piece_bytes

    def read(self, chat: bool, data: bytes) -> Asked:
        """A body as it came. Raises ApiError."""
        return self._chat(data) if chat else self._completions(data)

    def _completions(self, data: bytes) -> Asked:
        body = checked(messages.CompletionRequest, data)
        self._check_model(body.model)
        keep, best_of = body.n or 1, body.best_of or body.n or 1
        if best_of < keep:
            raise ApiError(400, f"best_of is {best_of} and n is {keep}; best_of must not be less", "best_of")
        if best_of > keep and body.stream:
            raise ApiError(400, "best_of is not supported with stream: which is best is known at the end", "best_of")
        body.n = best_of
        if body.max_tokens == 0 and not body.echo:
            raise ApiError(
                400,
                "max_tokens is 0: without echo nothing is left of the answer",
                "max_tokens",
                "integer_below_min_value",
            )
        prompts, shown = self._prompts(body)
        echoed = bool(body.echo) and body.logprobs is not None
        if echoed:
            self._check_echoed(body, prompts)
        asked = self._asked(
            body,
            prompts,
            16 if body.max_tokens is None else body.max_tokens,
            chat=False,
            logprobs=body.logprobs is not None,
            compared=best_of > keep,
            likeliest=body.logprobs or 0,
            guide=self._guide(body, None),
            of_prompt=echoed,
        )
        asked.told = prompts if echoed else []
        asked.shown, asked.keep = shown, keep if best_of > keep else 0
        return asked

    def _check_echoed(self, body: messages.CompletionRequest, prompts: Sequence[list[int]]) -> None:
        """Check that the prompts' log probabilities are available. Raises ApiError."""
        if not self.engine.takes("prompt_logprobs"):
            raise ApiError(
                400, "echo with logprobs is not supported by this engine: it does not tell a prompt's log probabilities", "echo",
                "unsupported_parameter",
            )  # fmt: skip
        count = sum(map(len, prompts)) * (body.n or 1) * (1 + (body.logprobs or 0))
        if count > MAX_ECHO_TOKENS:
            raise ApiError(
                400, f"echo with logprobs tells of {count} tokens in all answers, the likeliest ones counted; at most {MAX_ECHO_TOKENS} "
                "are told", "echo",
            )  # fmt: skip

    def _chat(self, data: bytes) -> Asked:
        body = checked(messages.ChatRequest, data)
        self._check_model(body.model)
        if self.template is None:
            raise ApiError(
                400, "this model has no chat template: it is a base model. Use /v1/completions, or serve it with CHAT_TEMPLATE=",
                "messages", "no_chat_template",
            )  # fmt: skip
        if body.top_logprobs and not body.logprobs:
            raise ApiError(400, "top_logprobs is only allowed with logprobs", "top_logprobs")
        turns, more = self._turns(body, self.template), dict(body.chat_template_kwargs or {})
        for name in ("messages", "tools", "add_generation_prompt"):
            if name in more:
                raise ApiError(400, f"chat_template_kwargs.{name} is not supported", "chat_template_kwargs")
        calls = self._tools(body, self.template)
        if calls is not None:
            # what is for the server is not for the model
            hidden: Any = {"cache_control": True, "function": {"type": True, "strict": True}}
            more["tools"] = [tool.model_dump(exclude_none=True, exclude=hidden) for tool in body.tools or []]
        self._check_bytes(sum(len(text.encode()) for text in texts_of([*turns, more])), "messages")
        try:
            ids = self.template.token_ids(turns, begun="" if calls is None else calls["begun"], more=more)
        except Refused as refusal:
            raise ApiError(400, str(refusal)[:500], "messages") from None
        self._check_ids(ids, "messages")
        most = body.max_completion_tokens or body.max_tokens or self.limits.max_seq_len - len(ids)
        guide = self._guide(body, calls)
        likeliest = body.top_logprobs or 0
        asked = self._asked(
            body, [ids], most, chat=True, logprobs=bool(body.logprobs), likeliest=likeliest, guide=guide
        )
        asked.starts_with_space, asked.calls = self.text.adds_space, calls
        return asked

    @staticmethod
    def _turns(body: messages.ChatRequest, template: ChatTemplate) -> list[dict[str, Any]]:
        """A conversation in the form that templates read (transformers, chat_templating: arguments are an object, not
        its text). Raises ApiError."""
        turns: list[dict[str, Any]] = []
        called: dict[str, str] = {}
        for number, message in enumerate(body.messages):
            place = f"messages[{number}]"
            turn: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role}
            turn["content"] = message.text
            if message.name:
                turn["name"] = message.name
            if (message.tool_calls or message.role == "tool") and not template.knows_results:
                raise ApiError(
                    400, "this model's chat template knows no tools: it cannot write their calls and results", place, "no_tools"
                )  # fmt: skip
            for index, call in enumerate(message.tool_calls or []):
                called[call.id] = call.function.name
                at = f"{place}.tool_calls[{index}].function.arguments"
                try:
                    given = json.loads(call.function.arguments or "{}")
                except ValueError:
                    raise ApiError(400, f"Invalid '{at}': it is not valid JSON", at, "invalid_value") from None
                if not isinstance(given, dict):
                    raise ApiError(400, f"Invalid '{at}': it is not a JSON object", at, "invalid_value")
                told = {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": given}}
                turn.setdefault("tool_calls", []).append(told)
            if message.role == "tool":
                if message.tool_call_id not in called:
                    raise ApiError(
                        400,
                        f"Invalid '{place}.tool_call_id': no turn before it has a tool call with this id",
                        f"{place}.tool_call_id",
                        "invalid_value",
                    )
                turn["tool_call_id"] = message.tool_call_id
                turn.setdefault("name", called[message.tool_call_id])
            turns.append(turn)
        return turns

    @staticmethod
    def _tools(body: messages.ChatRequest, template: ChatTemplate) -> dict[str, Any] | None:
        """How the answer's calls are read; None if there are no tools, or none is to be called. Raises ApiError."""
        choice = body.tool_choice
        if not body.tools:
            if choice not in (None, "none", "auto"):
                raise ApiError(400, "tool_choice is only allowed when tools are given", "tool_choice")
            return None
        if choice == "none":
            return None
        if not template.knows_tools:
            raise ApiError(400, "tools: this model's chat template knows no tools", "tools", "no_tools")
        form = tools.form_of(template.source)
        if form is None:
            raise ApiError(
                400, f"tools is not supported with this model: how it writes a call is none of {', '.join(tools.FORMS)}", "tools",
                "unsupported_parameter",
            )  # fmt: skip
        names = [tool.function.name for tool in body.tools]
        most, begun, reason = int(body.parallel_tool_calls is False), "", "tool_calls"
        if isinstance(choice, messages.NamedTool):
            if choice.function.name not in names:
                raise ApiError(400, f"tool_choice: {choice.function.name} is not among the tools", "tool_choice")
            # OpenAI: a call that the client chose ends with "stop"
            most, begun, reason = 1, tools.beginning(form, choice.function.name), "stop"
        elif choice == "required":
            begun = tools.beginning(form, names[0] if len(names) == 1 else None)
            most = 1 if len(names) == 1 else most
        return {"form": form, "begun": begun, "most": most, "reason": reason}

    def _guide(self, body: messages.Sampling, calls: dict[str, Any] | None) -> tuple[str, str] | None:
        """What the answer must follow: a guide's type and text (TensorRT-LLM's guided_decoding_guide_type).
        Raises ApiError."""
        found: dict[str, tuple[str, str]] = {}
        given = getattr(body, "response_format", None)
        if given is not None and given.type == "json_object":
            found["response_format"] = ("json", "")
        elif given is not None and given.type == "json_schema":
            found["response_format"] = ("json_schema", json.dumps(given.json_schema.schema_ or {"type": "object"}))
        if body.guided_json is not None:
            schema = body.guided_json
            found["guided_json"] = ("json_schema", schema if isinstance(schema, str) else json.dumps(schema))
        if body.guided_regex is not None:
            found["guided_regex"] = ("regex", body.guided_regex)
        if body.guided_choice is not None:
            found["guided_choice"] = ("regex", "|".join(map(escaped, body.guided_choice)))
        if calls is not None and isinstance(body, messages.ChatRequest):
            self._guide_calls(body, calls, found)
        if len(found) > 1:
            raise ApiError(400, f"only one of {' and '.join(found)} can guide an answer", next(iter(found)))
        for name, (kind, text) in found.items():
            if not self.engine.guides:
                raise ApiError(
                    400, f"{name} is not supported by this engine: its backend has no guided decoding, or it is off", name,
                    "unsupported_parameter",
                )  # fmt: skip
            # a guide says where the answer ends
            for other in ("ignore_eos", "min_tokens"):
                if getattr(body, other):
                    raise ApiError(400, f"{other} is not supported with {name}", other, "unsupported_parameter")
            self._check_guide(name, kind, text)
        return next(iter(found.values()), None)

    def _guide_calls(
        self, body: messages.ChatRequest, calls: dict[str, Any], found: dict[str, tuple[str, str]]
    ) -> None:
        """Add the guide of an answer's calls to the guide that was found, or replace it. Raises ApiError.

        The arguments of a strict tool follow its schema.
        So do those of others if the engine can guide and the schema can be followed.
        """
        given, free = body.tools or [], not calls["begun"]
        strict = [number for number, tool in enumerate(given) if tool.function.strict]
        if free and not strict and not found:
            return  # the answer is free
        named = [tool for tool in given if isinstance(body.tool_choice, messages.NamedTool)
                 and tool.function.name == body.tool_choice.function.name]  # fmt: skip
        meant = named or given
        if not strict and not found and not self.engine.guides:
            return
        if len(meant) == 1 and not free:
            # the answer is this tool's arguments and nothing else
            schema = self._schema_of(meant[0], given.index(meant[0]))
            found["tools"] = ("json_schema", json.dumps(schema))
            return
        if self.why_not is None:
            if strict or found:
                raise ApiError(
                    400, f"{'tools: strict' if strict else 'tools'} is not supported by this engine "
                    + (f"with {next(iter(found))}" if found else "with this tool_choice; name the tool, or require it and give no other"),
                    "tools", "unsupported_parameter",
                )  # fmt: skip
            return
        schemas = [(tool.function.name, self._schema_of(tool, number)) for number, tool in enumerate(given)]
        content = None
        if free and found:
            # it calls, or it answers in this form
            [(name, (kind, text)), *others] = found.items()
            if others or kind not in ("json", "json_schema"):
                raise ApiError(
                    400, f"{name} is not supported with tools; response_format is", name, "unsupported_parameter"
                )
            self._check_guide(name, kind, text)
            if not tools.FORMS[calls["form"]].opening:
                raise ApiError(
                    400, f"{name} is not supported with tools and this model: how it writes a call is an object like another", name,
                    "unsupported_parameter",
                )  # fmt: skip
            content = {"type": "object"} if kind == "json" else json.loads(text)
            content = content if isinstance(content, dict) else {"allOf": [content]}
            found.clear()
        found["tools"] = ("ebnf_grammar", tools.grammar(calls["form"], schemas, not free, calls["most"], content))

    def _schema_of(self, tool: messages.Tool, number: int) -> dict[str, Any]:
        """The schema of a tool's arguments. Raises ApiError if a strict tool's schema cannot be followed."""
        schema = {**(tool.function.parameters or {}), "type": "object"}
        why = None if self.why_not is None else self.why_not("json_schema", json.dumps(schema))
        if why is None:
            return schema
        if tool.function.strict:
            place = f"tools[{number}].function.parameters"
            raise ApiError(400, f"Invalid '{place}': {why}", place, "invalid_value")
        return {"type": "object"}

    def _check_guide(self, name: str, kind: str, text: str) -> None:
        """Whether the engine can follow a guide, as far as that is known here. Raises ApiError."""
        if len(text.encode()) > MAX_GUIDE_BYTES:
            raise ApiError(400, f"{name} is larger than {MAX_GUIDE_BYTES} bytes", name)
        if self.why_not is not None and (why := self.why_not(kind, text)) is not None:
            raise ApiError(400, f"Invalid '{name}': {why}", name, "invalid_value")

    def _prompts(self, body: messages.CompletionRequest) -> tuple[list[list[int]], list[str]]:
        """Token ids of every prompt, and its text for echo."""
        one = isinstance(body.prompt, str) or isinstance(next(iter(body.prompt), None), int)
        given: list[Any] = [body.prompt] if one else list(body.prompt)
        if not given:
            raise ApiError(400, "prompt is empty", "prompt")
        if len(given) * (body.n or 1) > self.capacity:
            raise ApiError(
                400,
                f"{len(given)} prompts with n={body.n or 1}; this server takes at most {self.capacity} answers a "
                "request",
                "prompt",
            )
        texts = [prompt for prompt in given if isinstance(prompt, str)]
        for text in texts:
            self._check_bytes(len(text.encode()), "prompt")
        encoded = iter(self.text.encode(texts))
        prompts = [next(encoded) if isinstance(prompt, str) else prompt for prompt in given]
        for ids in prompts:
            self._check_ids(ids, "prompt")
        if not body.echo:
            return prompts, []
        shown = [prompt if isinstance(prompt, str) else self.text.decode(prompt) for prompt in given]
        if sum(map(len, shown)) * (body.n or 1) > MAX_ECHO_CHARACTERS:
            raise ApiError(
                400, f"echo: the prompts have more than {MAX_ECHO_CHARACTERS} characters in all answers", "echo"
            )
        return prompts, shown

    def _asked(
        self, body: messages.Sampling, prompts: Sequence[list[int]], max_tokens: int, chat: bool, logprobs: bool,
        compared: bool = False, likeliest: int = 0, guide: tuple[str, str] | None = None, of_prompt: bool = False,
    ) -> Asked:  # fmt: skip
        """The engine's requests: their common part, and each prompt's own part. compared: answers are compared by their
        likelihood; of_prompt: the prompts' tokens are reported too."""
        named = "top_logprobs" if chat else "logprobs"
        for name, asked, value in (("min_p", "min_p", body.min_p), (named, "top_logprobs", likeliest)):
            if value and not self.engine.takes(asked):
                raise ApiError(
                    400, f"{name} is not supported by this engine" + (": ask for 0" if likeliest else ""), name, "unsupported_parameter"
                )  # fmt: skip
        if likeliest > self.limits.vocab_size:
            raise ApiError(400, f"{named}: the model has {self.limits.vocab_size} tokens", named)
        n = body.n or 1
        if body.stream_options and not body.stream:
            raise ApiError(400, "stream_options is only allowed with stream", "stream_options")
        for ids in prompts:
            if len(ids) + max_tokens > self.limits.max_seq_len:
                raise ApiError(
                    400,
                    f"This model's maximum context length is {self.limits.max_seq_len} tokens; the prompt has {len(ids)} and the "
                    f"answer may have {max_tokens}.",
                    "messages" if chat else "prompt",
                    "context_length_exceeded",
                )
        if len(prompts) * n > self.capacity:
            raise ApiError(400, f"n is {n}; this server takes at most {self.capacity} answers a request", "n")
        bias = {int(token): value for token, value in (body.logit_bias or {}).items()}
        for token in bias:
            if token >= self.limits.vocab_size:
                raise ApiError(
                    400, f"logit_bias: {token} is not a token id; they go to {self.limits.vocab_size - 1}", "logit_bias"
                )
        stops = [stop for stop in body.stops if stop]
        # if the engine streams, the worker itself finds a stop string, however it is spelt
        spelt = bool(stops) and not self.engine.streams
        if spelt and len(prompts) * sum(len(stop.encode()) for stop in stops) > MAX_STOP_WORK:
            raise ApiError(
                400, f"stop: {len(stops)} stop strings for each of {len(prompts)} prompts have more than {MAX_STOP_WORK} bytes; "
                "with STREAMING=off the engine is told every way to spell them", "stop",
            )  # fmt: skip
        question = Question(
            [], max(1, max_tokens), _or(body.temperature, 1.0), _or(body.top_p, 1.0), body.top_k or 0, body.presence_penalty or 0.0,
            body.frequency_penalty or 0.0, _or(body.repetition_penalty, 1.0), 0, body.min_tokens or 0,
            logprobs or compared, bias, float(body.min_p or 0), likeliest, of_prompt, guide,
        )  # fmt: skip
        ends = () if body.ignore_eos else self.engine.end_ids
        values = inputs_of(question, ends, self.engine.streams, self.limits.vocab_size)
        for name in ("input_ids", "input_lengths", "random_seed"):
            values.pop(name, None)
        outputs = [*TOKENS, *(["output_log_probs"] if logprobs or compared else [])]
        own = []
        for ids in prompts:
            alone: dict[str, Any] = {"input_ids": ids, "input_lengths": [len(ids)]}
            if spelt:
                alone["stop_words_list"] = self.text.word_list(stops, ids)[0]
            own.append(self.engine.message_of(alone))
        seed = None if is_greedy(question) else body.seed if body.seed is not None else uuid.uuid4().int
        include_usage = bool(body.stream_options and body.stream_options.include_usage)
        return Asked(
            chat=chat, stream=bool(body.stream), include_usage=include_usage, n=n, max_tokens=max_tokens,
            prompt_tokens=sum(map(len, prompts)), logprobs=logprobs, stops=stops, seed=None if seed is None else seed % (1 << 64),
            ignore_eos=bool(body.ignore_eos), likeliest=likeliest, shared=self.engine.message_of(values, outputs), own=own,
        )  # fmt: skip

    def _check_model(self, name: str) -> None:
        if name not in self.names:
            raise ApiError(
                404,
                f"The model `{name[:64]}` does not exist; this server has `{self.name}`",
                "model",
                "model_not_found",
            )

    def _check_bytes(self, size: int, param: str) -> None:
        if size > self.max_prompt_bytes:
            raise ApiError(
                400, f"{param} has {size} bytes; the {self.limits.max_input_len} tokens that this model takes spell at most "
                f"{self.max_prompt_bytes}", param, "context_length_exceeded",
            )  # fmt: skip

    def _check_ids(self, ids: Sequence[int], param: str) -> None:
        if not ids:
            raise ApiError(400, f"{param} is empty", param)
        if len(ids) > self.limits.max_input_len:
            raise ApiError(
                400,
                f"{param} has {len(ids)} tokens; this model takes at most {self.limits.max_input_len}",
                param,
                "context_length_exceeded",
            )
        wrong = next((token for token in ids if not 0 <= token < self.limits.vocab_size), None)
        if wrong is not None:
            raise ApiError(
                400,
                f"{param}: {str(wrong)[:20]} is not a token id; they go from 0 to {self.limits.vocab_size - 1}",
                param,
            )


def escaped(text: str) -> str:
    """A regular expression that matches exactly this text (for llguidance and XGrammar,
    whose syntax is RE2's or similar)."""
    return re.sub(r"[\\.+*?()|\[\]{}^$/]", lambda found: "\\" + found[0], text)


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def checked(kind: type[Body], data: bytes) -> Body:
    """Check a body. Raises ApiError with its first mistake."""
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        raise invalid(error) from None


def invalid(error: ValidationError) -> ApiError:
    """The first mistake in a body, in words that never repeat long input."""
    found = error.errors(include_url=False)
    # If a value may have several forms, the error is about the form that it has:
    # a list with a mistake is not called "not text".
    same = [one for one in found if one["loc"][:1] == found[0]["loc"][:1]]
    told = [one for one in same if not one["type"].endswith("_type")] or same
    # the deepest mistake is in the form that was sent
    first = max(
        told, key=lambda one: (not isinstance(one["input"], dict) or one["type"] != "literal_error", len(one["loc"]))
    )
    # the names of pydantic's own alternatives (str, list[str]) are not names of the API
    names = [part for part in first["loc"] if not isinstance(part, str) or messages.NAME.fullmatch(part)]
    kind, context = first["type"], first.get("ctx", {})
    if kind == "extra_forbidden":
        name = first["msg"][:64]
        return ApiError(400, f"Unrecognized request argument supplied: {name}", _place([*names, name]))
    if kind == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {first['msg'].partition(': ')[2] or first['msg']}")
    if not first["loc"]:
        return ApiError(400, "the body must be a JSON object")
    param = _place(names)
    if kind == "not_supported":
        what = "" if first["msg"] == "not supported" else f" {first['msg']}"
        return ApiError(400, f"{param}{what} is not supported", param, "unsupported_parameter")
    if kind == "missing":
        return ApiError(400, f"Missing required parameter: '{param}'.", param, "missing_required_parameter")
    given, forms = first["input"], [one for one in same if one["loc"][: len(names)] == tuple(names)]
    if kind == "literal_error":
        kinds = str(context["expected"]).replace(" or ", " and ")
        return ApiError(400, f"Invalid value: {_shown(given)}. Supported values are: {kinds}.", param, "invalid_value")
    if kind.endswith("_type"):
        kinds = " or ".join(dict.fromkeys(_KINDS.get(one["type"], "another type") for one in forms or [first]))
        return ApiError(
            400, f"Invalid type for '{param}': expected {kinds}, but got {_kind(given)} instead.", param, "invalid_type"
        )
    bound = next((word for word in _BOUNDS if word in context), None)
    if kind in ("too_short", "too_long") and bound is not None:
        return ApiError(
            400, f"Invalid '{param}': array too {kind[4:]}. Expected {_BOUNDS[bound]} {context[bound]} items, but got "
            f"{context['actual_length']}.", param, f"array_{'above_max' if kind == 'too_long' else 'below_min'}_length",
        )  # fmt: skip
    if bound is not None and isinstance(given, (int, float)):
        side = "below minimum" if bound in ("ge", "gt") else "above maximum"
        number = "integer" if isinstance(given, int) else "decimal"
        code = f"{number}_{'below_min' if bound in ('ge', 'gt') else 'above_max'}_value"
        return ApiError(
            400, f"Invalid '{param}': {number} {side} value. Expected a value {_BOUNDS[bound]} {context[bound]}, but got "
            f"{_shown(given)} instead.", param, code,
        )  # fmt: skip
    if kind == "finite_number":
        return ApiError(400, f"Invalid '{param}': it must be a finite number", param, "invalid_value")
    said = first["msg"].partition("Value error, ")[2] or first["msg"].replace("String should", "it should")
    return ApiError(400, f"Invalid '{param}': {said}", param, "invalid_value")


# what pydantic expects and finds, in OpenAI's words
_KINDS = {
    "string_type": "a string",
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a decimal",
    "bool_type": "a boolean",
    "list_type": "an array",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
}
_BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<", "min_length": "at least", "max_length": "at most"}


def _kind(value: Any) -> str:
    """A value's kind in JSON's words."""
    if value is None:
        return "null"
    kinds = {bool: "a boolean", int: "an integer", float: "a decimal", str: "a string", list: "an array"}
    return kinds.get(type(value), "an object")


def _shown(value: Any) -> str:
    """A value, short enough to repeat."""
    text = repr(value) if isinstance(value, (str, int, float)) else _kind(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _place(names: Sequence[str | int]) -> str | None:
    """Where a mistake is, as OpenAI writes it: messages[0].content."""
    place = "".join(f"[{name}]" if isinstance(name, int) else f".{name}" for name in names)
    return place.lstrip(".") or None


# --- the process -----------------------------------------------------------------------------------------------------


def bounded(read: Callable[[bool, bytes], Asked], chat: bool, data: bytes) -> bytes:
    """The answer to one request, whatever happens: a request that cannot be read gets an error, never silence."""
    try:
        return read(chat, data).packed()
    except ApiError as error:
        return refused(error)
    except (MemoryError, RecursionError) as error:
        return refused(too_much(type(error).__name__))
    except Exception as error:  # our bug: the log has it, and the client learns that it is not at fault
        print(f"openai: reading a request failed: {type(error).__name__}: {str(error)[:200]!r}", file=sys.stderr)
        return refused(ApiError(500, "The server had an error; its log says more", code="internal_error"))


def too_much(what: str) -> ApiError:
    return ApiError(
        400,
        f"the request takes more work than one may take ({what}; {CPU_SECONDS} s of CPU, {MEMORY_BYTES >> 20} MB): a shorter "
        "one is answered",
        code="too_much_work",
    )


def serve(reader: Reader, path: str, parent: int) -> NoReturn:
    """The life of a reader: connect to its worker, answer one request after another,
    and end when the worker or the parent ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # a reader ends with its worker, and still reads its last requests
    # the spellings of a stop string are the same for every prompt
    reader.text.spellings = functools.lru_cache(32)(reader.text.spellings)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, used + MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    link = socket.socket(socket.AF_UNIX)
    try:
        link.connect(path)
        link.sendall(LENGTH.pack(os.getpid()))
        while head := receive(link, LENGTH.size + 1):
            data = receive(link, LENGTH.unpack_from(head)[0])
            time = resource.getrusage(resource.RUSAGE_SELF)
            resource.setrlimit(
                resource.RLIMIT_CPU, (int(time.ru_utime + time.ru_stime) + 1 + CPU_SECONDS, resource.RLIM_INFINITY)
            )
            answer = bounded(reader.read, bool(head[-1]), data)
            link.sendall(LENGTH.pack(len(answer)) + answer)
    except OSError:
        pass
    os._exit(0)


def receive(link: socket.socket, size: int) -> bytes:
    """Exactly so many bytes; none if the other side has ended."""
    data = bytearray()
    while len(data) < size:
        piece = link.recv(size - len(data))
        if not piece:
            return b""
        data += piece
    return bytes(data)
