"""Whatever a hostile client sends to the endpoint, it does not crash or hang, memory stays bounded,
and other clients are served.

schemathesis makes requests from the endpoint's OpenAPI description, hypothesis from raw bytes.
`make test-long` makes more of them.
"""

from __future__ import annotations

import json
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from project import ROOT, copy_of_project
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance
from server import Served, end_tree_of, processes_below, serve

from scripts.openai.app import LEAST_BODY_BYTES

LONG = "--hypothesis-profile=long" in sys.argv
EXAMPLES = 3000 if LONG else 40
# what Python and the tokenizer take once and keep
MEMORY_BYTES = 96 << 20


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A separate server, which must be as it was when all is over."""
    tree = copy_of_project(tmp_path_factory.mktemp("fuzz") / "tree")
    # a template that knows tools, and writes their names alone: the bundled model reads few tokens
    template = (ROOT / "tests/support/templates/hermes.jinja").read_text()
    (tree / "hermes.jinja").write_text(template.replace("{{ tool | tojson }}", "{{ tool.function.name }}"))
    running = serve(tree, "TP=1", "CHAT_TEMPLATE=hermes.jinja")
    try:
        yield from watched(running, tree)
        assert running.end() == 0
    finally:
        end_tree_of(running.process)


def watched(running: Served, tree: Path) -> Iterator[Served]:
    """While it is attacked, another client is served; afterwards nothing is left of the attack."""
    pid = next(
        pid
        for pid in processes_below(running.process.pid)
        if b"scripts.openai" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    )
    expected = story(running)
    before = resident_bytes(pid)
    wrong: list[str] = []
    over = threading.Event()

    def another_client() -> None:
        while not over.is_set():
            try:
                if story(running) != expected:
                    wrong.append("another answer")
            except openai.RateLimitError:  # the fuzzer may fill the queue
                over.wait(1)
            except openai.OpenAIError as error:
                wrong.append(repr(error))
            over.wait(0.2)

    other = threading.Thread(target=another_client)
    other.start()
    try:
        yield running
    finally:
        over.set()
        other.join()
    assert wrong == []
    assert running.process.poll() is None and story(running) == expected
    assert resident_bytes(pid) - before < MEMORY_BYTES
    log = next(tree.glob("build/*/*/serve.log")).read_text()
    assert "Traceback" not in log, log[-3000:]


def story(server: Served) -> str:
    asking = openai.OpenAI(base_url=f"{server.openai}/v1", api_key="x", max_retries=0, timeout=60)
    return (
        asking.completions.create(model="stories", prompt="Once upon a time", max_tokens=8, temperature=0)
        .choices[0]
        .text
    )


def resident_bytes(pid: int) -> int:
    [line] = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) * 1024


@pytest.fixture(scope="module")
def api(hostile: Served) -> Any:
    return schemathesis.openapi.from_url(f"{hostile.openai}/openapi.json")


OPERATIONS = [
    ("/v1/completions", "POST"),
    ("/v1/chat/completions", "POST"),
    ("/v1/models", "GET"),
    ("/v1/models/{model}", "GET"),
    ("/health", "GET"),
]


MODES = [
    (*operation, mode)
    for operation in OPERATIONS
    for mode in GenerationMode
    if operation[1] == "POST" or mode.is_positive
]


@pytest.mark.parametrize(("path", "method", "mode"), MODES, ids=lambda value: getattr(value, "name", value))
def test_requests_of_the_description_and_around_it(api: Any, path: str, method: str, mode: GenerationMode) -> None:
    """schemathesis's own checks: no 5xx, statuses, content types and bodies as described, what is malformed is refused.

    That what is well-formed is taken it may not check: a schema can't say how many tokens a text has. A body beyond the
    limit is refused unread (413), which schemathesis does not count as refused.
    """

    @settings(max_examples=EXAMPLES if method == "POST" else 10, deadline=None, suppress_health_check=list(HealthCheck))
    @given(case=api[path][method].as_strategy(generation_mode=mode), known=st.booleans())
    def check(case: Any, known: bool) -> None:
        if known and isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            case.body["model"] = "stories"  # else nearly all are answered 404
        response = case.call(timeout=60)
        assert b"Traceback" not in response.content and b".py" not in response.content
        too_large = response.status_code == 413
        assert not too_large or len(response.request.body or b"") > LEAST_BODY_BYTES
        excluded = [positive_data_acceptance, *([negative_data_rejection] if too_large else [])]
        case.validate_response(response, excluded_checks=excluded)

    check()


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
KEYS = ["model", "prompt", "messages", "role", "content", "stop", "n", "logit_bias", "x"]
OPTIONS = [
    "prompt",
    "n",
    "temperature",
    "top_p",
    "stop",
    "seed",
    "logit_bias",
    "stream",
    "echo",
    "min_tokens",
    "top_k",
    "repetition_penalty",
    "logprobs",
    "best_of",
    "min_p",
    "ignore_eos",
    "guided_json",
    "guided_regex",
    "guided_choice",
]
ANY_JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=5)
)
NEARLY = st.dictionaries(
    st.sampled_from(OPTIONS), SCALARS | st.lists(st.integers() | st.text(max_size=3), max_size=3), max_size=4
).map(lambda more: {"model": "stories", "prompt": "x", "max_tokens": 1, **more})
BODIES = st.binary(max_size=400) | (ANY_JSON | NEARLY).map(lambda value: json.dumps(value).encode())
HEADS = [
    b"",
    b"Transfer-Encoding: chunked\r\n",
    b"Content-Length: 99999999999999999999\r\n",
    b"X: \xff\xfe\r\n",
    b"Expect: 100-continue\r\n",
]
PATHS = ["/v1/completions", "/v1/chat/completions"]


@settings(max_examples=EXAMPLES * 5, deadline=None, suppress_health_check=list(HealthCheck))
@given(body=BODIES, path=st.sampled_from(PATHS), head=st.sampled_from(HEADS), cut=st.booleans())
def test_raw_bytes(hostile: Served, body: bytes, path: str, head: bytes, cut: bool) -> None:
    """Also cut off half-way, and with a header that lies: an answer of four known classes, or a closed connection."""
    with socket.create_connection(("127.0.0.1", hostile.openai_port), timeout=60) as connection:
        length = b"" if head[:1] in (b"T", b"C") else f"Content-Length: {len(body)}\r\n".encode()
        request = (
            f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n".encode()
            + length
            + head
            + b"\r\n"
            + body
        )
        try:
            connection.sendall(request[: len(request) // 2] if cut else request)
            connection.shutdown(socket.SHUT_WR)
            answer = b""
            while piece := connection.recv(65536):
                answer += piece
        except ConnectionError:
            return
    assert b"Traceback" not in answer
    if answer:
        status = int(answer.split(b" ", 2)[1])
        assert status in (100, 200, 400, 404, 408, 413, 429), answer
