"""Published client packages: each streams, calls a tool and follows a schema; and what strict tools promise."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest
from ask_clients import SCHEMA
from project import ROOT, copy_of_project
from server import Served, serve
from tools_of_clients import CITY, STRICT, TOOL, USER

from scripts.openai.__main__ import TOKENIZER

PYTHON = Path(os.environ.get("CLIENTS_PYTHON", Path(sys.prefix) / "clients/bin/python"))
CLIENTS = ["openai", "litellm", "langchain", "llama_index", "instructor", "open_webui"]


@pytest.fixture(scope="module")
def chatting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    tree = copy_of_project(tmp_path_factory.mktemp("clients") / "tree")
    # the bundled model reads few tokens: it is told the tools' names alone
    template = (ROOT / "tests/support/templates/hermes.jinja").read_text()
    (tree / "hermes.jinja").write_text(template.replace("{{ tool | tojson }}", "{{ tool.function.name }}"))
    running = serve(tree, "TP=1", "CHAT_TEMPLATE=hermes.jinja", "MAX_INPUT_LEN=440")
    yield running
    assert running.end() == 0, "".join(running.lines)


@pytest.mark.skipif(
    not PYTHON.exists(), reason="the clients (requirements/clients.txt) are not installed: make .venv/locks/clients.txt"
)
@pytest.mark.parametrize("client", CLIENTS)
def test_a_client_streams_calls_and_follows_a_schema(chatting: Served, client: str) -> None:
    short = json.dumps({vocabulary(chatting.tree)["<0x7D>"]: 100})
    asked = subprocess.run(
        [PYTHON, ROOT / "tests/support/ask_clients.py", client, f"{chatting.openai}/v1"],
        capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "HOME": str(chatting.tree), "DO_NOT_TRACK": "1", "SHORT": short},
    )  # fmt: skip
    assert asked.returncode == 0, asked.stderr[-3000:]
    told: dict[str, Any] = json.loads(asked.stdout.splitlines()[-1])
    assert told["stream"]
    for name in ("call", "schema"):
        jsonschema.validate(told[name], SCHEMA)
    assert isinstance(told.get("json", {}), dict)
    said = next(
        row for name, row in matrix().items() if name.lower().replace(" ", "_").replace("-", "_").startswith(client)
    )
    assert {column for column, key in COLUMNS.items() if said[column] == "tested"} == {
        column for column, key in COLUMNS.items() if key in told
    }, "docs/clients.md"


# what a column of docs/clients.md is called in what ask_clients.py prints
COLUMNS = {"stream": "stream", "tool call": "call", "result sent back": "after", "schema": "schema", "JSON object": "json",
           "background tasks": "title"}  # fmt: skip


def matrix() -> dict[str, dict[str, str]]:
    """The first table of docs/clients.md, by client."""
    rows = [[cell.strip(" `") for cell in line.strip("|").split("|")]
            for line in (ROOT / "docs/clients.md").read_text().split("## How")[0].splitlines() if line.startswith("|")]  # fmt: skip
    return {row[0]: dict(zip(rows[0], row)) for row in rows[2:]}


def test_the_page_of_clients_has_every_client_at_its_pinned_version() -> None:
    pinned = dict(re.findall(r"(?m)^([a-z-]+)==([^ ]+)", (ROOT / "requirements/clients.txt").read_text()))
    named = re.findall(r"(?m)^([a-z-]+)", (ROOT / "requirements/clients.in").read_text())
    assert {name: row["version"] for name, row in matrix().items() if name in pinned} == {
        name: pinned[name] for name in named
    }
    assert len(matrix()) == len(CLIENTS) == len(named) + 1
    assert all(set(COLUMNS) <= set(row) for row in matrix().values())


def vocabulary(tree: Path) -> dict[str, int]:
    """The served model's tokens and their ids."""
    [found] = tree.glob("build/stories/*/" + TOKENIZER + "/tokenizer.json")
    listed: dict[str, int] = json.loads(found.read_text())["model"]["vocab"]
    return listed


# --- calls, by OpenAI's client ---

NOTHING: dict[str, Any] = {"type": "object", "maxProperties": 0}
LOOSE: Any = {"type": "function", "function": {"name": "any", "parameters": NOTHING}}
COLOUR = {
    "type": "object",
    "properties": {"hue": {"type": "integer"}},
    "required": ["hue"],
    "additionalProperties": False,
}


