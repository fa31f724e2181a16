"""The OpenAI-compatible endpoint through OpenAI's own client, beside Triton's clients, on the real server."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from email.message import Message
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pydantic
import pytest
from project import ROOT, copy_of_project, make
from server import Served, alive, end_tree_of, free_ports, processes_below, serve
from tokenizers import Tokenizer
from triton_requests import steps_of
from waiting import until, wins_a_race

from scripts import build_model_repo, reports
from scripts.nvidia import contracts
from scripts.openai import engine, messages
from scripts.serving import endpoint, launch, supervisor, toolbox

KEY = "sk-test-7f3a"
LONG = {"prompt": "Once upon a time", "max_tokens": 400, "temperature": 0}


def client(server: Served, key: str = KEY) -> Any:
    """The official client (openai.OpenAI). Any, because the overloads of its `create` cannot be told apart by a
    dict."""
    return openai.OpenAI(base_url=f"{server.openai}/v1", api_key=key, max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def chatting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The bundled model with Llama 2's chat format, one rank with two slots, and an API key."""
    tree = copy_of_project(tmp_path_factory.mktemp("chat") / "tree")
    (tree / "keys").write_text(f"another\n{KEY}\n")
    running = serve(tree, "TP=1", "MAX_BATCH_SIZE=2", "CHAT_TEMPLATE=models/llama-2.jinja", "API_KEY_FILE=keys")
    yield running
    status = running.end()
    assert status == 0, "".join(running.lines)


def endpoint_of(server: Served) -> int:
    """The pid of the endpoint's process."""
    for pid in processes_below(server.process.pid):
        command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if b"scripts.openai" in command:
            return pid
    raise AssertionError("no endpoint")


def raw(server: Served, path: str, body: object, key: str = KEY, **headers: str) -> tuple[int, Message, bytes]:
    """One request without a client library; body: bytes, or a value for JSON."""
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    headers = {
        "Content-Type": "application/json",
        "Authorization": f"Bearer {key}",
        **{k.replace("_", "-"): v for k, v in headers.items()},
    }
    request = urllib.request.Request(server.openai + path, data=data, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read()


# --- text ------------------------------------------------------------------------------------------------------------


def test_serve_prints_where_it_is(served: Served) -> None:
    [line] = [line for line in served.lines if "/v1" in line]
    assert f"http://127.0.0.1:{served.openai_port}/v1" in line.split()


def test_it_says_what_the_ensemble_says_whole_and_streamed(served: Served) -> None:
    asked: dict[str, Any] = {"model": "stories", "prompt": "Once upon a time", "max_tokens": 60, "temperature": 0}
    expected = served.post("ensemble", text_input="Once upon a time", max_tokens=60)["text_output"]
    whole = client(served).completions.create(**asked)
    assert whole.choices[0].text == expected
    assert whole.choices[0].finish_reason == "length"
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens, whole.usage.total_tokens) == (5, 60, 65)
    chunks = list(client(served).completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == expected
    assert len(chunks) > 10
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-2:] == [None, "length"]
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])


def tokenizer_of(tree: Path) -> Tokenizer:
    found = next(tree.glob("build/stories/*/model_repo/preprocessing/1/tokenizer/tokenizer.json"))
    return Tokenizer.from_file(str(found))


def forced(tree: Path, text: str) -> tuple[dict[str, float], int]:
    """A logit_bias with which a greedy answer is this text, byte by byte (a token that was used is penalised away)."""
    tokenizer = tokenizer_of(tree)
    ids = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in text.encode()]
    assert len(set(ids)) == len(ids) < 8
    return {str(token): 100.0 - 12 * n for n, token in enumerate(ids)}, len(ids)


@pytest.mark.parametrize("text", ["한글", "🦙", "é中", "ש한"])
def test_characters_of_several_tokens_are_streamed_whole(served: Served, text: str) -> None:
    bias, count = forced(served.tree, text)
    asked: dict[str, Any] = {
        "model": "stories",
        "prompt": "Once",
        "max_tokens": count,
        "temperature": 0,
        "logit_bias": bias,
    }
    chunks = client(served).completions.create(**asked, extra_body={"repetition_penalty": 100}, stream=True)
    pieces = [chunk.choices[0].text for chunk in chunks]
    assert "".join(pieces) == text
    assert [piece for piece in pieces if piece] == list(text), "each character comes as soon as it is whole"
    status, _, body = raw(served, "/v1/completions", {**asked, "repetition_penalty": 100, "stream": True})
    assert status == 200
    for event in body.split(b"\n\n"):
        event.decode("utf-8")  # no event ends inside a character
    assert text[0].encode() in body, "readable on a terminal, not escaped"
    cut = client(served).completions.create(
        **{**asked, "max_tokens": count - 1}, extra_body={"repetition_penalty": 100}
    )
    assert cut.choices[0].text.startswith(text[:-1]) and cut.choices[0].text.endswith("\N{REPLACEMENT CHARACTER}")


