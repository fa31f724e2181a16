"""One client of Triton over gRPC, for `make ask`, the benchmarks and the tests. Needs tritonclient,
which NVIDIA's containers lack."""

from __future__ import annotations

import queue
from typing import Any, Iterator, Mapping, Sequence

import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

# gRPC has its own variable and option for proxies
NO_PROXY = [("grpc.enable_http_proxy", 0)]
# numpy's letter of a type -> Triton's word
TYPES = {"O": "BYTES", "?": "BOOL", "i": "INT32", "l": "INT64", "L": "UINT64", "f": "FP32", "e": "FP16"}
FINAL = "triton_final_response"


def texts(*values: str | bytes) -> Any:
    """(1, n) of bytes. What of a str is not UTF-8 goes as it was typed."""
    coded = [value if isinstance(value, bytes) else value.encode("utf-8", "surrogateescape") for value in values]
    return np.array([coded], dtype=object)


def ints(*values: int) -> Any:
    """(1, n) of int32."""
    return np.array([values], dtype=np.int32)


def floats(*values: float) -> Any:
    """(1, n) of float32."""
    return np.array([values], dtype=np.float32)


def yes(value: bool = True) -> Any:
    """(1, 1) of bool."""
    return np.array([[value]])


def inputs_of(values: Mapping[str, Any]) -> list[Any]:
    """Arrays by the names of a model's inputs, as tritonclient sends them."""
    inputs = []
    for name, value in values.items():
        inputs.append(triton.InferInput(name, list(value.shape), TYPES[value.dtype.char]))
        inputs[-1].set_data_from_numpy(value)
    return inputs


def message_of(model: str, values: Mapping[str, Any]) -> Any:
    """The same as one protobuf message, which a benchmark sends again and again."""
    message = triton.service_pb2.ModelInferRequest(model_name=model)
    message.parameters["triton_enable_empty_final_response"].bool_param = True
    for tensor in inputs_of(values):
        message.inputs.append(tensor._get_tensor())
        message.raw_input_contents.append(tensor._get_content())
    return message


def is_final(answer: Any) -> bool:
    """Whether a response is the last of its request."""
    return bool(answer.get_response().parameters[FINAL].bool_param)


class Stream:
    """One gRPC stream, as NVIDIA's clients use it; many requests may be on their way in it. seconds:
    to wait for each response."""

    def __init__(self, address: str, seconds: float = 60) -> None:
        self.client = triton.InferenceServerClient(address, channel_args=NO_PROXY)
        self._answers: queue.Queue[Any] = queue.Queue()
        self._seconds, self._started = seconds, False

    def send(self, model: str, request_id: str = "", outputs: Sequence[str] | None = None, **values: Any) -> None:
        if not self._started:
            self._started = True
            self.client.start_stream(lambda result, error: self._answers.put(error or result))
        wanted = None if outputs is None else [triton.InferRequestedOutput(name) for name in outputs]
        self.client.async_stream_infer(
            model, inputs_of(values), request_id=request_id, outputs=wanted, enable_empty_final_response=True
        )

    def next(self) -> Any:
        """The next response; InferenceServerException for one that is an error, and for none in time."""
        try:
            answer = self._answers.get(timeout=self._seconds)
        except queue.Empty:
            raise InferenceServerException(
                f"no answer within {self._seconds:.0f} s", "StatusCode.DEADLINE_EXCEEDED"
            ) from None
        if isinstance(answer, InferenceServerException):
            raise answer
        return answer

    def until_final(self) -> Iterator[Any]:
        """The responses of the running requests, until one of the requests has ended."""
        while True:
            answer = self.next()
            if answer.get_response().outputs:
                yield answer
            if is_final(answer):
                return

    @property
    def streams(self) -> bool:
        """Whether the server streams, or (STREAMING=off) gives a request one response."""
        return bool(self.client.get_model_config("ensemble").config.model_transaction_policy.decoupled)

    def close(self, cancel: bool = False) -> None:
        self.client.stop_stream(cancel_requests=cancel)
        self.client.close()


def infer(address: str, model: str, **values: Any) -> dict[str, Any]:
    """The outputs of a request that has one response."""
    with triton.InferenceServerClient(address, channel_args=NO_PROXY) as client:
        result = client.infer(model, inputs_of(values))
        return {tensor.name: result.as_numpy(tensor.name) for tensor in result.get_response().outputs}
