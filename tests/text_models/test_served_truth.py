"""The real server's greedy tokens and logits are those that transformers computes from the stored weights."""

from __future__ import annotations

import queue
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tritonclient.grpc as triton
from project import make
from server import Served
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPTS = [
    "Once upon a time", "One day, a little bear", "Lily and Tom went to the park", "The sun was", "In a small village",
    "  two spaces first", "The old man said", "A dog named Max", "It was raining", "Her mother told her",
    "The end of the story is", "\"Hello!\" said the fox.", "Numbers like 1, 2, 3", "In the deep forest", "Tim had a red ball",
    "Sara was sad because", "They found a box. Inside", "Every night the owl", "My name is", "안녕하세요, 옛날 옛적에",
    "🦊 and 🐻 were friends", "Why do stars shine?",
]  # fmt: skip
NEW_TOKENS = 24
TYPES = {"int32": "INT32", "bool": "BOOL"}


def served_answer(
    client: Any, answers: queue.Queue[tuple[Any, Any]], ids: list[int]
) -> tuple[list[int], np.ndarray[Any, Any]]:
    """(generated token ids, their logits) of one greedy request to the model tensorrt_llm."""
    values: dict[str, np.ndarray[Any, Any]] = {
        "input_ids": np.array([ids], dtype=np.int32),
        "input_lengths": np.array([[len(ids)]], dtype=np.int32),
        "request_output_len": np.array([[NEW_TOKENS]], dtype=np.int32),
        "end_id": np.array([[2]], dtype=np.int32),
        "return_generation_logits": np.array([[True]]),
        "streaming": np.array([[False]]),
    }
    inputs = []
    for name, value in values.items():
        inputs.append(triton.InferInput(name, list(value.shape), TYPES[str(value.dtype)]))
        inputs[-1].set_data_from_numpy(value)
    client.async_stream_infer("tensorrt_llm", inputs)
    result, error = answers.get(timeout=60)
    assert error is None, error
    return result.as_numpy("output_ids").reshape(-1).tolist(), result.as_numpy("generation_logits")[0, 0]


def test_served_tokens_and_logits_are_those_of_transformers(served: Served) -> None:
    assert make(served.tree, "hf").returncode == 0
    hf = Path(served.tree) / "build/stories/hf"
    model: Any = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(hf)
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    with triton.InferenceServerClient(served.grpc) as client:
        client.start_stream(lambda result, error: answers.put((result, error)))
        for prompt in PROMPTS:
            ids = tokenizer(prompt)["input_ids"]
            tokens, logits = served_answer(client, answers, ids)
            with torch.no_grad():  # one row for each token of the answer, and one for what follows it
                expected = model(torch.tensor([ids + tokens])).logits[0, len(ids) - 1 :]
            best = expected.argmax(-1).tolist()
            assert tokens == best[: len(tokens)], prompt
            assert len(tokens) == NEW_TOKENS or best[len(tokens)] == 2, f"{prompt}: ended before the end token"
            assert np.abs(logits - expected[: len(tokens)].numpy()).max() < 1e-4, prompt
        client.stop_stream()
    assert len(PROMPTS) >= 20
