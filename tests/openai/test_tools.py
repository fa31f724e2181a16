"""Tools: the model's text becomes calls, piece by piece; what a client sends about tools is checked, bounded,
and stays text."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import jsonschema
import llguidance
import pytest
from hypothesis import given
from hypothesis import strategies as st
from project import ROOT
from server import Served
from tools_of_clients import CITY, STRICT, TOOL, USER

from scripts.openai.__main__ import TOKENIZER, guide_check, text_code
from scripts.openai.chat_template import ChatTemplate
from scripts.openai.engine import Engine, Limits
from scripts.openai.reader import Reader
from scripts.openai.tools import JSON_OPTIONS, Calls, beginning, form_of, grammar, joined
from scripts.openai.wrong import ApiError

sys.path.insert(0, str(ROOT / "model_repo_template/tensorrt_llm/1"))
import guides

HERMES = (ROOT / "tests/support/templates/hermes.jinja").read_text()
LOOSE: dict[str, Any] = {
    "type": "function",
    "function": {"name": "any", "parameters": {"pattern": "(?=a)b", "$ref": "x:y"}},
}
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


def reader_of(folder: Path, template: str = HERMES, guiding: bool = True) -> Reader:
    """guiding: as with the torch engine; else as with NVIDIA's backend, which is not asked to guide."""
    text = text_code(folder).Text(folder / TOKENIZER)
    config = (folder / "model_repo/tensorrt_llm/config.pbtxt").read_text()
    engine = Engine("127.0.0.1:1", config, Limits(8, 1000, 2000, 2048), [2])
    if not guiding:
        engine.guides, engine.parameters = False, frozenset()
    check = guide_check(folder) if guiding else None
    return Reader("m", engine, text, ChatTemplate(template, folder / TOKENIZER, text), 72, why_not=check)


WRONG = [
    ({"tools": [TOOL] * 10_000}, "Invalid 'tools': array too long. Expected at most 128 items, but got 10000."),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "other"}}}, "other is not among the tools"),
    ({"tool_choice": "required"}, "tool_choice is only allowed when tools are given"),
    ({"tools": [STRICT, {**STRICT, "function": {**STRICT["function"], "parameters": {"pattern": "(?=a)b", "$ref": "x:y"}}}]},
     "Invalid 'tools[1].function.parameters'"),
    ({"tools": [{**STRICT, "function": {**STRICT["function"], "parameters": {"x-guidance": {"lenient": True}, "not": {}}}}]},
     "Unimplemented keys"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"x-guidance": {"lenient": True}, "not": {}}}}},
     "Unimplemented keys"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]},
     "Invalid 'tools[0].function.parameters': the type of arguments is object"),
    ({"tools": [STRICT], "guided_regex": "a"}, "guided_regex is not supported with tools"),
    ({"tools": [STRICT], "tool_choice": "required", "response_format": {"type": "json_object"}},
     "only one of response_format and tools can guide an answer"),
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


CALLED = '<tool_call>\n{"name": "city", "arguments": {"city": "Seoul", "days": 3}}\n</tool_call>'
BEGUN = CALLED[CALLED.index("city") :]
OTHER = '<tool_call>{"name": "any", "arguments": {"x": [1]}}</tool_call>'
LLAMA = '{"name": "city", "parameters": {"city": "a//b %"}}'
COLOUR = {"type": "object", "properties": {"hue": {"type": "integer"}}, "required": ["hue"]}
# (what an answer may be, the form and settings of its grammar): a | is where it may not go on as it does
MAY = [
    (["", "any text < <tool", f"Sure. {CALLED}", f"{CALLED}\n{OTHER} and", '<tool_call>{"name": "|x', "<tool_call> |y",
      '<tool_call>{"|arguments', '<tool_call>{"name": "city", "arguments": {"|town', CALLED.replace("Seoul", "S|aigon")],
     {"form": "hermes", "begun": False, "most": 0}),
    (["any text", CALLED, f"{CALLED}|\n"], {"form": "hermes", "begun": False, "most": 1}),
    ([f"{BEGUN}\n{OTHER}", "|other", BEGUN + " |x", BEGUN + "\n"], {"form": "hermes", "begun": True, "most": 0}),
    ([BEGUN, BEGUN + "|\n"], {"form": "hermes", "begun": True, "most": 1}),
    ([CALLED, '{"hue": 5}', "|text"], {"form": "hermes", "begun": False, "most": 0, "content": COLOUR}),
    (["", "any text", f"{LLAMA}; {LLAMA}", '{"name": 5}', '{"x": 1}', '{"name": "|x', '{"name":|"city', f"{LLAMA}| x"],
     {"form": "llama3", "begun": False, "most": 0}),
    ([LLAMA, f"{LLAMA}|;"], {"form": "llama3", "begun": False, "most": 1}),
    ([f"{LLAMA}; {LLAMA}"[10:], "|other"], {"form": "llama3", "begun": True, "most": 0}),
]  # fmt: skip


