"""Asks the model tensorrt_llm over gRPC: token ids in, token ids out, as they come; its contract is in
docker/contracts/backend."""

from __future__ import annotations

import asyncio
import json
import logging
import struct
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf import text_format
from google.protobuf.message import DecodeError
from tritonclient.grpc import model_config_pb2, service_pb2
from tritonclient.utils import triton_to_np_dtype

from scripts.limits import limits_of
from scripts.openai import grpc_link, passing
from scripts.openai.shares import RUNNING, Shares

log = logging.getLogger("openai")

MODEL = "tensorrt_llm"
# A smaller divisor leaves no finite float32 logits, so it means greedy.
MIN_TEMPERATURE = 1e-5
# Two names of the same input, by version
SEED, MIN_TOKENS = ("random_seed", "seed"), ("min_length", "min_tokens")
# Since TensorRT-LLM 0.10 a request that names outputs must name both, or its first token becomes an error.
TOKENS = ("output_ids", "sequence_length")
# What guides an answer (since 0.17)
GUIDE = ("guided_decoding_guide_type", "guided_decoding_guide")
# What TensorRT-LLM says, with the code INTERNAL, when its queue is full
BUSY = "Maximum queue size of"
STREAM_INFER = "/inference.GRPCInferenceService/ModelStreamInfer"
# A client's answers in the engine at once, per slot of the engine: so many that no slot is empty, and so few that
# another client's answer waits for one of them and not for all
AHEAD_SHARE = 0.25
# How often a waiting answer checks whether it may start, because another worker may have made room
LOOK_SECONDS = 0.02


class EngineFailed(Exception):
    """The engine did not answer a request as it should; the server's log says more. unavailable:
    no engine was there to ask."""

    def __init__(self, unavailable: bool = False) -> None:
        super().__init__("the engine could not serve the request")
        self.unavailable = unavailable


@dataclass(frozen=True)
class Limits:
    """What the engine was built for, in tokens and requests."""

    max_batch_size: int
    max_input_len: int
    max_seq_len: int
    vocab_size: int


def read_limits(engines: Path) -> Limits:
    """The limits of the engines' config.json; a prompt leaves room for one token of the answer."""
    config = json.loads((engines / "config.json").read_text(encoding="utf-8"))
    built_for = limits_of(config)
    return Limits(
        max_batch_size=built_for.max_batch_size,
        max_input_len=min(built_for.max_input_len, built_for.max_seq_len - 1),
        max_seq_len=built_for.max_seq_len,
        vocab_size=config["pretrained_config"]["vocab_size"],
    )


@dataclass(frozen=True)
class Question:
    """The request to the engine, under OpenAI's names and with OpenAI's defaults."""

    ids: Sequence[int]
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    min_tokens: int = 0
    logprobs: bool = False
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    min_p: float = 0.0
    # how many tokens besides the chosen one have log probabilities
    top_logprobs: int = 0
    # whether the prompt's tokens have log probabilities too, from the second on
    prompt_logprobs: bool = False
    # what guides the answer: its type and text, as TensorRT-LLM names them
    guide: tuple[str, str] | None = None
    # stop words, for an engine that sees only tokens: int32 (1, 2, n)
    stop_words: Any | None = None


def is_greedy(question: Question) -> bool:
    """Whether the answer is not random."""
    return question.temperature < MIN_TEMPERATURE or question.top_p == 0 or question.top_k == 1


