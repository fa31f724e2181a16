"""What a request asks for: its body is read, checked, put through the chat template and tokenized, in a process that may take only so much.

All of this is work that a client sets the price of, so none of it runs on a loop that others wait for. A reader is a child with a bound on
memory and on the CPU time of each request; when it goes beyond either it dies, its request is refused, and the parent forks another. Its
answer holds the engine's requests as bytes: the worker adds an id and a seed to each and sends them.
"""

import ctypes
import functools
import json
import os
import resource
import signal
import socket
import struct
import sys
import uuid
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Callable, NoReturn, Sequence, TypeVar

from pydantic import ValidationError

from scripts.openai import messages
from scripts.openai.chat_template import ChatTemplate, Refused
from scripts.openai.engine import TOKENS, Engine, Question, inputs_of, is_greedy
from scripts.openai.wrong import ApiError

# CPU seconds of one request, whole ones (setrlimit(2)), and memory beyond what the process has at its start
CPU_SECONDS, MEMORY_BYTES = 3, 1 << 30
# Where the engine sees stop strings as tokens (STREAMING=off): bytes of all of them, times the prompts
MAX_STOP_WORK = 16 << 10
# Characters that echo repeats, in all answers together
MAX_ECHO_CHARACTERS = 4 << 20
# a message to or from a reader: its length, then it
LENGTH = struct.Struct(">I")
# prctl(2)
PR_SET_PDEATHSIG = 1

Body = TypeVar("Body", bound=messages.Sampling)


