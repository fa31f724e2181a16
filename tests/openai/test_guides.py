"""Answers that follow a schema, an expression or a choice, and the torch engine's other parameters,
on the real server."""

from __future__ import annotations

import json
import math
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jsonschema
import openai
import pytest
from server import Served

ASKED: dict[str, Any] = {"model": "stories", "prompt": "Once upon a time", "max_tokens": 120}
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["cat", "dog"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}
LIST = {"$ref": "#/$defs/n", "$defs": {"n": {"type": "array", "items": {"$ref": "#/$defs/n"}, "maxItems": 2}}}


def client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.openai}/v1", api_key="x", max_retries=0, timeout=60)


def said(served: Served, **more: Any) -> Any:
    return client(served).completions.create(**{**ASKED, **more}).choices


@pytest.mark.parametrize(
    "more", [{"temperature": 0}, {"seed": 1}, {"seed": 2, "n": 3}, {"seed": 3, "stream": True}], ids=str
)
def test_an_answer_follows_its_schema(served: Served, more: dict[str, Any]) -> None:
    schema: dict[str, Any] = {"extra_body": {"guided_json": PERSON}}
    if "stream" in more:
        chunks = client(served).completions.create(**ASKED, **more, **schema)
        answers = ["".join(chunk.choices[0].text for chunk in chunks)]
    else:
        choices = said(served, **more, **schema)
        assert {one.finish_reason for one in choices} == {"stop"}
        answers = [one.text for one in choices]
    for answer in answers:
        jsonschema.validate(json.loads(answer), PERSON)


def test_expressions_choices_and_recursive_schemas(served: Served) -> None:
    for n in range(3):
        [one] = said(served, seed=n, extra_body={"guided_regex": r"[0-9]{3}-[a-f]{2}"})
        assert re.fullmatch(r"[0-9]{3}-[a-f]{2}", one.text) and one.finish_reason == "stop"
        [one] = said(served, seed=n, extra_body={"guided_choice": ["</s>", "a<s></s>b<unk>"]})
        assert one.text in ("</s>", "a<s></s>b<unk>"), "text, whatever it spells"
        assert json.loads(said(served, seed=n, extra_body={"guided_json": {"const": "</s>"}})[0].text) == "</s>"
        [one] = said(served, seed=n, extra_body={"guided_choice": ["a.b", "a|c", "(d)", "한글"]})
        assert one.text in ("a.b", "a|c", "(d)", "한글")
    [one] = said(served, temperature=0, extra_body={"guided_json": LIST})
    if one.finish_reason == "stop":
        jsonschema.validate(json.loads(one.text), LIST)
    [one] = said(served, temperature=0, stop="-", extra_body={"guided_regex": r"[0-9]{3}-[a-f]{2}"})
    assert re.fullmatch(r"[0-9]{3}", one.text) and one.finish_reason == "stop"


def test_many_schemas_at_once_beside_answers_without(served: Served) -> None:
    plain = said(served, temperature=0, max_tokens=30)[0].text

    def ask(n: int) -> None:
        if n % 3 == 0:
            assert said(served, temperature=0, max_tokens=30)[0].text == plain
        else:
            schema = {
                "type": "object",
                "properties": {f"k{n}": {"const": n}},
                "required": [f"k{n}"],
                "additionalProperties": False,
            }
            assert json.loads(said(served, seed=n, extra_body={"guided_json": schema})[0].text) == {f"k{n}": n}

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(12)))


HOSTILE = [
    ({"guided_json": "{"}, "guided_json"),
    ({"guided_json": {"$ref": "http://127.0.0.1/x"}}, "guided_json"),
    ({"guided_json": {"enum": ["x" * 70_000]}}, "guided_json is larger than 65536 bytes"),
    ({"guided_regex": "("}, "guided_regex"),
    # its sixty alternatives are all open behind the first brace
    ({"guided_json": {"anyOf": [{"type": "object", "properties": {f"p{m}": {"pattern": f".*a.{{{n}}}b.*"} for m in range(10)}}
                                for n in range(60)]}}, "Current row has"),
    ({"guided_choice": []}, "guided_choice"),
    ({"guided_choice": ["a"], "guided_regex": "a"}, "only one of guided_regex and guided_choice"),
    ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos is not supported with guided_regex"),
    ({"guided_regex": "a", "min_tokens": 2}, "min_tokens is not supported with guided_regex"),
    ({"guided_grammar": "x"}, "guided_grammar is not supported"),
]  # fmt: skip


@pytest.mark.parametrize(("guide", "told"), HOSTILE, ids=range(len(HOSTILE)))
def test_a_guide_that_is_wrong_or_costs_too_much_is_a_400(served: Served, guide: dict[str, Any], told: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        said(served, extra_body=guide)
    assert told in refused.value.body["message"] and len(refused.value.body["message"]) < 500  # type: ignore[index]


def test_a_deep_schema_ends_its_reader_at_most(served: Served) -> None:
    schema: Any = {"type": "integer"}
    for _ in range(60):
        schema = {"type": "array", "items": schema, "maxItems": 1}
    deep = json.dumps(schema).replace('"integer"', '{"x":' * 5000)
    with pytest.raises(openai.BadRequestError):
        said(served, extra_body={"guided_json": deep})
    assert said(served, extra_body={"guided_choice": ["yes"]})[0].text == "yes"


def test_the_likeliest_tokens_are_told(served: Served) -> None:
    [one] = said(served, temperature=0, max_tokens=6, logprobs=3)
    told = one.logprobs
    for token, value, top in zip(told.tokens, told.token_logprobs, told.top_logprobs):
        assert len(top) == 3 and max(top, key=top.get) == token and math.isclose(max(top.values()), value, abs_tol=1e-5)
    assert told.token_logprobs == pytest.approx(
        said(served, temperature=0, max_tokens=6, logprobs=0)[0].logprobs.token_logprobs, abs=1e-5
    )


def test_min_p_leaves_the_unlikely_out(served: Served) -> None:
    greedy = said(served, temperature=0, max_tokens=20)[0].text
    assert said(served, seed=5, max_tokens=20, extra_body={"min_p": 1.0})[0].text == greedy
    assert said(served, seed=5, max_tokens=20)[0].text != greedy
