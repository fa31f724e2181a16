"""What the endpoint makes of tensorrt_llm's responses and errors, tested without a server."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tritonclient.grpc import service_pb2

from scripts.openai.engine import TOKENS, Engine, Limits, Stream


class Link:
    """A connection that keeps what was asked."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def call(self, path: str, message: bytes, heard: Any) -> Any:
        self.asked.append(service_pb2.ModelInferRequest.FromString(message))
        return SimpleNamespace(cancel=lambda: None)


def stream(said: list[Any]) -> Any:
    """A Stream that has read what a server said: responses (name -> array) or the text of an error."""
    link: Any = Link()
    config = 'input [{name: "input_ids", data_type: TYPE_INT32}] model_transaction_policy {decoupled: true}'
    asked = Engine("127.0.0.1:1", config, Limits(1, 8, 16, 9), end_ids=[2])
    asked._link = link
    found: Any = Stream(asked, asked.message_of({"input_ids": [1, 2]}, TOKENS), lambda: None, None)
    found.start()
    for one in said:
        found.message(response(one).SerializeToString())
    [found.sent] = link.asked
    return found


def response(said: Any) -> Any:
    if isinstance(said, str):
        return service_pb2.ModelStreamInferResponse(error_message=said)
    whole = service_pb2.ModelStreamInferResponse()
    for name, array in said.items():
        whole.infer_response.outputs.add(name=name, datatype="INT32", shape=array.shape)
        whole.infer_response.raw_output_contents.append(array.tobytes())
    return whole


def test_padding_behind_sequence_length_is_cut() -> None:
    padded = {"output_ids": np.array([[[5, 6, -1]]], np.int32), "sequence_length": np.array([[2]], np.int32)}
    assert stream([padded, {"output_ids": np.array([[[7]]], np.int32)}]).ids == [5, 6, 7]


def test_both_outputs_are_named_and_the_id_begins_with_a_letter() -> None:
    """From TensorRT-LLM 0.10 on, and for 0.8.0 (docker/contracts/backend-rules)."""
    asked = stream([]).sent
    assert {output.name for output in asked.outputs} >= {"output_ids", "sequence_length"}
    assert asked.id[0].isalpha()


@pytest.mark.parametrize(
    ("said", "unavailable"),
    [
        ("Maximum queue size of 8 has been reached, please try again later", True),
        ("Executor failed process requestId 3 due to the following error: CUDA (/a/b.cpp:1)\n1 0x7f", False),
    ],
)
def test_a_full_queue_is_told_apart_from_a_failure_and_neither_shows_the_engines_text(
    said: str, unavailable: bool
) -> None:
    failure = stream([said]).failure
    assert failure.unavailable is unavailable and str(failure) == "the engine could not serve the request"