def made_to_say_braces(tree: Path) -> dict[str, float]:
    """A logit_bias with which an answer begins with {}: a token that was used is penalised away."""
    ids = vocabulary(tree)
    return {str(ids["<0x7B>"]): 100.0, str(ids["<0x7D>"]): 90.0}


def test_a_call_whole_and_streamed(chatting: Served) -> None:
    client = openai.OpenAI(base_url=f"{chatting.openai}/v1", api_key="x", max_retries=0, timeout=60)
    asked: dict[str, Any] = {
        "model": "stories",
        "messages": [USER],
        "tools": [TOOL],
        "temperature": 0,
        "max_tokens": 16,
        "tool_choice": {"type": "function", "function": {"name": "weather"}},
        "logit_bias": made_to_say_braces(chatting.tree),
        "extra_body": {"repetition_penalty": 100},
    }
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


def test_strict_tools_guide_their_calls(chatting: Served) -> None:
    """Free, required and with an answer's own schema; one call where one is asked for.
    The model itself knows nothing of calls."""
    client: Any = openai.OpenAI(base_url=f"{chatting.openai}/v1", api_key="x", max_retries=0, timeout=60)
    asked: dict[str, Any] = {"model": "stories", "messages": [USER], "tools": [STRICT, LOOSE], "max_tokens": 120}

    def choice(**more: Any) -> Any:
        return client.chat.completions.create(**asked, **more).choices[0]

    for seed in range(3):
        required = choice(tool_choice="required", seed=seed, parallel_tool_calls=bool(seed))
        assert required.message.content is None and required.finish_reason in ("tool_calls", "length")
        calls = required.message.tool_calls
        assert len(calls) == 1 or seed
        for call in calls[:-1] if required.finish_reason == "length" else calls:
            jsonschema.validate(json.loads(call.function.arguments), CITY if call.function.name == "city" else NOTHING)
    # text that opens no call is what it is without tools that are strict
    free = choice(temperature=0)
    asked["tools"] = [{**STRICT, "function": {**STRICT["function"], "strict": False}}, LOOSE]
    assert free.message.content == choice(temperature=0).message.content and not free.message.tool_calls
    # made to begin with <, it calls; made to begin with {, it answers
    asked["tools"] = [STRICT, LOOSE]
    ids = vocabulary(chatting.tree)
    format = {"type": "json_schema", "json_schema": {"name": "hue", "schema": COLOUR}}
    called = choice(
        temperature=0, response_format=format, parallel_tool_calls=False, logit_bias={str(ids["<0x3C>"]): 100}
    )
    assert called.finish_reason == "tool_calls" and called.message.content is None
    [call] = called.message.tool_calls
    jsonschema.validate(json.loads(call.function.arguments), CITY if call.function.name == "city" else NOTHING)
    answered = choice(temperature=0, response_format=format, logit_bias={str(ids["<0x7B>"]): 100})
    assert not answered.message.tool_calls and answered.message.content.startswith('{"hue": ')


def test_a_json_object_is_one(chatting: Served) -> None:
    """Greedy and sampled, whole and streamed, and beside tools; its end is the model's (here it is nudged to it)."""
    client: Any = openai.OpenAI(base_url=f"{chatting.openai}/v1", api_key="x", max_retries=0, timeout=60)
    ids = vocabulary(chatting.tree)
    asked: dict[str, Any] = {
        "model": "stories",
        "messages": [USER],
        "response_format": {"type": "json_object"},
        "max_tokens": 150,
        "logit_bias": {str(ids["<0x7D>"]): 14, str(ids["<0x22>"]): 8},
    }
    ended = 0
    for more in (
        {"temperature": 0},
        {"seed": 1},
        {"seed": 2, "n": 2},
        {"seed": 1, "tools": [TOOL]},
        {"seed": 3, "tools": [TOOL]},
    ):
        for choice in client.chat.completions.create(**asked, **more).choices:
            if choice.finish_reason == "stop":
                assert isinstance(json.loads(choice.message.content), dict)
                ended += 1
            assert choice.message.tool_calls or choice.message.content.startswith("{")
    assert ended >= 3
    whole = client.chat.completions.create(**asked, seed=1).choices[0].message.content
    chunks = client.chat.completions.create(**asked, seed=1, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole
