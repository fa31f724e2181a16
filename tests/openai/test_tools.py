"""Tools: what a model writes is told as calls, piece by piece; what a client sends about tools is checked and bounded, and stays text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from project import ROOT, copy_of_project
from server import Served, serve

from scripts.openai.__main__ import TOKENIZER, text_code
from scripts.openai.chat_template import ChatTemplate
from scripts.openai.engine import Engine, Limits
from scripts.openai.reader import Reader
from scripts.openai.tools import Calls, beginning, form_of, joined
from scripts.openai.wrong import ApiError

HERMES = (ROOT / "tests/support/templates/hermes.jinja").read_text()
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
USER = {"role": "user", "content": "hi"}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Seoul"}'}}

ARGUMENTS = '{"a": "}\\"<tool_call>\\\\", "b": [1, {"c": 2}]}'
SAID = [
    ("hermes", f'Sure. \n<tool_call>\n{{"name": "f", "arguments": {ARGUMENTS}}}\n</tool_call>', "Sure.", [("f", ARGUMENTS)]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {}}</tool_call>\n<tool_call>{"name": "g", "arguments": {"x": 1}}</tool_call>',
     "", [("f", "{}"), ("g", '{"x": 1}')]),
    # another order of names, and arguments as text
    ("hermes", '<tool_call>{"arguments": {"x": 1}, "name": "g"}</tool_call>', "", [("g", '{"x": 1}')]),
    ("hermes", '<tool_call>{"name": "g", "arguments": "{\\"x\\": 1}"}</tool_call>', "", [("g", '{"x": 1}')]),
    # what only looks like a call
    ("hermes", "a < b  <tool_call> no </tool_call> c <tool", "a < b  <tool_call> no </tool_call> c <tool", []),
    ("hermes", '<tool_call>{"name": "f", "argu', '<tool_call>{"name": "f", "argu', []),
    # cut in the middle: what was written is told
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "b', "", [("f", '{"a": "b')]),
    ("llama3", f'{{"name": "f", "parameters": {ARGUMENTS}}}', "", [("f", ARGUMENTS)]),
    ("llama3", '{"name": "f", "parameters": {"a": 1}}; {"name": "g", "parameters": {}}', "", [("f", '{"a": 1}'), ("g", "{}")]),
    ("llama3", '{"answer": {"name": 5}}', '{"answer": {"name": 5}}', []),
    ("llama3", 'Hello {"name": "f", "parameters": {}}', 'Hello {"name": "f", "parameters": {}}', []),
]  # fmt: skip


def told(calls: Calls, text: str, cuts: list[int]) -> Any:
    """What comes of an answer that comes in pieces."""
    ends = sorted({cut % (len(text) + 1) for cut in cuts} | {0, len(text)})
    deltas = [delta for first, last in zip(ends, ends[1:]) for delta in calls.push(text[first:last])]
    said, made = joined(deltas + calls.finish())
    return said, [(call["function"]["name"], call["function"]["arguments"]) for call in made]


@given(st.sampled_from(SAID), st.lists(st.integers(0, 1000)))
def test_calls_are_the_same_however_their_text_is_cut(said: Any, cuts: list[int]) -> None:
    form, text, content, calls = said
    assert told(Calls(form), text, cuts) == (content, calls)


def test_an_answer_that_must_be_a_call() -> None:
    for form in ("hermes", "llama3"):
        named = Calls(form, beginning(form, "f"), most=1, reason="stop")
        assert told(named, ' {"a": 1}} and more', [3, 9]) == ("", [("f", '{"a": 1}')]) and named.over
        assert told(Calls(form, beginning(form, "f"), most=1), " no JSON", [2]) == ("", [("f", "no JSON")])
    assert told(Calls("hermes", beginning("hermes", None)), 'g", "arguments": {}}</tool_call>', [1]) == (
        "",
        [("g", "{}")],
    )


def test_a_call_without_end_is_read_in_linear_time_and_given_up() -> None:
    calls = Calls("hermes")
    deltas = [delta for _ in range(3000) for delta in calls.push("<tool_call>" * 10)]
    assert len("".join(delta["content"] for delta in deltas + calls.finish())) == 3000 * 10 * 11
    assert not calls.count


def test_the_form_is_the_templates() -> None:
    assert form_of(HERMES) == "hermes"
    assert form_of('{"name": function name, "parameters": x} tool_calls {"name": "{{ x }}", "parameters": ') == "llama3"
    assert form_of("{{ tools }}<tool_call><function=x>") is None and form_of("{{ messages }}") is None


@pytest.fixture(scope="module")
def folder(served: Served) -> Path:
    [found] = (served.tree / "build/stories").glob("torch-0.8.0-tp2-float16")
    return found


def reader_of(folder: Path, template: str = HERMES) -> Reader:
    text = text_code(folder).Text(folder / TOKENIZER)
    config = (folder / "model_repo/tensorrt_llm/config.pbtxt").read_text()
    engine = Engine("127.0.0.1:1", config, Limits(8, 1000, 2000, 2048), [2])
    return Reader("m", engine, text, ChatTemplate(template, folder / TOKENIZER, text), 72)


WRONG = [
    ({"tools": [TOOL] * 10_000}, "Invalid 'tools': array too long. Expected at most 128 items, but got 10000."),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "other"}}}, "other is not among the tools"),
    ({"tool_choice": "required"}, "tool_choice is only allowed when tools are given"),
    ({"tools": [{**TOOL, "function": {**TOOL["function"], "strict": True}}]}, "strict is not supported with this tool_choice"),  # type: ignore[dict-item]
    ({"messages": [USER, {"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "f", "arguments": "{"}}]}]},
     "Invalid 'messages[1].tool_calls[0].function.arguments': it is not valid JSON"),
    ({"messages": [USER, {"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "f", "arguments": "[1]"}}]}]},
     "Invalid 'messages[1].tool_calls[0].function.arguments': it is not a JSON object"),
    ({"messages": [USER, {"role": "tool", "tool_call_id": "c9", "content": "x"}]}, "no turn before it has a tool call with this id"),
    ({"messages": [USER, {"role": "user", "content": None}]}, "content is missing"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages is not supported"),
    ({"tools": [{**TOOL, "function": {"name": "f", "parameters": {"enum": ["x" * 90] * 400}}}]}, "messages has"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "said"), WRONG, ids=range(len(WRONG)))
def test_a_wrong_request_about_tools_is_a_clear_400(folder: Path, wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ApiError) as refused:
        reader_of(folder).read(True, json.dumps({"model": "m", "messages": [USER], **wrong}).encode())
    assert refused.value.status == 400 and said in refused.value.message, refused.value.message


def test_arguments_that_nest_without_end_are_refused(folder: Path) -> None:
    deep = {**CALL, "function": {"name": "f", "arguments": '{"a":' + "[" * 100_000}}
    asked = {"model": "m", "messages": [USER, {"role": "assistant", "tool_calls": [deep]}]}
    with pytest.raises((ApiError, RecursionError)):  # reader.bounded answers 400 to both
        reader_of(folder).read(True, json.dumps(asked).encode())


def test_a_template_that_knows_no_tools_says_so(folder: Path) -> None:
    plain = reader_of(folder, (ROOT / "models/llama-2.jinja").read_text())
    for more in ({"tools": [TOOL]}, {"messages": [USER, {"role": "assistant", "tool_calls": [CALL]}]}):
        with pytest.raises(ApiError, match="chat template knows no tools") as refused:
            plain.read(True, json.dumps({"model": "m", "messages": [USER], **more}).encode())
        assert (refused.value.status, refused.value.code) == (400, "no_tools")
    plain.read(True, json.dumps({"model": "m", "messages": [USER], "tools": [TOOL], "tool_choice": "none"}).encode())


def test_the_template_sees_tools_calls_and_results(folder: Path) -> None:
    """And nothing in them becomes a special token: not in names, values, arguments, results or a client's own names."""
    asked = {
        "model": "m", "chat_template_kwargs": {"mood": "</s>"},
        "tools": [{**TOOL, "function": {"name": "weather", "parameters": {"</s>": ["</s>"]}}, "cache_control": {"type": "ephemeral"}}],
        "messages": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]},
                     {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "warm</s>", "cache_control": {}}]}],
    }  # fmt: skip
    reader = reader_of(folder)
    seen: list[int] = []
    reader.engine.message_of = lambda values, outputs=(): seen.extend(values.get("input_ids", [])) or b""  # type: ignore[method-assign,func-returns-value]
    reader.read(True, json.dumps(asked).encode())
    assert seen.count(2) == 3, "one end for each turn"
    text = reader.text.decode(seen)
    assert '{"type": "function", "function": {"name": "weather", "parameters": {"</s>": ["</s>"]}}}' in text
    assert '<tool_call>\n{"name": "weather", "arguments": {"city": "Seoul"}}\n</tool_call>' in text
    assert "tool: warm</s> (weather)" in text and text.endswith("assistant: </s>")


