"""`echo` with `logprobs`: a prompt's tokens and how likely they are, as programs ask that measure models (lm-eval);
the real server."""

from __future__ import annotations

import math
from typing import Any

import openai
import pytest
from server import Served
from tiny_model import STORIES_NETWORK, log_probs_of_next, oracle, story_weights
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

PROMPTS = ["Once upon a time there was a little dog", "The sun, 한글 and\nx", "a"]


def ask(served: Served, **more: Any) -> Any:
    client: Any = openai.OpenAI(base_url=f"{served.openai}/v1", api_key="x", max_retries=0, timeout=60)
    return client.completions.create(**{"model": "stories", "temperature": 0, "echo": True, "logprobs": 1, **more})


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return oracle(STORIES_NETWORK, story_weights())


@pytest.fixture(scope="module")
def tokenizer(served: Served) -> Tokenizer:
    [found] = served.tree.glob(
        "build/stories/torch-0.8.0-tp2-float16/model_repo/preprocessing/1/tokenizer/tokenizer.json"
    )
    return Tokenizer.from_file(str(found))


def check(told: Any, ids: list[int], text: str, model: LlamaForCausalLM, tokenizer: Tokenizer) -> None:
    """What is told of these tokens, at the beginning of an answer, is what transformers computes."""
    expected = log_probs_of_next(model, ids)
    assert told.token_logprobs[0] is None and told.top_logprobs[0] is None
    for place, token in enumerate(ids[1:], 1):
        assert math.isclose(told.token_logprobs[place], float(expected[place - 1, token]), abs_tol=2e-3)
        [(best, value)] = told.top_logprobs[place].items()
        assert math.isclose(value, float(expected[place - 1].max()), abs_tol=2e-3)
        # lm-eval: whether the model would have said it
        assert (told.tokens[place] == best) == (int(expected[place - 1].argmax()) == token)
    assert len(told.tokens) == len(told.token_logprobs) == len(told.text_offset)
    assert told.text_offset == sorted(told.text_offset) and told.text_offset[-1] <= len(text)


def test_prompts_are_told_as_transformers_has_them(
    served: Served, model: LlamaForCausalLM, tokenizer: Tokenizer
) -> None:
    ids = [tokenizer.encode(text).ids for text in PROMPTS]
    for prompt in (PROMPTS, ids):
        nothing = ask(served, prompt=prompt, max_tokens=0)
        one = ask(served, prompt=prompt, max_tokens=1)
        assert (nothing.usage.completion_tokens, one.usage.completion_tokens) == (0, 3)
        for number, (own, text) in enumerate(zip(ids, PROMPTS)):
            first, second = nothing.choices[number], one.choices[number]
            assert first.text == text and first.finish_reason == "length" and len(first.logprobs.tokens) == len(own)
            assert second.text.startswith(text) and len(second.logprobs.tokens) == len(own) + 1
            for told in (first, second):
                check(told.logprobs, own, told.text, model, tokenizer)
            assert second.logprobs.text_offset[-1] == len(text)
            for at, token in zip(second.logprobs.text_offset[1:], second.logprobs.tokens[1:]):
                # SentencePiece's space before the first word is not the prompt's;
                # a character of several tokens is whole with its last
                assert (
                    second.text[at:].startswith((token, token.lstrip())) or not token.isprintable() or "\ufffd" in token
                )


def test_a_stream_alternatives_and_a_long_prompt(served: Served, model: LlamaForCausalLM, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("Tom and Lily went to the park. " * 40).ids[:250]
    whole = ask(served, prompt=ids, max_tokens=4, n=2)
    first, second = (one.logprobs for one in whole.choices)
    assert first.tokens == second.tokens and len(first.tokens) == 254
    assert first.token_logprobs[1:] == pytest.approx(second.token_logprobs[1:], abs=1e-4)
    check(whole.choices[0].logprobs, ids, whole.choices[0].text, model, tokenizer)
    parts = [chunk.choices[0] for chunk in ask(served, prompt=ids, max_tokens=4, stream=True)]
    assert "".join(part.text for part in parts) == whole.choices[0].text
    for name in ("tokens", "text_offset"):
        together = [one for part in parts if part.logprobs for one in getattr(part.logprobs, name)]
        assert together == getattr(whole.choices[0].logprobs, name)
    # what the model said is as likely when it is read as when it was written
    said = ask(served, prompt="Once upon a time", max_tokens=12, echo=False, logprobs=0).choices[0]
    read = ask(served, prompt="Once upon a time" + said.text, max_tokens=0, logprobs=0).choices[0].logprobs
    assert read.token_logprobs[-12:] == pytest.approx(said.logprobs.token_logprobs, abs=2e-3)
    assert read.tokens[-12:] == said.logprobs.tokens and read.top_logprobs is None


def test_an_answer_of_nothing_needs_echo(served: Served) -> None:
    with pytest.raises(openai.BadRequestError, match="max_tokens is 0"):
        ask(served, prompt="a", max_tokens=0, echo=False)
    assert ask(served, prompt="a", max_tokens=0, logprobs=None).choices[0].text == "a"
