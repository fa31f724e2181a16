"""Requests to Triton's models as numpy arrays, over gRPC, and what tests share of their answers."""

from __future__ import annotations

import queue
import re
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any

import numpy as np
import tritonclient.grpc as triton
from server import Served
from tritonclient.utils import InferenceServerException
from waiting import until

PROMPT = "Once upon a time"
STORY = ", in a small village surrounded by a beautiful forest, there lived a little girl named Lily."
Outputs = dict[str, Any]
TYPES = {"O": "BYTES", "?": "BOOL", "i": "INT32", "l": "INT64", "L": "UINT64", "f": "FP32", "e": "FP16"}


def texts(*values: Any) -> Any:
    return np.array([[value if isinstance(value, bytes) else value.encode() for value in values]], dtype=object)


def ints(*values: int) -> Any:
    return np.array([values], dtype=np.int32)


def floats(*values: float) -> Any:
    return np.array([values], dtype=np.float32)


def yes(value: bool = True) -> Any:
    return np.array([[value]])


def inputs_of(values: dict[str, Any]) -> list[Any]:
    inputs = []
    for name, value in values.items():
        inputs.append(triton.InferInput(name, list(value.shape), TYPES[value.dtype.char]))
        inputs[-1].set_data_from_numpy(value)
    return inputs


class Stream:
    """One gRPC stream, as NVIDIA's clients use it; many requests may be on their way in it."""

    def __init__(self, served: Served) -> None:
        self._client = triton.InferenceServerClient(served.grpc)
        self._answers: queue.Queue[Any] = queue.Queue()
        self._client.start_stream(lambda result, error: self._answers.put(error or result))

    def send(self, model: str, request_id: str = "", outputs: Sequence[str] | None = None, **values: Any) -> None:
        wanted = None if outputs is None else [triton.InferRequestedOutput(name) for name in outputs]
        self._client.async_stream_infer(
            model, inputs_of(values), request_id=request_id, outputs=wanted, enable_empty_final_response=True
        )

    def next(self) -> Any:
        answer = self._answers.get(timeout=60)
        if isinstance(answer, InferenceServerException):
            raise answer
        return answer

    def until_final(self) -> Iterator[Any]:
        """The responses of the requests on their way, until one of them has ended."""
        while True:
            answer = self.next()
            if answer.get_response().outputs:
                yield answer
            if answer.get_response().parameters["triton_final_response"].bool_param:
                return

    def close(self, cancel: bool = False) -> None:
        self._client.stop_stream(cancel_requests=cancel)
        self._client.close()


def ask(served: Served, model: str, request_id: str = "", **values: Any) -> list[Outputs]:
    """The outputs of every response to one request."""
    with closing(Stream(served)) as stream:
        stream.send(model, request_id, **values)
        return [
            {tensor.name: answer.as_numpy(tensor.name) for tensor in answer.get_response().outputs}
            for answer in stream.until_final()
        ]


def text_of(responses: list[Outputs]) -> str:
    return b"".join(response["text_output"].item() for response in responses).decode()


def tell(served: Served, model: str = "ensemble", prompt: Any = PROMPT, max_tokens: int = 12, **values: Any) -> str:
    return text_of(ask(served, model, text_input=texts(prompt), max_tokens=ints(max_tokens), **values))


def infer(served: Served, model: str, **values: Any) -> Outputs:
    with triton.InferenceServerClient(served.grpc) as client:
        result = client.infer(model, inputs_of(values))
        return {tensor.name: result.as_numpy(tensor.name) for tensor in result.get_response().outputs}


def preprocessed(served: Served, prompt: str = PROMPT, n: int = 12) -> Outputs:
    """What end_to_end_test.py sends first."""
    return infer(
        served, "preprocessing",
        QUERY=texts(prompt), REQUEST_OUTPUT_LEN=ints(n), BAD_WORDS_DICT=texts(""), STOP_WORDS_DICT=texts(""),
    )  # fmt: skip


def core_request(ids: Any, n: int, **values: Any) -> dict[str, Any]:
    """What inflight_batcher_llm_client.py always sends."""
    return {
        "input_ids": ids, "input_lengths": ints(ids.shape[1]), "request_output_len": ints(n), "beam_width": ints(1),
        "temperature": floats(1.0), "streaming": yes(False), "end_id": ints(2), "pad_id": ints(2), "return_log_probs": yes(False),
        "runtime_top_k": ints(1), "runtime_top_p": floats(0.0), **values,
    }  # fmt: skip


def is_clean(message: str) -> bool:
    """Nothing of our insides reaches a client."""
    return len(message) < 400 and not re.search(r"Traceback|File \"|\.py|/\w+/|Error:", message)


@contextmanager
def abandoned(served: Served) -> Iterator[None]:
    """The engine works on a request inside of the block, and must stop long before its 450 tokens after it."""
    until(lambda: served.active == 0, "the engine is busy before")
    before = served.metric("torch_engine_steps")
    yield
    until(lambda: served.active == 0, "the slot is not free")
    assert served.metric("torch_engine_steps") - before < 400


PROMPTS = [
    "Once upon a time",
    "The dog",
    "One day, Tom",
    "She said",
    "안녕",
    "A cat and a bird",
    "The sun was",
    "😀 Lily",
]
# What tritonserver 2.51 says on a machine without a GPU, and on every machine
NOISE = (
    "Unable to allocate pinned system memory",
    "CudaDriverHelper has not been initialized.",
    "Failed to initialize NVML",
    "DCGM unable to start",
)