# --- through the real server -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def calling(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    tree = copy_of_project(tmp_path_factory.mktemp("tools") / "tree")
    (tree / "hermes.jinja").write_text(HERMES)
    running = serve(tree, "TP=1", "CHAT_TEMPLATE=hermes.jinja")
    yield running
    assert running.end() == 0, "".join(running.lines)


def made_to_say_braces(tree: Path) -> dict[str, float]:
    """A logit_bias with which an answer begins with {}: a token that was used is penalised away."""
    [found] = tree.glob("build/stories/*/" + TOKENIZER + "/tokenizer.json")
    vocabulary = json.loads(found.read_text())["model"]["vocab"]
    return {str(vocabulary["<0x7B>"]): 100.0, str(vocabulary["<0x7D>"]): 90.0}


def test_a_call_whole_and_streamed(calling: Served) -> None:
    client = openai.OpenAI(base_url=f"{calling.openai}/v1", api_key="x", max_retries=0, timeout=60)
    asked: dict[str, Any] = {
        "model": "stories", "messages": [USER], "tools": [TOOL], "temperature": 0, "max_tokens": 16,
        "tool_choice": {"type": "function", "function": {"name": "weather"}}, "logit_bias": made_to_say_braces(calling.tree),
        "extra_body": {"repetition_penalty": 100},
    }  # fmt: skip
    whole = client.chat.completions.create(**asked).choices[0]
    [call] = whole.message.tool_calls
    assert (call.type, call.function.name, call.function.arguments) == ("function", "weather", "{}")
    assert whole.message.content is None and whole.finish_reason == "stop"
    chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**asked, stream=True)]
    pieces = [piece for chunk in chunks for piece in chunk.delta.tool_calls or []]
    assert pieces[0].function.name == "weather" and pieces[0].id and pieces[0].type == "function"
    assert "".join(piece.function.arguments for piece in pieces) == "{}"
    assert [piece.index for piece in pieces] == [0] * len(pieces) and chunks[-1].finish_reason == "stop"
    required = client.chat.completions.create(
        **{**asked, "tool_choice": "required", "parallel_tool_calls": False}
    ).choices[0]
    assert required.finish_reason == "tool_calls" and required.message.tool_calls[0].function.arguments == "{}"
    free = client.chat.completions.create(**{**asked, "tool_choice": "auto", "logit_bias": {}}).choices[0]
    assert free.message.content and not free.message.tool_calls and free.finish_reason == "length"
