"""Asks the model tensorrt_llm over gRPC: token ids in, token ids out, as they come; its contract is in docker/contracts/backend."""

import asyncio
import json
import logging
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, AsyncIterator, Callable, Dict, List, Mapping, Optional, Sequence

import grpc
import numpy as np
import tritonclient.grpc.aio as triton
from google.protobuf import text_format  # type: ignore[import-untyped]
from tritonclient.grpc import model_config_pb2
from tritonclient.utils import InferenceServerException, triton_to_np_dtype

from scripts.limits import limits_of

log = logging.getLogger("openai")

MODEL = "tensorrt_llm"
# From TensorRT-LLM 0.10 on a request that names outputs must name both, or its first token is answered with an error.
TOKENS = ("output_ids", "sequence_length")
# What TensorRT-LLM says, with the code INTERNAL, when its queue is full
BUSY = "Maximum queue size of"
# Whatever divides logits by less leaves no finite float32: it is greedy.
MIN_TEMPERATURE = 1e-5
# Two names that versions gave to one input
SEED, MIN_TOKENS = ("random_seed", "seed"), ("min_length", "min_tokens")
# We may be there before Triton is, and want to know at once when it comes; tritonclient's own two are lost where any are given
CHANNEL = [
    ("grpc.enable_http_proxy", 0),
    ("grpc.initial_reconnect_backoff_ms", 100), ("grpc.min_reconnect_backoff_ms", 1000), ("grpc.max_reconnect_backoff_ms", 500),
    ("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1),
]  # fmt: skip


class EngineFailed(Exception):
    """The engine did not answer a request as it should; the server's log says more. unavailable: nobody was there to ask."""

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
    """What is asked of the engine, under OpenAI's names; the defaults are OpenAI's too."""

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
    # what ends an answer where the engine can see it only as tokens: int32 (1, 2, n)
    stop_words: Optional[Any] = None


def inputs_of(question: Question, end_id: Optional[int], streaming: bool, vocab_size: int) -> Dict[str, Any]:
    """The tensors of a question: name -> value of the batch's one row. Names are those of 0.8.0.

    Sampling is chosen by top_k and top_p alone: with neither TensorRT-LLM decodes greedily, whatever the temperature. What is at its
    default is left out, so that versions which lack an input are not asked for it.
    """
    values: Dict[str, Any] = {
        "input_ids": question.ids,
        "input_lengths": [len(question.ids)],
        "request_output_len": [question.max_tokens],
        "streaming": [streaming],
    }
    if end_id is not None:
        values.update(end_id=[end_id], pad_id=[end_id])
    if question.temperature < MIN_TEMPERATURE or question.top_p == 0 or question.top_k == 1:
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
    if question.stop_words is not None:
        values["stop_words_list"] = question.stop_words[0]
    return values


class Engine:
    """The running model. config: the text of its config.pbtxt, which says what this version declares."""

    def __init__(self, address: str, config: str, limits: Limits, end_id: Optional[int]) -> None:
        self.address, self.limits, self.end_id = address, limits, end_id
        parsed = text_format.Parse(config, model_config_pb2.ModelConfig())
        self.streams = bool(parsed.model_transaction_policy.decoupled)
        # "TYPE_INT32" is "INT32" in a request
        self.types = {tensor.name: model_config_pb2.DataType.Name(tensor.data_type)[5:] for tensor in parsed.input}
        self.types = {name: "BYTES" if kind == "STRING" else kind for name, kind in self.types.items()}
        self._client: Any = None
        self._background: set[asyncio.Task[None]] = set()
        # when a token last came out of the engine, by the loop's clock
        self.last_token = float("-inf")

    def client(self) -> Any:
        """The connection, made by the loop that uses it."""
        if self._client is None:
            self._client = triton.InferenceServerClient(self.address, channel_args=CHANNEL)
        return self._client

    def ask(self, question: Question, changed: Callable[[], None]) -> "Stream":
        """Start a question; `changed` is called whenever there is something to take."""
        return Stream(self, question, changed)

    def request(self, values: Mapping[str, Any], request_id: str, outputs: Sequence[str]) -> Dict[str, Any]:
        """Named values as what tritonclient's stream_infer takes."""
        tensors = []
        for name, value in values.items():
            for other in (SEED, MIN_TOKENS):
                if name in other and name not in self.types:
                    name = next(one for one in other if one in self.types)
            array = np.asarray(value, dtype=triton_to_np_dtype(self.types[name]))[None]
            tensors.append(triton.InferInput(name, list(array.shape), self.types[name]))
            tensors[-1].set_data_from_numpy(array)
        wanted = [triton.InferRequestedOutput(name) for name in outputs]
        return {"model_name": MODEL, "inputs": tensors, "outputs": wanted, "request_id": request_id}

    def stop(self, request_id: str) -> None:
        """The contract's own way to end a running request, for versions that do not see a cancelled call: one with its id and `stop`."""
        values = {"input_ids": [1], "input_lengths": [1], "request_output_len": [1], "stop": [True]}
        task = asyncio.ensure_future(self._send(self.request(values, request_id, TOKENS)))
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _send(self, request: Dict[str, Any]) -> None:
        try:
            async for _ in self.client().stream_infer(once(request), stream_timeout=10):
                pass
        except (grpc.RpcError, InferenceServerException):
            pass  # the server is gone, and the request with it

    async def close(self) -> None:
        if self._client is not None:
            await self._client.close()


async def once(request: Dict[str, Any]) -> AsyncIterator[Dict[str, Any]]:
    yield request


class Stream:
    """One question on its way: what has come of its answer and was not taken yet.

    A task of its own reads, so that a client who reads slowly never keeps a slot of the engine; at most max_tokens ids pile up.
    """

    def __init__(self, engine: Engine, question: Question, changed: Callable[[], None]) -> None:
        self.engine, self.changed = engine, changed
        # a letter first: 0.8.0 reads what begins with digits as a number, and refuses one that it is working on
        self.id = f"r{uuid.uuid4().hex}"
        self.ids: List[int] = []
        self.log_probs: List[float] = []
        self.ended, self.cancelled = False, False
        self.failure: Optional[EngineFailed] = None
        values = inputs_of(question, engine.end_id, engine.streams, engine.limits.vocab_size)
        outputs = [*TOKENS, *(["output_log_probs"] if question.logprobs else [])]
        self._request = engine.request(values, self.id, outputs)
        self._call: Any = None
        self._task = asyncio.ensure_future(self._read())

    def cancel(self) -> None:
        """End it, if it still runs: its slot is free for the engine's next step."""
        if self.ended or self.cancelled:
            return
        self.cancelled = True
        if self._call is not None:
            self._call.cancel()
            self.engine.stop(self.id)
        self._task.cancel()

    async def _read(self) -> None:
        try:
            # the request side closes at once; Triton closes the other when every response is out
            self._call = self.engine.client().stream_infer(once(self._request))
            del self._request
            async for result, error in self._call:
                if error is not None:
                    log.error("%s: %s", self.id, error)
                    self.failure = EngineFailed(unavailable=BUSY in str(error))
                    break
                self._take(result)
        except grpc.RpcError as error:
            if not self.cancelled:
                code = error.code() if isinstance(error, grpc.aio.AioRpcError) else None
                log.error("%s: %s %s", self.id, code, error.details() if code else error)
                self.failure = EngineFailed(unavailable=code == grpc.StatusCode.UNAVAILABLE)
        except Exception as error:  # of ours: the client must not wait for ever
            log.exception("%s: %s", self.id, error)
            self.failure = EngineFailed()
        finally:
            self.ended = True
            self.changed()

    def _take(self, result: Any) -> None:
        ids = result.as_numpy("output_ids")
        lengths = result.as_numpy("sequence_length")
        if ids is not None and lengths is not None:  # what lies behind is padding
            ids = ids.reshape(-1)[: lengths.item(0)]
        if ids is not None and ids.size:
            self.ids += ids.reshape(-1).tolist()
            log_probs = result.as_numpy("output_log_probs")
            if log_probs is not None:
                self.log_probs += log_probs.reshape(-1).tolist()[: ids.size]
            self.engine.last_token = asyncio.get_running_loop().time()
        # with the last token, where the backend says so; else the end of the call does
        if result.get_response().parameters["triton_final_response"].bool_param:
            self.ended = True
        if self.ids or self.ended:
            self.changed()