def inputs_of(question: Question, end_ids: Sequence[int], streaming: bool, vocab_size: int) -> dict[str, Any]:
    """The tensors of a question: name -> value of the batch's one row. Names are those of 0.8.0.

    end_ids: the model's ends. The engine takes one end_id; the others are stop words of one token.

    Only top_k and top_p turn sampling on: without them TensorRT-LLM decodes greedily, whatever the temperature.
    Defaults are left out, so that a version that lacks an input does not get it.
    """
    values: dict[str, Any] = {
        "input_ids": question.ids,
        "input_lengths": [len(question.ids)],
        "request_output_len": [question.max_tokens],
        "streaming": [streaming],
    }
    if end_ids:
        values.update(end_id=end_ids[:1], pad_id=end_ids[:1])
    if is_greedy(question):
        values["runtime_top_k"] = [1]
    else:
        values.update(temperature=[question.temperature], runtime_top_p=[question.top_p], random_seed=[question.seed])
        if question.top_k:
            values["runtime_top_k"] = [question.top_k]
    for name, default in (("presence_penalty", 0), ("frequency_penalty", 0), ("repetition_penalty", 1)):
        if getattr(question, name) != default:
            values[name] = [getattr(question, name)]
    if question.min_tokens:
        values["min_length"] = [question.min_tokens]
    if question.logprobs:
        values["return_log_probs"] = [True]
    if question.logit_bias:
        bias = np.zeros(vocab_size, dtype=np.float32)
        for token, value in question.logit_bias.items():
            bias[token] = value
        values["embedding_bias"] = bias
    if question.min_p:
        values["min_p"] = question.min_p
    if question.top_logprobs:
        values["top_logprobs"] = question.top_logprobs
    if question.prompt_logprobs:
        values["prompt_logprobs"] = 1
    if question.guide is not None:
        for name, text in zip(GUIDE, question.guide):
            values[name] = [text.encode()]
    sequences, ends = question.stop_words[0] if question.stop_words is not None else np.zeros((2, 0), np.int32)
    if others := list(end_ids[1:]):
        moved = [end + len(others) for end in ends if end >= 0]
        sequences = [*others, *sequences]
        ends = [*range(1, len(others) + 1), *moved]
        ends += [-1] * (len(sequences) - len(ends))
    if len(sequences):
        values["stop_words_list"] = np.array([sequences, ends], dtype=np.int32)
    return values


