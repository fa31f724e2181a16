"""The way from a text model to tensorrt_llm in the same server: Triton's own gRPC port.

The Python backend has a call for this (BLS), but with 32 streams at full speed it ends the server within seconds (seen with Triton
2.51): it keeps its running calls in a map that several threads change at once (ModelInstanceState::infer_payload_), and drops what an
answer was made of in a thread that does not hold Python's lock (Stub::SendCleanupId). So it is used only where there is no gRPC
client, as in some of NVIDIA's containers. May go when both are mended upstream.
"""

import asyncio
import functools
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable, Coroutine, Deque, List, Mapping, Sequence, Tuple, Union

import numpy as np
import triton_python_backend_utils as pb_utils

try:
    import grpc
    from tritonclient.grpc import service_pb2, service_pb2_grpc
    from tritonclient.utils import np_to_triton_dtype, triton_to_np_dtype

    HAS_CLIENT = True
except ImportError:
    HAS_CLIENT = False

Array = np.ndarray[Any, Any]
MODEL = "tensorrt_llm"
# Logits of a whole prompt are some hundred megabytes.
# No proxy: the other end is this server itself.
OPTIONS = [("grpc.enable_http_proxy", 0), ("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
# How long a stream is kept when no request is on its way. tritonserver does not end before it is closed.
LINGER_SECONDS = 0.5


class Failed(Exception):
    """What tensorrt_llm answers instead of tokens; the text is its own. is_refusal: the request is at fault (a stream does not say)."""

    def __init__(self, message: str, is_refusal: bool = False) -> None:
        super().__init__(message)
        self.is_refusal = is_refusal


# Is given what comes for a request: responses (of the link's own kind, see its outputs_of), then None, or a Failed instead.
Receive = Callable[[Any], None]

# The contract's way to end a running request with what it has: another one with its id, and with these inputs
ONE = np.array([[1]], dtype=np.int32)
STOP = {"input_ids": ONE, "input_lengths": ONE, "request_output_len": ONE, "stop": np.array([[True]])}


def open_link(address: str, decoupled: bool) -> "Union[GrpcLink, BlsLink]":
    """address: of this server's gRPC port; empty where it is not to be used. decoupled: Triton's mode of tensorrt_llm."""
    return GrpcLink(address, decoupled) if HAS_CLIENT and address else BlsLink()


class GrpcLink:
    """Asks tensorrt_llm. All methods may be called from any thread; what comes is handed over in a thread of the link's own.

    A stream carries one request at a time, as with other clients that are known to work: Triton 2.51 was seen to hang, and to end,
    when a stream carried many. A stream that is free is used again.
    """

    def __init__(self, address: str, decoupled: bool) -> None:
        """An undecoupled tensorrt_llm is asked by unary calls."""
        self._address, self._work = address, self._streamed if decoupled else self._unary
        self._free: List[Tuple[float, Any]] = []  # since when, the stream
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
        """End a running request with what it has."""
        self.ask(request_id, STOP, ["output_ids"], lambda said: None)

    @staticmethod
    def outputs_of(response: Any) -> Mapping[str, Array]:
        """The tensors of a response."""
        return {
            output.name: np.frombuffer(content, dtype=triton_to_np_dtype(output.datatype)).reshape(output.shape)
            for output, content in zip(response.outputs, response.raw_output_contents)
        }

    def close(self) -> None:
        """Nothing is on its way any more."""
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
        """The latest is taken first, so what has been free for long is in front."""
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


# --- where there is no gRPC client ---

# Triton holds one of 32 threads for each request that waits for its first token, and needs some for what is sent meanwhile.
MAX_WAITING = 24
MAX_RUNNING = 256
# How long an answer is kept from being dropped: far longer than the backend's own thread takes to drop it
KEPT_SECONDS = 5.0


class BlsLink:
    """The same over the Python backend's own call, a thread for each request."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(MAX_RUNNING)
        self._waiting = threading.Semaphore(MAX_WAITING)
        self._kept: Deque[Tuple[float, Any]] = deque()

    def ask(self, request_id: str, inputs: Mapping[str, Array], outputs: Sequence[str], receive: Receive) -> None:
        self._threads.submit(self._ask, request_id, inputs, outputs, receive)

    def stop(self, request_id: str) -> None:
        for _ in self._request(request_id, STOP, ["output_ids"]).exec(decoupled=True):
            pass

    @staticmethod
    def outputs_of(response: Any) -> Mapping[str, Array]:
        return {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors()}

    def close(self) -> None:
        self._threads.shutdown()

    @staticmethod
    def _request(request_id: str, inputs: Mapping[str, Array], outputs: Sequence[str]) -> Any:
        tensors = [pb_utils.Tensor(name, value) for name, value in inputs.items()]
        return pb_utils.InferenceRequest(
            model_name=MODEL, request_id=request_id, inputs=tensors, requested_output_names=list(outputs)
        )

    def _ask(self, request_id: str, inputs: Mapping[str, Array], outputs: Sequence[str], receive: Receive) -> None:
        responses = None
        try:
            with self._waiting:  # exec() returns with the first response
                responses = self._request(request_id, inputs, outputs).exec(decoupled=True)
            for response in responses:
                if response.has_error():
                    error = response.error()
                    receive(Failed(error.message(), error.code() == pb_utils.TritonError.INVALID_ARG))
                    return
                if response.output_tensors():
                    receive(response)
            receive(None)
        except Exception as problem:
            receive(Failed(f"tensorrt_llm does not answer: {problem}"))
        finally:
            self._kept.append((time.monotonic(), responses))
            while self._kept[0][0] < time.monotonic() - KEPT_SECONDS:
                self._kept.popleft()
