"""The clients that people use, as they are published, in their own environment: each streams, calls a tool, follows a schema."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from ask_clients import SCHEMA
from project import ROOT, copy_of_project
from server import Served, serve

PYTHON = Path(os.environ.get("CLIENTS_PYTHON", Path(sys.prefix) / "clients/bin/python"))
CLIENTS = ["openai", "litellm", "langchain", "llama_index", "instructor"]


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
    asked = subprocess.run(
        [PYTHON, ROOT / "tests/support/ask_clients.py", client, f"{chatting.openai}/v1"],
        capture_output=True, text=True, timeout=300, check=False, env={**os.environ, "HOME": str(chatting.tree), "DO_NOT_TRACK": "1"},
    )  # fmt: skip
    assert asked.returncode == 0, asked.stderr[-3000:]
    told: dict[str, Any] = json.loads(asked.stdout.splitlines()[-1])
    assert told["stream"]
    for name in ("call", "schema"):
        jsonschema.validate(told[name], SCHEMA)
