"""The journey on the bundled model: Meta's weights in, text out of a real Triton with two ranks."""

from __future__ import annotations

import json
import shlex
import subprocess
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from project import make
from server import Served, free_ports
from triton_requests import STORY, Stream

from scripts.serving.triton_client import floats, ints, texts, yes


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_demo_tells_the_story_at_any_tp(tree: Path, tp: int) -> None:
    http, grpc, metrics = free_ports(3)
    done = make(tree, "demo", f"TP={tp}", f"HTTP_PORT={http}", f"GRPC_PORT={grpc}", f"METRICS_PORT={metrics}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert any(line.startswith(STORY) for line in done.stdout.splitlines()), done.stdout
    assert done.stdout.rstrip().endswith("ended")


def test_a_second_make_does_nothing(tree: Path, served: Served) -> None:
    rooms = sorted(path for path in (tree / "build").rglob("*") if path.is_file())
    before = {path: path.stat().st_mtime_ns for path in rooms}
    done = make(tree, "model_repo")
    assert (done.returncode, done.stdout.strip()) in [(0, ""), (0, "make: Nothing to be done for 'model_repo'.")]
    assert {path: path.stat().st_mtime_ns for path in rooms if path.name != "serve.log"} == {
        p: t for p, t in before.items() if p.name != "serve.log"
    }
    assert make(tree, "-q", "model_repo").returncode == 0


def test_ask_streams_the_answer_unwrapped(served: Served) -> None:
    done = make(served.tree, "ask", f"GRPC_PORT={served.grpc_port}", "PROMPT=Once upon a time", "MAX_TOKENS=20")
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout
        == ", in a small village surrounded by a beautiful forest, there lived a little girl named Lily. She\n"
    )


def test_ask_takes_any_prompt_as_it_is(served: Served) -> None:
    """Quotes, dollars and hashes reach the model, not the shell or make."""
    done = make(
        served.tree,
        "ask",
        f"GRPC_PORT={served.grpc_port}",
        """PROMPT=She said "it's $5 #1 `now`" and""",
        "MAX_TOKENS=4",
    )
    assert done.returncode == 0, done.stderr
    direct = served.post("ensemble", text_input="""She said "it's $5 #1 `now`" and""", max_tokens=4)
    assert done.stdout == direct["text_output"] + "\n"


def test_the_printed_curl_line_works(served: Served) -> None:
    [line] = [line.strip() for line in served.lines if line.strip().startswith("curl ")]
    answer = json.loads(subprocess.run(shlex.split(line), capture_output=True, check=True, timeout=60).stdout)
    assert answer["text_output"].startswith(STORY)


def test_generate_and_generate_stream_and_grpc_say_the_same(served: Served) -> None:
    request: dict[str, Any] = {"text_input": "Once upon a time", "max_tokens": 32}
    whole = served.post("ensemble", **request, bad_words="", stop_words="", pad_id=2, end_id=2)
    assert whole["text_output"].startswith(STORY)
    pieces = [event["text_output"] for event in served.stream("ensemble", **request, stream=True)]
    assert len(pieces) > 1
    assert "".join(pieces) == whole["text_output"]
    assert "".join(grpc_stream(served, "ensemble", "Once upon a time", 32)) == whole["text_output"]
    assert "".join(grpc_stream(served, "tensorrt_llm_bls", "Once upon a time", 32)) == whole["text_output"]


def grpc_stream(served: Served, model: str, prompt: str, max_tokens: int) -> list[str]:
    """What NVIDIA's end_to_end_grpc_client.py sends: text_input, max_tokens, stream, beam_width, temperature."""
    with closing(Stream(served)) as stream:
        stream.send(
            model,
            text_input=texts(prompt),
            max_tokens=ints(max_tokens),
            stream=yes(),
            beam_width=ints(1),
            temperature=floats(1.0),
        )
        pieces = [answer.as_numpy("text_output") for answer in stream.until_final()]
    return [b"".join(text.reshape(-1)).decode() for text in pieces if text is not None]