@pytest.mark.parametrize(("texts", "how"), MAY, ids=range(len(MAY)))
def test_a_grammar_of_calls_lets_through_what_it_should(texts: list[str], how: dict[str, Any]) -> None:
    """By llguidance itself, byte by byte, at the engine's own limits; what is let through is read as what it is."""
    written = grammar(tools=[("city", CITY), ("any", {"type": "object"})], **how)
    assert guides.why_not("ebnf_grammar", written) is None
    for text in texts:
        matcher = llguidance.LLMatcher(llguidance.LLTokenizer("byte"), written, log_level=0, limits=guides.limits())
        allowed, found, _ = text.partition("|")
        tokens = list(text.replace("|", "", 1).encode())
        assert matcher.validate_tokens(tokens) == (len(allowed.encode()) if found else len(tokens)), text
        if not found:
            assert matcher.consume_tokens(tokens) and matcher.is_accepting(), text
            calls = Calls(how["form"], beginning(how["form"], None) if how["begun"] else "")
            _, made = joined(calls.push(text) + calls.finish())
            assert len(made) == text.count('", "arguments"') + text.count('", "parameters"')
            for call in made:
                schema = CITY if call["function"]["name"] == "city" else {"type": "object"}
                jsonschema.validate(json.loads(call["function"]["arguments"]), schema)


def test_options_are_those_of_a_schema_alone() -> None:
    assert guides.JSON_OPTIONS == JSON_OPTIONS


@pytest.mark.parametrize("choice", ["auto", "required", {"type": "function", "function": {"name": "city"}}], ids=str)
def test_an_engine_that_does_not_guide_refuses_strict_tools_by_name(folder: Path, choice: Any) -> None:
    """What it cannot promise it does not take; tools that are not strict it takes as before."""
    without = reader_of(folder, guiding=False)
    asked = {"model": "m", "messages": [USER], "tool_choice": choice}
    for some in ([STRICT], [STRICT, TOOL]):
        reader_of(folder).read(True, json.dumps({**asked, "tools": some}).encode())
        with pytest.raises(ApiError, match="^tools(: strict)? is not supported by this engine") as refused:
            without.read(True, json.dumps({**asked, "tools": some}).encode())
        assert (refused.value.param, refused.value.code) == ("tools", "unsupported_parameter")
    loose = {**STRICT, "function": {**STRICT["function"], "strict": False}}
    without.read(True, json.dumps({**asked, "tools": [loose, TOOL]}).encode())
    with pytest.raises(ApiError, match="response_format"):
        without.read(
            True,
            json.dumps(
                {"model": "m", "messages": [USER], "tools": [TOOL], "response_format": {"type": "json_object"}}
            ).encode(),
        )


def test_an_object_that_may_be_a_call_is_not_guided_as_both(folder: Path) -> None:
    """Llama 3's calls have nothing around them: what begins with a brace could be either."""
    llama = reader_of(folder, '{{ tools }}{{ messages }}{# tool_calls {"name": , "parameters": #}')
    asked = {"model": "m", "messages": [USER], "tools": [TOOL]}
    llama.read(True, json.dumps(asked).encode())
    with pytest.raises(ApiError, match="response_format is not supported with tools and this model"):
        llama.read(True, json.dumps({**asked, "response_format": {"type": "json_object"}}).encode())
    # an object that does not call a tool is text, whatever it names
    calls = Calls("llama3")
    assert joined(calls.push('{"name": "Tom"}') + calls.finish()) == ('{"name": "Tom"}', [])