@dataclass
class Asked:
    """A request that can be answered.

    shared: bytes of the engine's request that all answers have; own: what each prompt adds. An answer's number is prompt * n + alternative.
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
    # of the first answer, the next ones count on; None: nothing is left to chance
    seed: int | None = None
    starts_with_space: bool = False
    shared: bytes = b""
    own: list[bytes] = field(default_factory=list)

    @property
    def count(self) -> int:
        return self.n * len(self.own)

    def packed(self) -> bytes:
        """Its fields as JSON, then the bytes in a row."""
        told = {name: value for name, value in asdict(self).items() if name not in ("shared", "own")}
        told["sizes"] = [len(self.shared), *map(len, self.own)]
        head = json.dumps(told).encode()
        return b"".join([LENGTH.pack(len(head)), head, self.shared, *self.own])


def unpacked(data: bytes) -> Asked:
    """The other way. Raises ApiError where the reader refused."""
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

    name: the model's id; text: Text of the room's tokenizer; template: None for a base model; aliases: more names of it.
    """

    def __init__(
        self,
        name: str,
        engine: Engine,
        text: Any,
        template: ChatTemplate | None,
        capacity: int,
        aliases: Sequence[str] = (),
    ) -> None:
        self.names = (name, *aliases)
        self.name, self.engine, self.text, self.template, self.capacity = name, engine, text, template, capacity
        self.limits = engine.limits
        self.max_prompt_bytes = self.limits.max_input_len * text.longest_piece_bytes

    def read(self, chat: bool, data: bytes) -> Asked:
        """A body as it came. Raises ApiError."""
        return self._chat(data) if chat else self._completions(data)

    def _completions(self, data: bytes) -> Asked:
        body = checked(messages.CompletionRequest, data)
        self._check_model(body.model)
        for name in ("suffix", "best_of"):
            if getattr(body, name) not in (None, "", body.n or 1):
                raise ApiError(400, f"{name} is not supported", name)
        if body.logprobs:
            raise ApiError(
                400, "logprobs: this server knows the log probability of the chosen tokens only; ask for 0", "logprobs"
            )
        if body.echo and body.logprobs is not None:
            raise ApiError(
                400, "echo with logprobs is not supported: the prompt's log probabilities are not known", "logprobs"
            )
        prompts, shown = self._prompts(body)
        asked = self._asked(body, prompts, body.max_tokens or 16, chat=False, logprobs=body.logprobs is not None)
        asked.shown = shown
        return asked

    def _chat(self, data: bytes) -> Asked:
        body = checked(messages.ChatRequest, data)
        self._check_model(body.model)
        if self.template is None:
            raise ApiError(
                400, "this model has no chat template: it is a base model. Use /v1/completions, or serve it with CHAT_TEMPLATE=",
                "messages", "no_chat_template",
            )  # fmt: skip
        if body.top_logprobs:
            raise ApiError(
                400,
                "top_logprobs: this server knows the log probability of the chosen tokens only; ask for 0",
                "top_logprobs",
            )
        turns = []
        for message in body.messages:
            role = "system" if message.role == "developer" else message.role
            turns.append({"role": role, "content": message.text, **({"name": message.name} if message.name else {})})
        self._check_bytes(sum(len(turn[key].encode()) for turn in turns for key in turn if key != "role"), "messages")
        try:
            ids = self.template.token_ids(turns)
        except Refused as refusal:
            raise ApiError(400, str(refusal)[:500], "messages") from None
        self._check_ids(ids, "messages")
        most = body.max_completion_tokens or body.max_tokens or self.limits.max_seq_len - len(ids)
        asked = self._asked(body, [ids], most, chat=True, logprobs=bool(body.logprobs))
        asked.starts_with_space = self.text.adds_space
        return asked

    def _prompts(self, body: messages.CompletionRequest) -> tuple[list[list[int]], list[str]]:
        """Token ids of every prompt, and its text for echo."""
        one = isinstance(body.prompt, str) or isinstance(next(iter(body.prompt), None), int)
        given: list[Any] = [body.prompt] if one else list(body.prompt)
        if not given:
            raise ApiError(400, "prompt is empty", "prompt")
        if len(given) * (body.n or 1) > self.capacity:
            raise ApiError(
                400,
                f"{len(given)} prompts with n={body.n or 1}; this server takes at most {self.capacity} answers a request",
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
        self, body: messages.Sampling, prompts: Sequence[list[int]], max_tokens: int, chat: bool, logprobs: bool
    ) -> Asked:
        """The engine's requests: what all of them share, and what each prompt adds."""
        n = body.n or 1
        if body.stream_options and not body.stream:
            raise ApiError(400, "stream_options is only allowed with stream", "stream_options")
        for ids in prompts:
            if len(ids) + max_tokens > self.limits.max_seq_len:
                raise ApiError(
                    400, f"This model's maximum context length is {self.limits.max_seq_len} tokens; the prompt has {len(ids)} and the "
                    f"answer may have {max_tokens}.", "messages" if chat else "prompt", "context_length_exceeded",
                )  # fmt: skip
        if len(prompts) * n > self.capacity:
            raise ApiError(400, f"n is {n}; this server takes at most {self.capacity} answers a request", "n")
        bias = {int(token): value for token, value in (body.logit_bias or {}).items()}
        for token in bias:
            if token >= self.limits.vocab_size:
                raise ApiError(
                    400, f"logit_bias: {token} is no token id; they go to {self.limits.vocab_size - 1}", "logit_bias"
                )
        stops = [stop for stop in body.stops if stop]
        # where the engine streams the worker sees a stop string itself, however it is spelt
        spelt = bool(stops) and not self.engine.streams
        if spelt and len(prompts) * sum(len(stop.encode()) for stop in stops) > MAX_STOP_WORK:
            raise ApiError(
                400, f"stop: {len(stops)} stop strings for each of {len(prompts)} prompts have more than {MAX_STOP_WORK} bytes; "
                "with STREAMING=off the engine is told every way to spell them", "stop",
            )  # fmt: skip
        question = Question(
            [], max_tokens, _or(body.temperature, 1.0), _or(body.top_p, 1.0), body.top_k or 0, body.presence_penalty or 0.0,
            body.frequency_penalty or 0.0, _or(body.repetition_penalty, 1.0), 0, body.min_tokens or 0, logprobs, bias,
        )  # fmt: skip
        values = inputs_of(question, self.engine.end_ids, self.engine.streams, self.limits.vocab_size)
        for name in ("input_ids", "input_lengths", "random_seed"):
            values.pop(name, None)
        outputs = [*TOKENS, *(["output_log_probs"] if logprobs else [])]
        own = []
        for ids in prompts:
            alone: dict[str, Any] = {"input_ids": ids, "input_lengths": [len(ids)]}
            if spelt:
                alone["stop_words_list"] = self.text.word_list(stops, ids)[0]
            own.append(self.engine.message_of(alone))
        seed = None if is_greedy(question) else body.seed if body.seed is not None else uuid.uuid4().int
        return Asked(
            chat=chat, stream=bool(body.stream), include_usage=bool(body.stream_options and body.stream_options.include_usage), n=n,
            max_tokens=max_tokens, prompt_tokens=sum(map(len, prompts)), logprobs=logprobs, stops=stops,
            seed=None if seed is None else seed % (1 << 64), shared=self.engine.message_of(values, outputs), own=own,
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
                400, f"{param}: {str(wrong)[:20]} is no token id; they go from 0 to {self.limits.vocab_size - 1}", param
            )


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def checked(kind: type[Body], data: bytes) -> Body:
    """A body, checked. Raises ApiError with the first thing that is wrong with it."""
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        raise invalid(error) from None