def test_a_stop_string_is_cut_and_nothing_of_it_is_streamed(served: Served) -> None:
    story = (
        client(served)
        .completions.create(model="stories", prompt="Once upon a time", max_tokens=40, temperature=0)
        .choices[0]
        .text
    )
    at = story.index("med Lily")  # in the middle of a token
    for stop in ("med Lily", ["nothing like it", "med Lily", "Lily"]):
        asked: dict[str, Any] = {
            "model": "stories",
            "prompt": "Once upon a time",
            "max_tokens": 40,
            "temperature": 0,
            "stop": stop,
        }
        whole = client(served).completions.create(**asked).choices[0]
        assert (whole.text, whole.finish_reason) == (story[:at], "stop")
        chunks = list(client(served).completions.create(**asked, stream=True))
        assert "".join(chunk.choices[0].text for chunk in chunks) == story[:at]
        assert chunks[-1].choices[0].finish_reason == "stop"
    until(lambda: served.active == 0)


def test_log_probabilities_are_the_engines_and_cover_the_text(served: Served) -> None:
    whole = client(served).completions.create(
        model="stories", prompt="Once upon a time", max_tokens=12, temperature=0, logprobs=0
    )
    told: Any = whole.choices[0].logprobs
    assert "".join(told.tokens) == whole.choices[0].text
    assert [whole.choices[0].text[at:].startswith(token) for at, token in zip(told.text_offset, told.tokens)] == [
        True
    ] * 12
    direct = served.post("ensemble", text_input="Once upon a time", max_tokens=12, return_log_probs=True)
    assert told.token_logprobs == pytest.approx(direct["output_log_probs"], abs=1e-4)
    stopped = client(served).completions.create(
        model="stories", prompt="Once upon a time", max_tokens=12, temperature=0, logprobs=0, stop=" village"
    )
    assert "".join(stopped.choices[0].logprobs.tokens) == stopped.choices[0].text == ", in a small"
    streamed = client(served).completions.create(
        model="stories", prompt="Once upon a time", max_tokens=12, temperature=0, logprobs=0, stream=True
    )
    tokens = [token for chunk in streamed if chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.tokens]
    assert tokens == told.tokens


def test_sampling_follows_the_request(served: Served) -> None:
    def say(**more: Any) -> str:
        asked: dict[str, Any] = {"model": "stories", "prompt": "One day", "max_tokens": 24, **more}
        return str(client(served).completions.create(**asked).choices[0].text)

    greedy = say(temperature=0)
    assert greedy == say(temperature=0, seed=5) == say(top_p=0) == say(extra_body={"top_k": 1})
    assert say(seed=7) == say(seed=7) == say(seed=7, temperature=1, top_p=1)
    assert len({say(seed=n) for n in range(6)}) > 1
    assert len({say() for _ in range(6)}) > 1, "without a seed each answer is another"
    assert say(seed=-3) == say(seed=-3)
    assert say(temperature=0, frequency_penalty=2, presence_penalty=2) != greedy
    assert say(temperature=0, logit_bias={"13": -100}) == say(temperature=0, logit_bias={"13": -100.0})


def test_several_prompts_and_alternatives_in_openais_order(served: Served) -> None:
    prompts = ["Once upon a time", "One day"]
    alone = [
        client(served).completions.create(model="stories", prompt=p, max_tokens=8, temperature=0).choices[0].text
        for p in prompts
    ]
    many = client(served).completions.create(model="stories", prompt=prompts, n=2, max_tokens=8, temperature=0)
    assert [choice.text for choice in many.choices] == [alone[0], alone[0], alone[1], alone[1]]
    assert [choice.index for choice in many.choices] == [0, 1, 2, 3]
    assert many.usage.completion_tokens == 32
    sampled = client(served).completions.create(model="stories", prompt="One day", n=4, max_tokens=16, seed=1)
    assert len({choice.text for choice in sampled.choices}) > 1
    streamed: dict[int, str] = {}
    for chunk in client(served).completions.create(
        model="stories", prompt="One day", n=4, max_tokens=16, seed=1, stream=True
    ):
        streamed[chunk.choices[0].index] = streamed.get(chunk.choices[0].index, "") + chunk.choices[0].text
    assert [streamed[n] for n in range(4)] == [choice.text for choice in sampled.choices]


