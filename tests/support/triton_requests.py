"""Requests to Triton's models as numpy arrays, over gRPC, and what tests share of their answers."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import closing
from typing import Any

from server import Served
from waiting import until, wins_a_race

from scripts.serving import triton_client
from scripts.serving.triton_client import floats, ints, texts, yes

PROMPT = "Once upon a time"
STORY = ", in a small village surrounded by a beautiful forest, there lived a little girl named Lily."
Outputs = dict[str, Any]


class Stream(triton_client.Stream):
    """A stream to a server of the tests."""

    def __init__(self, served: Served) -> None:
        super().__init__(served.grpc)


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
    return triton_client.infer(served.grpc, model, **values)


def preprocessed(served: Served, prompt: str = PROMPT, n: int = 12) -> Outputs:
    """What end_to_end_test.py sends first."""
    return infer(
        served,
        "preprocessing",
        QUERY=texts(prompt),
        REQUEST_OUTPUT_LEN=ints(n),
        BAD_WORDS_DICT=texts(""),
        STOP_WORDS_DICT=texts(""),
    )


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


def steps_of(served: Served, work: Callable[[Callable[[], None]], object]) -> float:
    """The steps of the engine until `work`, and all that it left behind, is over. It is called with a function that
    waits for the first of them."""
    until(lambda: served.active == 0, "the engine is busy before")
    before = served.metric("torch_engine_steps")
    work(lambda: until(lambda: served.metric("torch_engine_steps") > before, "the request has not begun"))
    until(lambda: served.active == 0, "the slot is not free")
    return served.metric("torch_engine_steps") - before


def assert_frees_its_slot(served: Served, abandon: Callable[[Callable[[], None]], object]) -> None:
    """The engine must stop long before the 450 tokens of the request that `abandon` sends and leaves."""
    assert wins_a_race(lambda: steps_of(served, abandon) < 400), "the engine works on for a client that left"


PROMPTS = ["Once upon a time", "The dog", "One day, Tom", "She said", "안녕", "A cat and a bird", "The sun was"]
PROMPTS += ["😀 Lily"]
# What tritonserver 2.51 says on a machine without a GPU, and on every machine
NOISE = (
    "Unable to allocate pinned system memory",
    "CudaDriverHelper has not been initialized.",
    "Failed to initialize NVML",
    "DCGM unable to start",
)