class Engine:
    """The running model. config: the text of its config.pbtxt, which says what this version declares.

    shares: limits a client's answers in the engine, over all workers; None: no limit.
    """

    def __init__(
        self, address: str, config: str, limits: Limits, end_ids: Sequence[int], shares: Shares | None = None
    ) -> None:
        self.address, self.limits, self.end_ids, self.shares = address, limits, end_ids, shares
        parsed = text_format.Parse(config, model_config_pb2.ModelConfig())
        self.streams = bool(parsed.model_transaction_policy.decoupled)
        # "TYPE_INT32" is "INT32" in a request
        self.types = {tensor.name: model_config_pb2.DataType.Name(tensor.data_type)[5:] for tensor in parsed.input}
        self.types = {name: "BYTES" if kind == "STRING" else kind for name, kind in self.types.items()}
        # what the model takes as parameters of a request,
        # because its version has no input for it (contract.py of the torch engine)
        named = (
            parsed.parameters["request_parameters"].string_value if "request_parameters" in parsed.parameters else ""
        )
        self.parameters = frozenset(filter(None, named.split(",")))
        backend = "guided_decoding_backend"
        # NVIDIA's has the inputs since 0.17, and refuses them unless this names what makes the masks
        self.guides = GUIDE[1] in self.parameters or (
            GUIDE[1] in self.types and backend in parsed.parameters and bool(parsed.parameters[backend].string_value)
        )
        self.most_of_one = limits.max_batch_size + max(1, int(AHEAD_SHARE * limits.max_batch_size))
        self._link: grpc_link.Link | None = None
        # waiting answers, by the bucket of their client
        self._waiting: dict[int, deque[Stream]] = {}
        self._looking: asyncio.TimerHandle | None = None
        # when a token last came out of the engine, by the loop's clock
        self.last_token = float("-inf")

    def link(self) -> grpc_link.Link:
        """The connection, made by the loop that uses it."""
        if self._link is None:
            self._link = grpc_link.Link(self.address)
        return self._link

    def takes(self, name: str) -> bool:
        """Whether the model can be asked for this, by an input or a parameter."""
        return name in self.types or name in self.parameters

    def ask(
        self,
        message: bytes,
        changed: Callable[[], None],
        bucket: int | None = None,
        arrived: float = 0.0,
        name: str = "",
        likeliest: int = 0,
        of_prompt: int = 0,
    ) -> Stream:
        """Start a question, as `message_of` has it; `changed` is called whenever there is something to take.

        bucket: the client's (shares.py): its answers start in order, a few more at once than the engine has slots.
        None: they start at once.
        arrived: when its request came, by time.monotonic(), for measurements; 0: we ask it ourselves, and it is not
        measured.
        name: the id of its request, which then stands in Triton's lines and the engine's too.
        likeliest: how many other tokens are sent with each one (top_logprobs). of_prompt:
        so many log probabilities are the prompt's.
        """
        stream = Stream(self, message, changed, bucket if self.shares is not None else None, arrived, name)
        stream.likeliest, stream.of_prompt = likeliest, of_prompt
        if stream.bucket is None:
            stream.start()
        else:
            self._waiting.setdefault(stream.bucket, deque()).append(stream)
            self.advance(stream.bucket)
        return stream

    def advance(self, bucket: int) -> None:
        """Start the answers of a client that may start."""
        waiting = self._waiting.get(bucket)
        while waiting and (waiting[0].over or self._may_start(waiting[0])):
            stream = waiting.popleft()
            if not stream.over:
                stream.start()
        if waiting is not None and not waiting:
            del self._waiting[bucket]
        if self._waiting and self._looking is None:
            self._looking = asyncio.get_running_loop().call_later(LOOK_SECONDS, self._look)

    def _may_start(self, stream: Stream) -> bool:
        assert self.shares is not None and stream.bucket is not None
        return self.shares.may_start(stream.bucket, stream.turn, self.most_of_one)

    def _look(self) -> None:
        self._looking = None
        for bucket in list(self._waiting):
            self.advance(bucket)

    @property
    def waiting(self) -> int:
        """Answers of this worker that wait for their turn."""
        return sum(map(len, self._waiting.values()))

    def request(self, values: Mapping[str, Any], request_id: str, outputs: Sequence[str]) -> Any:
        """Named values as a ModelInferRequest; an empty id is left out."""
        message = service_pb2.ModelInferRequest(model_name=MODEL, id=request_id)
        for name, value in values.items():
            if name in self.parameters and name not in self.types:
                value = value[0].decode() if isinstance(value, list) else value
                kind = {str: "string_param", int: "int64_param", float: "double_param"}[type(value)]
                setattr(message.parameters[name], kind, value)
                continue
            for other in (SEED, MIN_TOKENS):
                if name in other and name not in self.types:
                    name = next(one for one in other if one in self.types)
            array = np.asarray(value, dtype=triton_to_np_dtype(self.types[name]))[None]
            message.inputs.add(name=name, datatype=self.types[name], shape=array.shape)
            if self.types[name] == "BYTES":  # one text: its length, then it
                message.raw_input_contents.append(struct.pack("<I", len(value[0])) + value[0])
            else:
                message.raw_input_contents.append(array.tobytes())
        for name in outputs:
            message.outputs.add(name=name)
        return message

    def message_of(self, values: Mapping[str, Any], outputs: Sequence[str] = ()) -> bytes:
        """Some of a request's values, serialized. Joining the bytes of Protobuf messages joins the messages: the common
        part of many requests is made once, and each request adds its own part, with its id (`named`)."""
        message = self.request(values, "", outputs)
        message.ClearField("model_name")
        return bytes(message.SerializeToString())

    def named(self, message: bytes, request_id: str) -> bytes:
        """A whole request of parts that `message_of` made."""
        head = service_pb2.ModelInferRequest(model_name=MODEL, id=request_id)
        head.parameters["triton_enable_empty_final_response"].bool_param = True
        return bytes(head.SerializeToString()) + message

    def stop(self, request_id: str) -> None:
        """The contract's own way to end a running request, for versions that do not see a cancelled call:
        one with its id and `stop`."""
        values = {"input_ids": [1], "input_lengths": [1], "request_output_len": [1], "stop": [True]}
        message = self.named(self.message_of(values, TOKENS), request_id)
        self.link().call(STREAM_INFER, message, Unheard())

    async def close(self) -> None:
        if self._link is not None:
            self._link.close()