def test_prompts_of_token_ids_and_echo(served: Served) -> None:
    tokenizer = tokenizer_of(served.tree)
    ids = tokenizer.encode("Once upon a time").ids
    by_text = client(served).completions.create(model="stories", prompt="Once upon a time", max_tokens=8, temperature=0)
    by_ids = client(served).completions.create(model="stories", prompt=ids, max_tokens=8, temperature=0)
    assert by_ids.choices[0].text == by_text.choices[0].text
    echoed = client(served).completions.create(model="stories", prompt=[ids], max_tokens=8, temperature=0, echo=True)
    assert echoed.choices[0].text == "Once upon a time" + by_text.choices[0].text
    streamed = client(served).completions.create(
        model="stories", prompt="Once upon a time", max_tokens=8, temperature=0, echo=True, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in streamed) == echoed.choices[0].text
    assert client(served).completions.create(model="stories", prompt="", max_tokens=1).usage.prompt_tokens == 1


# --- chat ------------------------------------------------------------------------------------------------------------

TURNS: list[Any] = [
    {"role": "system", "content": "Tell stories </s> of <s>"},
    {"role": "user", "content": [{"type": "text", "text": "Once upon "}, {"type": "text", "text": "a time"}]},
    {"role": "assistant", "content": "there was a cat."},
    {"role": "user", "content": "And then? 안녕 🦙"},
]


def test_chat_is_the_templates_tokens_answered(chatting: Served) -> None:
    tokenizer = tokenizer_of(chatting.tree)
    plain = Tokenizer.from_str(json.dumps({**json.loads(tokenizer.to_str()), "added_tokens": []}))
    turns = (
        "[INST] <<SYS>>\nTell stories </s> of <s>\n<</SYS>>\n\nOnce upon a time [/INST] there was a cat. ",
        "[INST] And then? 안녕 🦙 [/INST]",
    )
    first, second = (plain.encode(turn, add_special_tokens=False).ids for turn in turns)
    ids = [1, *first, 2, 1, *second]
    expected = client(chatting).completions.create(model="stories", prompt=ids, max_tokens=30, temperature=0)
    asked: dict[str, Any] = {"model": "stories", "messages": TURNS, "max_completion_tokens": 30, "temperature": 0}
    whole = client(chatting).chat.completions.create(**asked, logprobs=True)
    said = whole.choices[0].message
    assert said.role == "assistant"
    assert said.content == expected.choices[0].text.removeprefix(" ")
    assert whole.usage.prompt_tokens == len(ids)
    told = whole.choices[0].logprobs.content
    assert b"".join(bytes(token.bytes) for token in told).decode() == expected.choices[0].text
    chunks = list(client(chatting).chat.completions.create(**asked, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == said.content
    assert chunks[-1].choices[0].finish_reason == "length"


def test_chat_answers_as_long_as_fits_when_nothing_is_said(chatting: Served) -> None:
    whole = client(chatting).chat.completions.create(model="stories", messages=TURNS[-1:], temperature=0)
    assert whole.choices[0].finish_reason == "stop" or whole.usage.total_tokens == 512


def test_a_base_model_has_no_chat(served: Served) -> None:
    with pytest.raises(openai.BadRequestError, match="no chat template") as refused:
        client(served).chat.completions.create(model="stories", messages=TURNS)
    assert refused.value.code == "no_chat_template"


def test_what_the_template_refuses_is_told(chatting: Served) -> None:
    with pytest.raises(openai.BadRequestError, match="user and assistant in turn"):
        client(chatting).chat.completions.create(model="stories", messages=[TURNS[-1], TURNS[-1]])


# --- what is refused -------------------------------------------------------------------------------------------------

OK: dict[str, Any] = {"model": "stories", "prompt": "Once", "max_tokens": 2}
WRONG: list[tuple[dict[str, Any], int, str]] = [
    ({"model": "gpt-4"}, 404, "model"),
    ({"temperature": 2.1}, 400, "temperature"),
    ({"temperature": "hot"}, 400, "temperature"),
    ({"top_p": -0.1}, 400, "top_p"),
    ({"n": 0}, 400, "n"),
    ({"max_tokens": 0}, 400, "max_tokens"),
    ({"max_tokens": 511}, 400, "prompt"),
    ({"prompt": "x " * 1000}, 400, "prompt"),
    ({"prompt": "x" * 100_000}, 400, "prompt"),
    ({"prompt": []}, 400, "prompt"),
    ({"prompt": [[]]}, 400, "prompt"),
    ({"prompt": [1, 2, 2048]}, 400, "prompt"),
    ({"prompt": [-1]}, 400, "prompt"),
    ({"prompt": [10**30]}, 400, "prompt"),
    ({"prompt": ["x"] * 1000}, 400, "prompt"),
    ({"prompt": None}, 400, "prompt"),
    ({"logprobs": 6}, 400, "logprobs"),
    ({"suffix": "end"}, 400, "suffix"),
    ({"best_of": 1, "n": 2}, 400, "best_of"),
    ({"best_of": 3, "stream": True}, 400, "best_of"),
    ({"guided_json": 5}, 400, "guided_json"),
    ({"min_p": 1.1}, 400, "min_p"),
    ({"use_beam_search": True}, 400, "use_beam_search"),
    ({"stop": ["x"] * 17}, 400, "stop"),
    ({"logit_bias": {"x": 1}}, 400, "logit_bias"),
    ({"logit_bias": {"2048": 1}}, 400, "logit_bias"),
    ({"logit_bias": {"1": 101}}, 400, "logit_bias"),
    ({"presence_penalty": 3}, 400, "presence_penalty"),
    ({"seed": 1 << 63}, 400, "seed"),
    ({"stream": "yes"}, 400, "stream"),
    ({"repetition_penalty": 5e-324}, 400, "repetition_penalty"),
    ({"no_such_thing": 1}, 400, "no_such_thing"),
    ({"stop": "한" * 171}, 400, "stop"),
    ({"stream_options": {"include_usage": True}}, 400, "stream_options"),
]


@pytest.mark.parametrize(("wrong", "status", "param"), WRONG, ids=lambda value: str(value)[:40])
def test_a_wrong_request_is_refused_by_name(served: Served, wrong: dict[str, Any], status: int, param: str) -> None:
    got, headers, body = raw(served, "/v1/completions", {**OK, **wrong})
    error = json.loads(body)["error"]
    assert (got, error["type"]) == (status, "invalid_request_error"), error
    assert re.split(r"[.\[]", error["param"] or "")[0] == param
    assert set(error) == {"message", "type", "param", "code"} and len(error["message"]) < 300


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"model": "stories", "prompt": "\\ud800"}', b'{"prompt": "\xed\xa0\x80"}',
     b'{"model": "stories", "prompt": "x", "temperature": NaN}', b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"],
    ids=lambda body: repr(body[:50]),
)  # fmt: skip
def test_what_is_no_json_is_refused(served: Served, body: bytes) -> None:
    status, _, answer = raw(served, "/v1/completions", body)
    assert (status, json.loads(answer)["error"]["type"]) == (400, "invalid_request_error")