def test_arguments_that_nest_without_end_are_refused(folder: Path) -> None:
    deep = {**CALL, "function": {"name": "f", "arguments": '{"a":' + "[" * 100_000}}
    asked = {"model": "m", "messages": [USER, {"role": "assistant", "tool_calls": [deep]}]}
    with pytest.raises((ApiError, RecursionError)):  # reader.bounded answers 400 to both
        reader_of(folder).read(True, json.dumps(asked).encode())


RECURSIVE = [
    # what nothing can follow, what never ends, what llguidance does not do, and what is as good as any
    ({"$ref": "#"}, "no answer can follow it"),
    ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}, "no answer can follow it"),
    ({"anyOf": [{"$ref": "#"}, {"$ref": "#"}]}, "no answer can follow it"),
    ({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}, "Too many items"),
    ({"allOf": [{"properties": {"a": {"$ref": "#"}}}, {"properties": {"a": {"allOf": [{"$ref": "#"}, {"$ref": "#"}]}}}]}, "circular"),
    ({"$dynamicRef": "#x", "$dynamicAnchor": "x"}, "Unimplemented keys"),
    ({"type": "array", "items": {"$ref": "#"}, "maxItems": 2}, ""),
    ({"$ref": "#/$defs/a0", "$defs": {"a5": {"type": "object"}, **{
        f"a{n}": {"allOf": [{"$ref": f"#/$defs/a{n + 1}"}] * 2} for n in range(5)}}}, ""),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "said"), RECURSIVE, ids=range(len(RECURSIVE)))
def test_a_recursive_schema_is_taken_or_a_clear_400(folder: Path, schema: dict[str, Any], said: str) -> None:
    """As what an answer follows, and as a strict tool's parameters."""
    reader = reader_of(folder)
    response_format = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    asked = {"model": "m", "messages": [USER]}
    told = refusal_of(reader, {**asked, "response_format": response_format})
    assert told.startswith("Invalid 'response_format': ") and said in told if said else not told
    strict = {**STRICT, "function": {"name": "city", "parameters": schema, "strict": True}}
    told = refusal_of(reader, {**asked, "tools": [strict]})
    # a tool's arguments are an object in any case
    assert (
        told.startswith("Invalid 'tools[0].function.parameters': ")
        if said
        else not told or schema.get("type") == "array"
    )


def refusal_of(reader: Reader, asked: dict[str, Any]) -> str:
    """The message of the 400; empty if the request is accepted."""
    try:
        reader.read(True, json.dumps(asked).encode())
    except ApiError as refused:
        assert refused.status == 400 and len(refused.message) < 500
        return refused.message
    return ""


def test_a_template_without_roles_or_with_few(folder: Path) -> None:
    """One that asks for no roles takes every turn; one that has no system's says so in its own words, with a 400."""
    texts = reader_of(folder, "{% for message in messages %}{{ message['content'] }} {% endfor %}")
    seen: list[int] = []
    texts.engine.message_of = lambda values, outputs=(): seen.extend(values.get("input_ids", [])) or b""  # type: ignore[method-assign,func-returns-value]
    turns = [{"role": role, "content": role} for role in ("system", "developer", "user", "assistant", "user")]
    assert refusal_of(texts, {"model": "m", "messages": turns}) == ""
    assert texts.text.decode(seen).split() == ["system", "developer", "user", "assistant", "user"]
    few = reader_of(
        folder, "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}x"
    )
    assert refusal_of(few, {"model": "m", "messages": [USER]}) == ""
    for role in ("system", "developer"):
        told = refusal_of(few, {"model": "m", "messages": [{"role": role, "content": "s"}, USER]})
        assert "System role not supported" in told
    told = refusal_of(few, {"model": "m", "messages": [{"role": "function", "content": "x", "name": "f"}]})
    assert told.startswith("messages[0] function is not supported")


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
