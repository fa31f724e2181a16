"""KV_REUSE=on through a real tritonserver: the same answers, and what was shared is on the metrics page."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from server import Served, end_tree_of, serve
from waiting import until

BEGINNING = "Once upon a time there was a little girl named Lily. She loved to play with her toys in the park. "
ENDINGS = ("One day", "Her mom", "One day", "The dog")


@pytest.fixture(scope="module", params=["off", "on"])
def served(request: pytest.FixtureRequest, tree: Path) -> Iterator[tuple[str, Served]]:
    running = serve(tree, "TP=2", f"KV_REUSE={request.param}")
    yield request.param, running
    end_tree_of(running.process)


def reused(running: Served) -> float:
    return running.metric("nv_trt_llm_kv_cache_block_metrics", kv_cache_block_type="reused")


TEXTS: dict[str, list[str]] = {}


def test_shared_beginnings_change_no_answer(served: tuple[str, Served]) -> None:
    how, running = served
    asked: list[dict[str, Any]] = [{"text_input": BEGINNING + ending, "max_tokens": 12} for ending in ENDINGS]
    TEXTS[how] = [running.post("ensemble", **body)["text_output"] for body in asked]
    assert TEXTS[how][0] == TEXTS[how][2] and all(text == TEXTS["off"][n] for n, text in enumerate(TEXTS[how]))
    # the beginning has more than one block of 16 tokens, and three of the four found it
    if how == "on":
        until(lambda: reused(running) >= 3, "blocks that were reused on the metrics page")
    assert how == "on" or reused(running) == 0