def test_paths_methods_and_sizes(served: Served) -> None:
    assert raw(served, "/v1/nothing", None)[0] == 404
    status, headers, body = raw(served, "/v1/completions", None)
    assert (status, headers["Allow"]) == (405, "POST") and "error" in json.loads(body)
    assert raw(served, "/v1/models/stories", None)[0] == 200
    assert raw(served, "/v1/models/other", None)[0] == 404
    assert raw(served, "/v1/completions", b"{}", Content_Type="text/plain")[0] == 400
    assert raw(served, "/v1/completions", b" " * (4 << 20) + b"{}")[0] == 413
    connection = http.client.HTTPConnection("127.0.0.1", served.openai_port, timeout=60)  # a body without end
    connection.putrequest("POST", "/v1/completions")
    connection.putheader("Transfer-Encoding", "chunked")
    connection.putheader("Content-Type", "application/json")
    connection.endheaders()
    try:
        for _ in range(2000):
            connection.send(b"10000\r\n" + b" " * 65536 + b"\r\n")
    except OSError:
        pass
    else:
        raise AssertionError("131 MB were taken")


@pytest.mark.parametrize("item", ["{}", "[[]]", '"x",1', "-1", "null"])
def test_a_body_full_of_mistakes_is_one_mistake(item: str) -> None:
    """Each would be reported, and a body of 4 MB once made four million reports, in 38 seconds."""
    body = '{"model": "stories", "prompt": [' + ",".join([item] * 20_000) + "]}"
    with pytest.raises(pydantic.ValidationError) as mistakes:
        messages.CompletionRequest.model_validate_json(body)
    assert mistakes.value.error_count() < 20


def test_request_ids(served: Served) -> None:
    _, headers, _ = raw(served, "/v1/models", None, X_Request_Id="mine-1")
    assert headers["x-request-id"] == "mine-1"
    _, headers, _ = raw(served, "/v1/models", None, X_Request_Id="no spaces")
    assert re.fullmatch(r"req-[0-9a-f]{32}", headers["x-request-id"])
    ids = {client(served).completions.create(**OK).id for _ in range(3)}
    assert len(ids) == 3 and all(one.startswith("cmpl-") for one in ids)


