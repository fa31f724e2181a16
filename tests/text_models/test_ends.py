"""An answer ends at any of the tokens that the model names, through every door,
where transformers' generate ends it."""

from __future__ import annotations

import json
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from project import ROOT, copy_of_project
from published import write_published
from server import Served, end_tree_of, serve

sys.path.insert(0, str(ROOT / "model_repo_template/tensorrt_llm_bls/1"))

from answer import Answer  # noqa: E402
from text import Text  # noqa: E402

PROMPTS = ["hello", "a b c", "The end", "x", "0123", "Zebra!"]
MOST = 24


@torch.inference_mode()
def generated(model: Any, prompt: str, ends: list[int]) -> list[int]:
    """What transformers' generate adds to the prompt; the end that it ends at is its last token."""
    ids = torch.tensor([list(prompt.encode())])
    said = model.generate(ids, max_new_tokens=MOST, do_sample=False, eos_token_id=ends or None, pad_token_id=0)
    return [int(token) for token in said[0, ids.shape[1] :]]


def names_of_ends(model: Any) -> list[int]:
    """Two ends: one that transformers' answers to the prompts come to, none of them at once,
    and one that they never do."""
    answers = [generated(model, prompt, []) for prompt in PROMPTS]
    firsts = {answer[0] for answer in answers}
    late = [token for answer in answers for token in answer[2:] if token not in firsts and token < 256]
    never = next(token for token in range(256) if not any(token in answer for answer in answers))
    return [never, late[0]]


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, Any, list[int]]]:
    """A model that names its second end in config.json alone: the first is generation_config.json's."""
    folder = tmp_path_factory.mktemp("ends")
    model = write_published(folder / "model")
    ends = names_of_ends(model)
    write_published(
        folder / "model",
        **dict[str, Any]({"generation_config.json": {"eos_token_id": ends[0]}, "config.json": {"eos_token_id": ends}}),
    )
    running = serve(copy_of_project(folder / "tree"), f"MODEL={folder / 'model'}", "TP=1")
    yield running, model, ends
    if running.end() != 0:
        end_tree_of(running.process)


def completion(served: Served, prompt: str, **more: Any) -> dict[str, Any]:
    body = {"model": "model", "prompt": prompt, "max_tokens": MOST, "temperature": 0, **more}
    request = urllib.request.Request(
        f"{served.openai}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return dict(json.loads(answer.read()))


def test_finish_reasons_and_counts_are_those_of_generate(ended: tuple[Served, Any, list[int]]) -> None:
    served, model, ends = ended
    reasons = set()
    for prompt in PROMPTS:
        expected = generated(model, prompt, [*ends, 257])
        reached = expected[-1] in [*ends, 257]
        said = completion(served, prompt)
        reasons.add(said["choices"][0]["finish_reason"])
        # the end itself is not part of the answer
        assert said["usage"]["completion_tokens"] == len(expected) - reached, prompt
        assert said["choices"][0]["finish_reason"] == ("stop" if reached else "length")
        text = bytes(token for token in expected if token < 256 and not (reached and token == expected[-1] in ends))
        for name in ("ensemble", "tensorrt_llm_bls"):
            assert served.post(name, text_input=prompt, max_tokens=MOST)["text_output"] == said["choices"][0]["text"]
        assert said["choices"][0]["text"] == text.decode("utf-8", "replace")
        core: dict[str, Any] = {
            "input_ids": list(prompt.encode()),
            "input_lengths": len(prompt),
            "request_output_len": MOST,
        }
        out = served.post("tensorrt_llm", **core, end_id=ends[1], streaming=False)["output_ids"]
        assert (out if isinstance(out, list) else [out])[-max(len(expected) - reached, 1) :] == expected[
            : len(expected) - reached
        ]
    assert "stop" in reasons


def test_a_clients_own_end_is_the_only_one(ended: tuple[Served, Any, list[int]]) -> None:
    served, model, ends = ended
    prompt = next(prompt for prompt in PROMPTS if generated(model, prompt, ends)[-1] == ends[1])
    whole = served.post("ensemble", text_input=prompt, max_tokens=MOST, end_id=-1)["text_output"]
    said = bytes(token for token in generated(model, prompt, []) if token < 256)
    assert whole == said.decode("utf-8", "replace")


def test_no_end_comes_before_the_least_length(ended: tuple[Served, Any, list[int]]) -> None:
    """transformers' min_new_tokens forbids all ends, not the first one alone."""
    served, model, ends = ended
    prompt = next(prompt for prompt in PROMPTS if generated(model, prompt, ends)[-1] == ends[1])
    ids = torch.tensor([list(prompt.encode())])
    with torch.inference_mode():
        said = model.generate(
            ids, max_new_tokens=MOST, min_new_tokens=20, do_sample=False, eos_token_id=[*ends, 257], pad_token_id=0
        )[0, ids.shape[1] :].tolist()
    answer = completion(served, prompt, min_tokens=20)
    assert answer["usage"]["completion_tokens"] == len(said) - (said[-1] in (*ends, 257)) >= 20


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_published(tmp_path / "model", **dict[str, Any]({"generation_config.json": {"eos_token_id": [257, 98]}}))
    return tmp_path / "model"


def test_an_end_that_the_engine_sends_is_cut_off(folder: Path) -> None:
    """TensorRT-LLM takes one end_id; what ends as a stop word comes with the answer,
    and what came with it is not shown."""
    text = Text(folder)
    assert text.end_ids == [257, 98]
    answer = Answer(
        text,
        [],
        {"output_log_probs": np.float32, "num_output_tokens": np.int32},
        ["output_log_probs", "num_output_tokens"],
        3,
        end_ids=text.end_ids,
    )
    sent = {
        "output_ids": np.array([[[104, 105, 98]]]),
        "output_log_probs": np.array([[[-1.0, -2.0, -3.0]]], np.float32),
    }
    assert answer.push(sent) and answer.stopped
    values = answer.take()
    assert (values["text_output"], values["num_output_tokens"].item()) == ("hi", 2)
    assert values["output_log_probs"].tolist() == [[[-1.0, -2.0]]]


def test_other_ends_are_stop_words_of_one_token(folder: Path) -> None:
    text = Text(folder)
    assert text.word_list([], tokens=text.end_ids[1:]).tolist() == [[[98], [1]]]
    assert text.word_list(["ab"], tokens=[98]).tolist()[0][0][0] == 98


def test_text_that_a_stop_string_held_back_is_shown_at_an_end(folder: Path) -> None:
    text = Text(folder)
    answer = Answer(text, ["hix"], {}, [], 1, end_ids=text.end_ids)
    assert not answer.push({"output_ids": np.array([[[104, 105]]])})
    assert answer.push({"output_ids": np.array([[[98]]])})
    assert answer.take()["text_output"] == "hi"