class Chance(float):
    """A token's log probability; top: the likeliest tokens at its place, (token id, log probability) each."""

    top: list[tuple[int, float]] = []


def apart(values: Sequence[float], most: int) -> list[float]:
    """Chances from the torch engine's output: for each token its own log probability, then ids and log probabilities of
    the likeliest, in turn."""
    chances = []
    for first in range(0, len(values), 1 + 2 * most):
        chance = Chance(values[first])
        own = values[first + 1 : first + 1 + 2 * most]
        chance.top = [(int(token), value) for token, value in zip(own[::2], own[1::2])]
        chances.append(chance)
    return list(chances)


class Unheard:
    """A receiver for calls whose answer does not matter: if none comes, the server is gone, and the request too."""

    def message(self, data: bytes) -> None:
        pass

    def finished(self, status: int, details: str) -> None:
        pass


class Stream:
    """One question on its way: the part of its answer that has come and was not taken yet.

    It takes every response at once, so that a client that reads slowly never occupies a slot of the engine;
    at most max_tokens ids pile up.
    """

    def __init__(
        self,
        engine: Engine,
        message: bytes,
        changed: Callable[[], None],
        bucket: int | None,
        arrived: float = 0.0,
        name: str = "",
    ) -> None:
        self.engine, self.changed, self.bucket, self.arrived = engine, changed, bucket, arrived
        # a letter first: 0.8.0 reads leading digits as a number, and refuses the number of a running request. The
        # client's id comes last, so all ids differ whatever it is.
        self.id = f"r{uuid.uuid4().hex}" + (f"-{name}" if name else "")
        self.ids: list[int] = []
        self.log_probs: list[float] = []
        self.likeliest = 0
        # for the prompt's tokens from the second on; they come before the answer's first token,
        # perhaps in several responses
        self.of_prompt = 0
        self.prompt_log_probs: list[float] = []
        self.ended, self.cancelled = False, False
        self.failure: EngineFailed | None = None
        self.placed, self.first_token, self.last_token = 0.0, 0.0, 0.0
        # its turn is given back
        self.over = False
        self._message = message
        self._call: grpc_link.Call | None = None
        self._fast: OneToken | None = None
        self._sought = False
        self.turn = 0 if bucket is None or engine.shares is None else engine.shares.turn(bucket)

    def start(self) -> None:
        if self.bucket is not None and self.engine.shares is not None:
            self.engine.shares.give(RUNNING, self.bucket, -1)
        if self.arrived:
            self.placed = time.monotonic()
            passing.here.placed(self.placed - self.arrived)
        message, self._message = self.engine.named(self._message, self.id), b""
        self._call = self.engine.link().call(STREAM_INFER, message, self)

    def cancel(self) -> None:
        """End it, if it still runs: its slot is free for the engine's next step."""
        if self.ended or self.cancelled:
            return
        self.cancelled = True
        if self._call is not None:
            self._call.cancel()
            self.engine.stop(self.id)
        self._end()

    def _end(self) -> None:
        self.ended = True
        self._turn_over()
        self.changed()

    def _turn_over(self) -> None:
        if self.over:
            return
        self.over = True
        shares, bucket = self.engine.shares, self.bucket
        if shares is not None and bucket is not None:
            if self._call is not None:
                shares.give(RUNNING, bucket, 1)
            shares.over(bucket)
            self.engine.advance(bucket)

    # --- of the call ---

    def message(self, data: bytes) -> None:
        """One response. If it differs from the last one only by a token, it is not parsed."""
        if self._fast is not None and (token := self._fast.token(data)) is not None:
            self._took([token], ())
            return
        response = service_pb2.ModelStreamInferResponse.FromString(data)
        if response.error_message:
            log.error("%s: %s", self.id, response.error_message)
            self.failure = EngineFailed(unavailable=BUSY in response.error_message)
            self._end()
            return
        answer = response.infer_response
        outputs = {output.name: raw for output, raw in zip(answer.outputs, answer.raw_output_contents)}
        ids = np.frombuffer(outputs.get("output_ids", b""), dtype="<i4").tolist()
        if len(length := outputs.get("sequence_length", b"")) >= 4:  # the rest is padding
            ids = ids[: int.from_bytes(length[:4], "little")]
        # with the last token, where the backend says so; else the end of the call does
        final = answer.parameters["triton_final_response"].bool_param
        if final:
            self.ended = True
        log_probs: list[float] = []
        if raw := outputs.get("output_log_probs", b""):
            log_probs = np.frombuffer(raw, dtype="<f4").tolist()
            log_probs = apart(log_probs, self.likeliest) if self.likeliest else log_probs
            missing = self.of_prompt - len(self.prompt_log_probs)
            self.prompt_log_probs += log_probs[:missing]
            log_probs = log_probs[missing:][: len(ids)]
        if ids:
            if not self._sought and not final and len(ids) == 1 and not log_probs:
                self._fast, self._sought = one_token(data, ids[0]), True
            self._took(ids, log_probs)
        elif final:
            self._end()
        if final:
            self._turn_over()

    def finished(self, status: int, details: str) -> None:
        if status != grpc_link.OK and not self.ended:
            log.error("%s: gRPC status %d: %s", self.id, status, details)
            self.failure = EngineFailed(unavailable=status == grpc_link.UNAVAILABLE)
        self._end()

    def _took(self, ids: Sequence[int], log_probs: Sequence[float]) -> None:
        self.ids += ids
        self.log_probs += log_probs
        now = time.monotonic()
        if not self.arrived:
            pass
        elif self.last_token:
            passing.here.token(now - self.last_token, len(ids))
        else:
            self.first_token = now
            passing.here.first_token(now - self.arrived, len(ids))
        self.last_token = now
        self.engine.last_token = now
        self.changed()