def test_the_api_key(chatting: Served) -> None:
    assert (
        client(chatting).models.list().data[0].id == client(chatting, "another").models.list().data[0].id == "stories"
    )
    for key in ("", "wrong", KEY[:-1], KEY + "x", "Bearer"):
        status, headers, body = raw(chatting, "/v1/models", None, key)
        assert (status, json.loads(body)["error"]["code"], headers["WWW-Authenticate"]) == (
            401,
            "invalid_api_key",
            "Bearer",
        )
    with pytest.raises(openai.AuthenticationError):
        client(chatting, "wrong").completions.create(**OK)
    assert raw(chatting, "/health", None, "")[0] == 200
    log = next(chatting.tree.glob("build/*/*/serve.log")).read_text()
    for pid in [chatting.process.pid, *processes_below(chatting.process.pid)]:
        assert KEY.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
    assert KEY not in log + "".join(chatting.lines)


# --- many at once, and those that leave ----------------------------------------------------------------------------


def test_too_many_are_told_to_come_back(chatting: Served) -> None:
    """Two slots, and a queue of eight requests for each."""
    held = client(chatting).completions.create(model="stories", **{**LONG, "n": 18}, stream=True)
    next(iter(held))
    status, headers, body = raw(chatting, "/v1/completions", OK)
    assert (status, headers["Retry-After"], json.loads(body)["error"]["type"]) == (429, "1", "rate_limit_error")
    assert raw(chatting, "/v1/completions", {**OK, "n": 19})[0] == 400
    held.close()
    until(lambda: raw(chatting, "/v1/completions", OK)[0] == 200)


@pytest.mark.parametrize("stream", [True, False])
def test_the_slot_of_a_client_that_left_is_free(chatting: Served, stream: bool) -> None:
    body = json.dumps({"model": "stories", **LONG, "n": 16, "stream": stream})
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}

    def leave(begun: Callable[[], None]) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", chatting.openai_port, timeout=60)
        connection.request("POST", "/v1/completions", body, headers)
        begun()
        connection.sock.shutdown(socket.SHUT_RDWR)
        connection.close()

    # 16 answers of 400 tokens, two at a time, would be 3,200 steps
    assert wins_a_race(lambda: steps_of(chatting, leave) < 2000)


