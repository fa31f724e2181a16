"""What the endpoint makes of tensorrt_llm's responses and errors, without a server."""

import asyncio
from types import SimpleNamespace
from typing import Any, Dict, List

import numpy as np
import pytest
from tritonclient.utils import InferenceServerException

from scripts.openai import engine


def stream(said: List[Any]) -> Any:
    """A Stream that has read what a server said: responses (name -> array) or errors."""

    async def responses() -> Any:
        for one in said:
            yield (None, one) if isinstance(one, Exception) else (result(one), None)

    async def read() -> Any:
        asked: Any = SimpleNamespace(
            streams=True, end_id=2, types={}, last_token=0.0, limits=SimpleNamespace(vocab_size=9),
            request=lambda values, request_id, outputs: {"request_id": request_id, "outputs": outputs},
            client=lambda: SimpleNamespace(stream_infer=lambda request: responses()),
        )  # fmt: skip
        question = engine.Question(ids=[1, 2], max_tokens=4)
        reading = engine.Stream(asked, question, lambda: None)
        sent.update(reading._request)
        await reading._task
        return reading

    sent: Dict[str, Any] = {}
    found = asyncio.run(read())
    found.sent = sent
    return found


def result(arrays: Dict[str, Any]) -> Any:
    final = {"triton_final_response": SimpleNamespace(bool_param=False)}
    return SimpleNamespace(as_numpy=arrays.get, get_response=lambda: SimpleNamespace(parameters=final))


def test_padding_behind_sequence_length_is_cut() -> None:
    padded = {"output_ids": np.array([[[5, 6, -1]]], np.int32), "sequence_length": np.array([[2]], np.int32)}
    assert stream([padded, {"output_ids": np.array([[[7]]], np.int32)}]).ids == [5, 6, 7]


def test_both_outputs_are_named_and_the_id_begins_with_a_letter() -> None:
    """From TensorRT-LLM 0.10 on, and for 0.8.0 (docker/contracts/backend-rules)."""
    asked = stream([]).sent
    assert set(asked["outputs"]) >= {"output_ids", "sequence_length"}
    assert asked["request_id"][0].isalpha()


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
    failure = stream([InferenceServerException(said)]).failure
    assert failure.unavailable is unavailable and str(failure) == "the engine could not serve the request"
