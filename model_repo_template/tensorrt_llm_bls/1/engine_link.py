"""The way from a text model to tensorrt_llm in the same server: Triton's own gRPC port.

The Python backend has a call for this (BLS), but with 32 streams at full speed it crashes the server within seconds
(seen with Triton 2.51). It keeps its running calls in a map that several threads change at once
(ModelInstanceState::infer_payload_), and it frees the parts of an answer in a thread that does not hold Python's lock
(Stub::SendCleanupId). So we do not use it. NVIDIA's images have no gRPC client; docker/serving.Dockerfile adds one.
"""

from __future__ import annotations

import asyncio
import functools
import threading
import uuid
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import np_to_triton_dtype, triton_to_np_dtype

Array = np.ndarray[Any, Any]
MODEL = "tensorrt_llm"
# Since TensorRT-LLM 0.10 a request that names outputs must name both, or its first token becomes an error.
TOKENS = ("output_ids", "sequence_length")
# Logits of a whole prompt are some hundred megabytes.
# No proxy: the other end is this server itself.
OPTIONS = [("grpc.enable_http_proxy", 0), ("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
# How long a stream is kept when no request is on its way. tritonserver does not end before it is closed.
LINGER_SECONDS = 0.5


class Failed(Exception):
    """The error that tensorrt_llm sends instead of tokens, in its own words (see engine_words). is_refusal: the error's
    code says that the request is at fault. False says nothing: a stream has no code, and TensorRT-LLM's code is always
    INTERNAL."""

    def __init__(self, message: str, is_refusal: bool = False) -> None:
        super().__init__(message)
        self.is_refusal = is_refusal


# Gets what comes for a request: responses (see GrpcLink.outputs_of), then None, or a Failed instead.
Receive = Callable[[Any], None]

# The contract's way to end a running request with the tokens that it has: a second one with its id and these inputs
ONE = np.array([[1]], dtype=np.int32)
STOP = {"input_ids": ONE, "input_lengths": ONE, "request_output_len": ONE, "stop": np.array([[True]])}


def new_id() -> str:
    """A new id for a request. It begins with a letter: 0.8.0 reads leading digits as a number, and refuses a request
    with the number of a running one (docker/contracts/backend-rules, id-leading-digits-0.8.0)."""
    return f"r{uuid.uuid4().hex}"


class GrpcLink:
    """Asks tensorrt_llm. All methods may be called from any thread; the link's own thread hands over what comes.

    A stream carries one request at a time, as other working clients do: Triton 2.51 was seen to hang, and to crash,
    when a stream carried several. A free stream is used again.
    """

    def __init__(self, address: str, decoupled: bool) -> None:
        """If tensorrt_llm is not decoupled, the link uses unary calls."""
        self._address, self._work = address, self._streamed if decoupled else self._unary
        self._free: list[tuple[float, Any]] = []  # since when, the stream
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="engine link", daemon=True)
        self._thread.start()

    def ask(self, request_id: str, inputs: Mapping[str, Array], outputs: Sequence[str], receive: Receive) -> None:
        """Send a request; `receive` gets each response as it comes, then None, or a Failed instead."""
        message = request_message(request_id, inputs, outputs)
        message.parameters["triton_enable_empty_final_response"].bool_param = True
        self._loop.call_soon_threadsafe(self._start, functools.partial(self._work, message, receive))

    def stop(self, request_id: str) -> None:
        """End a running request with the tokens that it has."""
        self.ask(request_id, STOP, TOKENS, lambda said: None)

    @staticmethod
    def outputs_of(response: Any) -> Mapping[str, Array]:
        """The tensors of a response."""
        return {
            output.name: np.frombuffer(content, dtype=triton_to_np_dtype(output.datatype)).reshape(output.shape)
            for output, content in zip(response.outputs, response.raw_output_contents)
        }

    def close(self) -> None:
        """Close the link; no request may be on its way."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    # --- in the link's thread ---

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._channel = grpc.aio.insecure_channel(self._address, options=OPTIONS)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        self._loop.run_forever()
        for task in self._tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(self._channel.close(), *self._tasks, return_exceptions=True))
        self._loop.close()

    def _start(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        task = self._loop.create_task(work())
        self._tasks.add(task)  # the loop itself keeps no reference
        task.add_done_callback(self._tasks.discard)

    async def _unary(self, message: Any, receive: Receive) -> None:
        try:
            receive(await self._stub.ModelInfer(message))
            receive(None)
        except grpc.RpcError as error:
            receive(Failed(error.details(), error.code() is grpc.StatusCode.INVALID_ARGUMENT))

    async def _streamed(self, message: Any, receive: Receive) -> None:
        stream = self._free.pop()[1] if self._free else self._stub.ModelStreamInfer()
        try:
            await stream.write(message)
            while (answer := await stream.read()) is not grpc.aio.EOF:
                if answer.error_message:
                    receive(Failed(answer.error_message))
                    await self._end(stream)
                    return
                if answer.infer_response.outputs:
                    receive(answer.infer_response)
                if answer.infer_response.parameters["triton_final_response"].bool_param:
                    receive(None)
                    self._free.append((self._loop.time(), stream))
                    self._loop.call_later(LINGER_SECONDS, self._end_free)
                    return
            receive(Failed("tensorrt_llm has ended the stream"))
        except (grpc.RpcError, asyncio.InvalidStateError) as error:
            why = error.details() if isinstance(error, grpc.RpcError) else error
            receive(Failed(f"tensorrt_llm does not answer: {why}"))

    def _end_free(self) -> None:
        """Close streams that were free for long. The latest one is taken first, so these are in front."""
        while self._free and self._free[0][0] <= self._loop.time() - LINGER_SECONDS:
            _, stream = self._free.pop(0)
            self._start(functools.partial(self._end, stream))

    @staticmethod
    async def _end(stream: Any) -> None:
        try:
            await stream.done_writing()
            while await stream.read() is not grpc.aio.EOF:
                pass
        except (grpc.RpcError, asyncio.InvalidStateError):
            pass


def request_message(request_id: str, inputs: Mapping[str, Array], outputs: Sequence[str]) -> Any:
    """A ModelInferRequest. No input holds text: tensorrt_llm has none."""
    message = service_pb2.ModelInferRequest(model_name=MODEL, id=request_id)
    for name, value in inputs.items():
        message.inputs.add(name=name, datatype=np_to_triton_dtype(value.dtype), shape=value.shape)
        message.raw_input_contents.append(value.tobytes())
    for name in outputs:
        message.outputs.add(name=name)
    return message
