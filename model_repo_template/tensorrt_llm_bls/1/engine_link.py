"""The way from a text model to tensorrt_llm in the same server: Triton's own gRPC port, all requests on one stream.

Not the Python backend's call for this (BLS, exec(decoupled=True)): with 32 streams it ends the server within seconds (seen with
Triton 2.51). It drops what an answer was made of in a thread that does not hold Python's lock (Stub::SendCleanupId), and keeps its
running calls in a map that several threads change at once (ModelInstanceState::infer_payload_). It also holds one of 32 threads for
every request that waits for its first token. May go when both are mended upstream.
"""

import asyncio
import threading
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence

import grpc
import numpy as np
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import np_to_triton_dtype, triton_to_np_dtype

Array = np.ndarray[Any, Any]
MODEL = "tensorrt_llm"
# Logits of a whole prompt are some hundred megabytes.
OPTIONS = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
# How long the stream is kept when no request is on its way. tritonserver does not end before it is closed.
LINGER_SECONDS = 0.5
FINAL = "triton_final_response"


class Failed(Exception):
    """What tensorrt_llm answers instead of tokens; the text is its own. is_refusal: the request is at fault (a stream does not say)."""

    def __init__(self, message: str, is_refusal: bool = False) -> None:
        super().__init__(message)
        self.is_refusal = is_refusal


# Is given what comes for a request: any number of ModelInferResponse, then None, or a Failed instead.
Receive = Callable[[Any], None]


class EngineLink:
    """Asks tensorrt_llm. All methods may be called from any thread; what is received is handed over in a thread of the link's own."""

    def __init__(self, address: str, decoupled: bool) -> None:
        """decoupled: Triton's mode of tensorrt_llm. Undecoupled models take unary calls, which do not wait for each other."""
        self._address, self._decoupled = address, decoupled
        self._receivers: Dict[str, Receive] = {}
        self._stream: Any = None
        self._outgoing: asyncio.Queue[Any] = asyncio.Queue()
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="engine link", daemon=True)
        self._thread.start()

    def ask(self, request_id: str, inputs: Mapping[str, Array], outputs: Sequence[str], receive: Receive) -> None:
        """Send a request; `receive` gets each response as it comes, then None, or a Failed instead."""
        message = request_message(request_id, inputs, outputs)
        message.parameters["triton_enable_empty_final_response"].bool_param = True
        self._loop.call_soon_threadsafe(self._ask, message, receive)

    def stop(self, request_id: str) -> None:
        """End a running request with what it has: the contract's `stop` input, with the same request id."""
        one = np.array([[1]], dtype=np.int32)
        inputs = dict.fromkeys(("input_ids", "input_lengths", "request_output_len"), one)
        message = request_message(request_id, {**inputs, "stop": np.array([[True]])}, ["output_ids"])
        self._loop.call_soon_threadsafe(self._ask, message, None)

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

    def _start(self, work: Any) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)  # the loop itself keeps no reference
        task.add_done_callback(self._tasks.discard)

    def _ask(self, message: Any, receive: Optional[Receive]) -> None:
        if not self._decoupled:
            self._start(self._unary(message, receive))
            return
        if receive is not None:
            self._receivers[message.id] = receive
        if self._stream is None:
            self._stream, self._outgoing = self._stub.ModelStreamInfer(), asyncio.Queue()
            self._start(self._write(self._stream, self._outgoing))
            self._start(self._read(self._stream))
        self._outgoing.put_nowait(message)

    async def _unary(self, message: Any, receive: Optional[Receive]) -> None:
        try:
            response = await self._stub.ModelInfer(message)
        except grpc.RpcError as error:
            if receive is not None:
                receive(Failed(error.details(), error.code() is grpc.StatusCode.INVALID_ARGUMENT))
            return
        if receive is not None:
            receive(response)
            receive(None)

    async def _write(self, stream: Any, outgoing: "asyncio.Queue[Any]") -> None:
        try:
            while (message := await outgoing.get()) is not None:
                await stream.write(message)
            await stream.done_writing()
        except (grpc.RpcError, asyncio.InvalidStateError):
            pass  # the reader tells

    async def _read(self, stream: Any) -> None:
        why = Failed("the stream to tensorrt_llm has ended")
        try:
            while (answer := await stream.read()) is not grpc.aio.EOF:
                self._hand_over(answer)
        except grpc.RpcError as error:
            why = Failed(f"tensorrt_llm does not answer: {error.details()}")
        if stream is self._stream:
            self._stream = None
            receivers, self._receivers = self._receivers, {}
            for receive in receivers.values():
                receive(why)

    def _hand_over(self, answer: Any) -> None:
        response = answer.infer_response
        receive = self._receivers.get(response.id)
        if receive is None:  # answers to a request to stop
            return
        is_last = bool(answer.error_message) or response.parameters[FINAL].bool_param
        if answer.error_message:
            receive(Failed(answer.error_message))
        elif response.outputs:
            receive(response)
        if is_last:
            del self._receivers[response.id]
            if not answer.error_message:
                receive(None)
            if not self._receivers:
                self._loop.call_later(LINGER_SECONDS, self._close_if_idle, self._stream)

    def _close_if_idle(self, stream: Any) -> None:
        if stream is self._stream and not self._receivers:
            self._stream = None
            self._outgoing.put_nowait(None)


def request_message(request_id: str, inputs: Mapping[str, Array], outputs: Sequence[str]) -> Any:
    """A ModelInferRequest. No input holds text: tensorrt_llm has none."""
    message = service_pb2.ModelInferRequest(model_name=MODEL, id=request_id)
    for name, value in inputs.items():
        message.inputs.add(name=name, datatype=np_to_triton_dtype(value.dtype), shape=value.shape)
        message.raw_input_contents.append(value.tobytes())
    for name in outputs:
        message.outputs.add(name=name)
    return message


def outputs_of(response: Any) -> Dict[str, Array]:
    """The tensors of a ModelInferResponse."""
    contents: List[bytes] = list(response.raw_output_contents)
    return {
        output.name: np.frombuffer(content, dtype=triton_to_np_dtype(output.datatype)).reshape(output.shape)
        for output, content in zip(response.outputs, contents)
    }