def test_a_client_that_reads_nothing_keeps_nobody_waiting(chatting: Served) -> None:
    slow = socket.create_connection(("127.0.0.1", chatting.openai_port))
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    body = json.dumps({"model": "stories", **LONG, "n": 2, "stream": True}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\n"
    )
    before = chatting.metric("torch_engine_steps")
    slow.sendall(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
    until(lambda: chatting.metric("torch_engine_steps") > before)
    answers = [client(chatting).completions.create(**OK).choices[0].text for _ in range(3)]
    assert all(answers)
    until(lambda: chatting.active == 0)
    received = b""
    while b"[DONE]" not in received:
        received += slow.recv(65536)
    slow.close()


def test_openais_and_tritons_clients_at_the_same_time(served: Served) -> None:
    expected = served.post("ensemble", text_input="Once upon a time", max_tokens=40)["text_output"]

    def one(n: int) -> str:
        if n % 3 == 0:
            return str(served.post("ensemble", text_input="Once upon a time", max_tokens=40)["text_output"])
        if n % 3 == 1:
            return "".join(
                event["text_output"]
                for event in served.stream("ensemble", text_input="Once upon a time", max_tokens=40, stream=True)
            )
        stream = client(served).completions.create(
            model="stories", prompt="Once upon a time", max_tokens=40, temperature=0, stream=True
        )
        return "".join(chunk.choices[0].text for chunk in stream)

    with ThreadPoolExecutor(24) as pool:
        assert set(pool.map(one, range(48))) == {expected}


# --- the process ------------------------------------------------------------------------------------------------------


@pytest.fixture
def server(tree: Path) -> Iterator[Served]:
    """A server of the test's own, to be broken."""
    running = serve(tree)
    yield running
    end_tree_of(running.process)


def test_when_the_endpoint_dies_everything_ends_and_says_so(server: Served) -> None:
    below = processes_below(server.process.pid)
    os.kill(endpoint_of(server), signal.SIGKILL)
    assert server.process.wait(30) != 0
    server.reader.join(5)
    text = "".join(server.lines)
    assert "THE OPENAI ENDPOINT FAILED WHILE SERVING" in text and "status -9" in text and "    make serve" in text
    assert {pid: name for pid, name in below.items() if alive(pid)} == {}


def test_sigterm_lets_an_answer_finish(server: Served) -> None:
    chunks: list[str] = []

    def read() -> None:
        for chunk in client(server).completions.create(model="stories", **LONG, stream=True):
            chunks.append(chunk.choices[0].finish_reason or chunk.choices[0].text)

    reader = threading.Thread(target=read)
    reader.start()
    until(lambda: len(chunks) > 2)
    assert server.end() == 0
    reader.join(20)
    assert chunks[-1] in ("length", "stop") and len("".join(chunks)) > 500


def test_it_needs_neither_torch_nor_transformers_and_listens_where_it_should(served: Served) -> None:
    pid = endpoint_of(served)
    mapped = Path(f"/proc/{pid}/maps").read_text()
    assert "torch" not in mapped and "tokenizers" in mapped
    inodes = {
        os.readlink(fd)[8:-1] for fd in Path(f"/proc/{pid}/fd").iterdir() if os.readlink(fd).startswith("socket:")
    }
    listening = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                listening.append(fields[1])
    assert listening == [f"0100007F:{served.openai_port:04X}"]


def alone(root: Path, grpc_port: int) -> tuple[subprocess.Popen[str], int]:
    """The endpoint without a supervisor, asking a Triton at that port."""
    [port] = free_ports(1)
    command = [sys.executable, "-m", "scripts.openai", "--root", str(root), "--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen([*command, "--grpc", f"127.0.0.1:{grpc_port}", "--name", "stories"], cwd=ROOT, text=True)

    def up() -> bool:
        assert process.poll() is None
        try:
            return bool(urllib.request.urlopen(f"http://127.0.0.1:{port}/health/live", timeout=10).status == 200)
        except OSError:
            return False

    until(up)
    return process, port


@pytest.mark.parametrize("there", [False, True], ids=["nobody listens", "somebody listens and says nothing"])
def test_health_is_bad_when_no_token_comes(served: Served, there: bool) -> None:
    [variant] = (served.tree / "build/stories").glob("torch-0.8.0-tp2-float16")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        if there:
            silent.listen()
        process, port = alone(variant, silent.getsockname()[1])
        try:
            with pytest.raises(urllib.error.HTTPError) as unhealthy:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=30)
            assert unhealthy.value.code == 503
            assert json.loads(unhealthy.value.read())["error"]["code"] == "unhealthy"
            if not there:
                body = json.dumps(OK).encode()
                request = urllib.request.Request(
                    f"http://127.0.0.1:{port}/v1/completions", data=body, headers={"Content-Type": "application/json"}
                )
                with pytest.raises(urllib.error.HTTPError) as unavailable:
                    urllib.request.urlopen(request, timeout=30)
                assert unavailable.value.code == 503 and unavailable.value.headers["Retry-After"]
        finally:
            process.terminate()
            assert process.wait(20) == 0


@pytest.mark.parametrize(
    ("path", "wrong", "said"),
    [
        ("chat/completions", {"functions": [{}]}, "functions is not supported"),
        ("chat/completions", {"tools": [{}]}, "Missing required parameter: 'tools[0].type'"),
        ("chat/completions", {"messages": [{"role": "bot"}]}, "Supported values are: 'system', 'developer'"),
        ("chat/completions", {"response_format": {"type": "grammar"}}, "response_format grammar is not supported"),
        (
            "chat/completions",
            {"response_format": {"type": "json_schema"}},
            "json_schema belongs to the type json_schema",
        ),
        ("completions", {"stop": [1]}, "Invalid type for 'stop[0]': expected a string, but got an integer instead."),
        ("completions", {"temperature": 3}, "Expected a value <= 2.0, but got 3 instead."),
        ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "'text'"),
        ("completions", {"stop": ["x"] * 17}, "at most 16"),
        ("completions", {"stop": "a" * 65_000}, "a stop string has 65000 bytes; one may have 512"),
        ("completions", {"prompt": [-1]}, "Expected a value >= 0"),
    ],
)
def test_a_refusal_tells_of_the_form_that_was_sent(served: Served, path: str, wrong: dict[str, Any], said: str) -> None:
    asked = OK if path == "completions" else {"model": "stories", "messages": [{"role": "user", "content": "x"}]}
    status, _, body = raw(served, f"/v1/{path}", {**asked, **wrong})
    message = json.loads(body)["error"]["message"]
    assert status == 400 and said in message and ".str" not in message, message


def test_best_of_tells_the_likeliest(served: Served) -> None:
    """The best of the same draws that n would all have sent."""
    asked = {"model": "stories", "prompt": "One day", "max_tokens": 6, "seed": 3}
    all_of_them = client(served).completions.create(**asked, n=4, logprobs=0).choices
    mean = {one.text: sum(one.logprobs.token_logprobs) / len(one.logprobs.token_logprobs) for one in all_of_them}
    likeliest = sorted(mean, key=lambda text: -mean[text])
    assert len(likeliest) > 2
    best = client(served).completions.create(**asked, n=2, best_of=4)
    assert [(one.index, one.text) for one in best.choices] == list(enumerate(likeliest[:2]))
    assert best.choices[0].logprobs is None and best.usage.completion_tokens == 24