def invalid(error: ValidationError) -> ApiError:
    """The first thing that is wrong with a body, in words that never repeat what was sent at length."""
    found = error.errors(include_url=False, include_context=False, include_input=False)
    # Of several forms that a value may have, the one that it has is told of: not "it is no text" of a list with a mistake in it.
    same = [one for one in found if one["loc"][:1] == found[0]["loc"][:1]]
    first = next((one for one in same if not one["type"].endswith("_type")), found[0])
    # the names of pydantic's own alternatives (str, list[str]) are no names of the API
    names = [part for part in first["loc"] if not isinstance(part, str) or messages.NAME.fullmatch(part)]
    if first["type"] == "extra_forbidden":
        name = first["msg"][:64]
        return ApiError(400, f"Unrecognized request argument supplied: {name}", ".".join(map(str, [*names, name])))
    param = ".".join(map(str, names)) or None
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {first['msg'].partition(': ')[2] or first['msg']}")
    if first["type"] == "none_required" or first["msg"].startswith("List should have at most 0 items"):
        return ApiError(400, f"{param} is not supported", param)
    if not first["loc"]:
        return ApiError(400, "the body must be a JSON object")
    return ApiError(400, f"{param}: {first['msg']}", param)


# --- the process -----------------------------------------------------------------------------------------------------


def bounded(read: Callable[[bool, bytes], Asked], chat: bool, data: bytes) -> bytes:
    """One request's answer, whatever happens: what cannot be read is told, never lost."""
    try:
        return read(chat, data).packed()
    except ApiError as error:
        return refused(error)
    except (MemoryError, RecursionError) as error:
        return refused(too_much(type(error).__name__))
    except Exception as error:  # ours: the log has it, the client learns that it is not at fault
        print(f"openai: reading a request failed: {type(error).__name__}: {str(error)[:200]!r}", file=sys.stderr)
        return refused(ApiError(500, "The server had an error; its log says more", code="internal_error"))


def too_much(what: str) -> ApiError:
    return ApiError(
        400, f"the request takes more work than one may take ({what}; {CPU_SECONDS} s of CPU, {MEMORY_BYTES >> 20} MB): a shorter "
        "one is answered", code="too_much_work",
    )  # fmt: skip


def serve(reader: Reader, path: str, parent: int) -> NoReturn:
    """The life of a reader: connect to its worker, answer one request after another, end with either of worker and parent."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # the worker's end is ours: its last requests are still read
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
    """Exactly so many bytes; none where the other side has ended."""
    data = bytearray()
    while len(data) < size:
        piece = link.recv(size - len(data))
        if not piece:
            return b""
        data += piece
    return bytes(data)