@dataclass(frozen=True)
class OneToken:
    """Responses of one answer that differ only in their token: the bytes before and after its four bytes."""

    before: bytes
    after: bytes

    def token(self, data: bytes) -> int | None:
        at = len(self.before)
        if len(data) == at + 4 + len(self.after) and data.startswith(self.before) and data.endswith(self.after):
            return int.from_bytes(data[at : at + 4], "little", signed=True)
        return None


def one_token(data: bytes, token: int) -> OneToken | None:
    """The position of the token in a response; None unless replacing its bytes gives a response that differs only in
    the token."""
    written, other = token.to_bytes(4, "little", signed=True), (token ^ 0x5A).to_bytes(4, "little", signed=True)
    at = data.find(written)
    while at >= 0:
        found = OneToken(data[:at], data[at + 4 :])
        if _says(found.before + other + found.after, data, written, other):
            return found
        at = data.find(written, at + 1)
    return None


def _says(changed: bytes, data: bytes, written: bytes, other: bytes) -> bool:
    """Whether a changed response has the other token, and no other difference."""
    try:
        response = service_pb2.ModelStreamInferResponse.FromString(changed)
    except DecodeError:
        return False
    answer = response.infer_response
    index = next((n for n, output in enumerate(answer.outputs) if output.name == TOKENS[0]), len(answer.outputs))
    if index >= len(answer.raw_output_contents) or answer.raw_output_contents[index] != other:
        return False
    answer.raw_output_contents[index] = written
    return bool(response == service_pb2.ModelStreamInferResponse.FromString(data))