def test_the_end_of_the_model_is_ignored_on_request(served: Served) -> None:
    asked = {
        "model": "stories",
        "prompt": "Once upon a time",
        "max_tokens": 5,
        "temperature": 0,
        "logit_bias": {"2": 100},
    }
    assert client(served).completions.create(**asked).choices[0].finish_reason == "stop"
    on = client(served).completions.create(**asked, extra_body={"ignore_eos": True})
    assert (on.choices[0].finish_reason, on.usage.completion_tokens) == ("length", 5)


def everything(connection: socket.socket) -> bytes:
    """What still comes, until the connection is closed from there."""
    answer = b""
    try:
        while piece := connection.recv(65536):
            answer += piece
    except ConnectionError:
        pass
    return answer


def test_requests_sent_ahead_are_not_kept(served: Served) -> None:
    """No client of OpenAI's sends any; sixty thousand of them were a minute's work and a gigabyte."""
    with socket.create_connection(("127.0.0.1", served.openai_port), timeout=60) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 1000)
        assert everything(connection).count(b"HTTP/1.1 200") <= 1
    assert raw(served, "/health/live", None)[0] == 200


@pytest.mark.parametrize("line", [b"X: a\r\n", b"X: " + b"a" * 1000, b"/" * 1000], ids=["headers", "header", "url"])
def test_the_head_of_a_request_ends_somewhere(served: Served, line: bytes) -> None:
    with socket.create_connection(("127.0.0.1", served.openai_port), timeout=60) as connection:
        connection.sendall(b"GET /" if line[:1] == b"/" else b"GET / HTTP/1.1\r\n")
        with pytest.raises(ConnectionError):
            for _ in range((64 << 20) // len(line)):
                connection.sendall(line)


def test_what_is_no_http_is_told_in_openais_shape(served: Served) -> None:
    with socket.create_connection(("127.0.0.1", served.openai_port), timeout=60) as connection:
        connection.sendall(b"FOO BAR\r\n\r\n")
        head, _, body = everything(connection).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400") and b"x-request-id: req-" in head
    assert json.loads(body)["error"]["type"] == "invalid_request_error"


def test_nobody_holds_a_connection_open_without_asking(served: Served) -> None:
    """10 seconds: a thousand such connections would be all that the process may open."""
    connections = [socket.create_connection(("127.0.0.1", served.openai_port), timeout=60) for _ in range(3)]
    connections[1].sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n")
    connections[2].sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
    answer = b""
    while b"}" not in answer:
        answer += connections[2].recv(65536)
    for connection in connections:
        assert connection.recv(1) == b"", "closed"
        connection.close()


def test_without_triton_streams_the_endpoint_streams_all_the_same(tmp_path: Path) -> None:
    """STREAMING=off: an answer is one piece, and stop strings that are whole tokens end it early."""
    tree = copy_of_project(tmp_path / "tree")
    running = serve(tree, "TP=1", "STREAMING=off")
    try:
        whole = client(running).completions.create(
            model="stories", prompt="Once upon a time", max_tokens=30, temperature=0
        )
        assert whole.choices[0].text.startswith(", in a small village")
        chunks = list(
            client(running).completions.create(
                model="stories", prompt="Once upon a time", max_tokens=30, temperature=0, stream=True
            )
        )
        assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
        stopped = client(running).completions.create(
            model="stories", prompt="Once upon a time", max_tokens=400, temperature=0, stop=" Lily"
        )
        assert stopped.choices[0].text.endswith("girl named") and stopped.usage.completion_tokens < 40
        assert running.end() == 0
    finally:
        end_tree_of(running.process)


def test_a_port_that_is_taken_and_a_file_without_keys_are_told_before_anything_is_loaded(
    tree: Path, served: Served, tmp_path: Path
) -> None:
    ports = dict(zip(("HTTP_PORT", "GRPC_PORT", "METRICS_PORT"), free_ports(3)))
    words = [f"{name}={port}" for name, port in ports.items()]
    done = make(tree, "serve", *words, f"OPENAI_PORT={served.openai_port}")
    assert (
        done.returncode != 0
        and f"PORT {served.openai_port} CANNOT BE USED" in done.stderr
        and "OPENAI_PORT=" in done.stderr
    )
    (tmp_path / "keys").write_text("\n \n")
    [port] = free_ports(1)
    done = make(tree, "serve", *words, f"OPENAI_PORT={port}", f"API_KEY_FILE={tmp_path / 'keys'}")
    assert done.returncode != 0 and "NO API KEY IN THE FILE" in done.stderr and "starting" not in done.stdout
    assert "NO API KEY IN THE FILE" in make(tree, "serve", "API_KEY_FILE=nowhere").stderr
    assert "CHAT_TEMPLATE CANNOT BE" in make(tree, "serve", "CHAT_TEMPLATE=nowhere").stderr


def test_the_asynchronous_client(served: Served) -> None:
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{served.openai}/v1", api_key="x", max_retries=0) as asking:
            answers = await asyncio.gather(*(asking.completions.create(**OK, temperature=0) for _ in range(8)))
            return [answer.choices[0].text for answer in answers]

    assert len(set(asyncio.run(ask()))) == 1


@pytest.mark.parametrize("version", contracts.versions())
def test_every_version_is_asked_with_what_it_declares(version: str) -> None:
    """Names and types of the tensors: the backend's table of each TensorRT-LLM, with everything asked for at once."""
    templates = {path.parent.name: path.read_text() for path in (ROOT / "model_repo_template").glob("*/config.pbtxt")}
    table = contracts.table("backend", version)
    engine_config = {
        "build_config": {
            "max_batch_size": 4,
            "max_beam_width": 1,
            "max_input_len": 64,
            "max_seq_len": 128,
            "plugin_config": {"gpt_attention_plugin": "float16", "remove_input_padding": True, "paged_kv_cache": True},
        },
        "pretrained_config": {"vocab_size": 100},
    }
    kind = json.loads((ROOT / "docker/engines.json").read_text())["tensorrt"]
    config = build_model_repo.render(templates, table, engine_config, kind, version, True)["tensorrt_llm"]
    asked = engine.Engine("127.0.0.1:1", config, engine.Limits(4, 64, 128, 100), end_ids=[2])
    everything = engine.Question(
        [1, 5], 3, temperature=0.5, top_p=0.9, top_k=7, presence_penalty=1, frequency_penalty=1, repetition_penalty=1.5, seed=(1 << 64) - 1,
        min_tokens=1, logprobs=True, logit_bias={3: 1.0}, stop_words=np.array([[[4, 5], [2, -1]]], dtype=np.int32),
    )  # fmt: skip
    values = engine.inputs_of(everything, [2, 7, 9], True, 100)
    assert (values["end_id"], values["stop_words_list"].tolist()) == ([2], [[7, 9, 4, 5], [1, 2, 4, -1]])
    request = asked.request({**values, "stop": [False]}, "id", ["output_ids", "output_log_probs"])
    sent = {tensor.name: (tensor.datatype, list(tensor.shape)) for tensor in request.inputs}
    declared = {tensor["name"]: tensor["data_type"].removeprefix("TYPE_") for tensor in table["tensorrt_llm"]["inputs"]}
    assert {name: datatype for name, (datatype, _) in sent.items()} == {name: declared[name] for name in sent}
    assert len(sent) == len(values) + 1
    assert (
        sent["input_ids"] == ("INT32", [1, 2])
        and sent["stop_words_list"] == ("INT32", [1, 2, 4])
        and sent["embedding_bias"][1] == [1, 100]
    )
    required = {tensor["name"] for tensor in table["tensorrt_llm"]["inputs"] if not tensor.get("optional")}
    assert required <= set(sent)


def test_a_python_without_the_packages(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """NVIDIA's image serves without the endpoint, and says so; ours, which make installs, must have them."""
    assert endpoint.openai_lacks() == []
    monkeypatch.setattr(endpoint, "OPENAI_MODULES", ("json", "no_such_package.aio"))
    assert endpoint.openai_lacks() == ["no_such_package"]
    asked = supervisor.Supervisor(launch.Settings(Path("."), "127.0.0.1", 1, 2, 3, openai_port=4))
    assert not asked._opens_endpoint(toolbox.Toolbox(Path("tritonserver"), None, []))
    assert "no OpenAI endpoint: this image's Python lacks no_such_package" in capsys.readouterr().out
    with pytest.raises(reports.Problem, match="no package no_such_package"):
        asked._opens_endpoint(toolbox.Toolbox(Path("tritonserver"), Path("backends"), []))
    monkeypatch.setattr(endpoint, "OPENAI_MODULES", ())
    monkeypatch.setattr(supervisor, "TRACING_MODULES", ("no_such_sdk.trace",))
    assert asked._opens_endpoint(toolbox.Toolbox(Path("tritonserver"), None, []))
    traced = supervisor.Supervisor(replace(asked.settings, operating=launch.Operating(traces="on")))
    with pytest.raises(reports.Problem, match="no package no_such_sdk"):
        traced._opens_endpoint(toolbox.Toolbox(Path("tritonserver"), None, []))
    none = supervisor.Supervisor(launch.Settings(Path("."), "127.0.0.1", 1, 2, 3))
    assert not none._opens_endpoint(toolbox.Toolbox(Path("tritonserver"), Path("backends"), []))
