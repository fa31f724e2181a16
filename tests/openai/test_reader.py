"""Requests are read in a bounded child: the first mistake ends it, and a list is counted before it is processed."""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
from collections import deque
from pathlib import Path
from typing import Any

import pydantic
import pytest
from server import Served

from scripts.openai import messages, reader
from scripts.openai.__main__ import TOKENIZER, text_code
from scripts.openai.chat_template import ChatTemplate
from scripts.openai.engine import Engine, Limits, one_token
from scripts.openai.log import LINES, Bounded, client_of_request
from scripts.openai.reader import Asked, Reader, unpacked
from scripts.openai.wrong import ApiError

PLAIN = {"model": "m", "prompt": "x"}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
FULL = {f"k{n}": 1 for n in range(5000)}


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (messages.CompletionRequest, {**PLAIN, **FULL}),
        (messages.CompletionRequest, {**PLAIN, "stream_options": FULL}),
        (messages.CompletionRequest, {**PLAIN, "logit_bias": FULL}),
        (messages.CompletionRequest, {**PLAIN, "logit_bias": {str(n): "x" for n in range(1000)}}),
        (messages.CompletionRequest, {**PLAIN, "stop": [1] * 5000}),
        (messages.ChatRequest, {**CHAT, "messages": [FULL] * 20}),
        (messages.ChatRequest, {**CHAT, "messages": [{"role": "user", "content": [FULL] * 20}]}),
        (messages.ChatRequest, {**CHAT, "messages": [{"role": "user", "content": [{"type": "text"}] * 5000}]}),
        (messages.ChatRequest, {**CHAT, "tools": [{}] * 5000}),
        (messages.ChatRequest, {**CHAT, "response_format": FULL}),
    ],
    ids=range(10),
)
def test_the_first_mistake_ends_it_in_every_container(kind: Any, body: dict[str, Any]) -> None:
    with pytest.raises(pydantic.ValidationError) as wrong:
        kind.model_validate_json(json.dumps(body))
    assert wrong.value.error_count() <= 3


ARGUMENTS = [
    "functions", "function_call", "tools", "tool_choice", "parallel_tool_calls", "reasoning_effort", "audio", "modalities",
    "prediction", "web_search_options", "verbosity", "response_format", "logit_bias", "seed", "service_tier", "store", "metadata",
    "stop", "stream_options", "top_logprobs", "user", "max_completion_tokens", "frequency_penalty", "presence_penalty",
    "prompt_cache_key", "prompt_cache_retention", "safety_identifier", "n", "logprobs", "max_tokens", "temperature", "top_p",
]  # fmt: skip


def test_null_means_not_given() -> None:
    messages.ChatRequest.model_validate_json(json.dumps({**CHAT, **dict.fromkeys(ARGUMENTS)}))
    with pytest.raises(ApiError, match="audio is not supported"):
        reader.checked(messages.ChatRequest, json.dumps({**CHAT, "audio": {"voice": "x"}}).encode())


# what OpenAI's reference gives as the default, and what its clients send that ask for nothing
DEFAULTS = {
    "n": 1, "temperature": 1, "top_p": 1, "presence_penalty": 0, "frequency_penalty": 0, "logprobs": False, "stream": False,
    "store": False, "service_tier": "auto", "modalities": ["text"], "reasoning_effort": "medium", "verbosity": "medium",
    "parallel_tool_calls": True, "tool_choice": "none", "tools": [], "functions": [], "function_call": "none",
    "response_format": {"type": "text"}, "logit_bias": {}, "top_logprobs": 0, "skip_special_tokens": True,
}  # fmt: skip
ASKING = {
    "modalities": ["text", "audio"], "audio": {}, "prediction": {}, "reasoning_effort": "high", "verbosity": "low",
    "web_search_options": {}, "functions": [{"name": "f"}], "function_call": {"name": "f"}, "guided_grammar": "x",
    "use_beam_search": True, "length_penalty": 2, "chat_template": "x", "stop_token_ids": [1],
}  # fmt: skip


def test_defaults_ask_for_nothing_and_what_is_not_supported_is_called_that() -> None:
    reader.checked(messages.ChatRequest, json.dumps({**CHAT, **DEFAULTS}).encode())
    for name, value in ASKING.items():
        with pytest.raises(ApiError, match=f"^{name} is not supported$") as refused:
            reader.checked(messages.ChatRequest, json.dumps({**CHAT, name: value}).encode())
        assert (refused.value.status, refused.value.param) == (400, name)


KINDS = [
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}, {"type": kind, kind: {}}]}]},
     f"messages[0].content[1] {kind}")
    for kind in ("image_url", "input_audio", "file", "refusal")
] + [
    ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0] custom"),
    ({"tool_choice": {"type": "custom", "custom": {"name": "x"}}}, "tool_choice custom"),
    ({"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}}}, "tool_choice allowed_tools"),
    ({"messages": [{"role": "function", "name": "f", "content": "x"}]}, "messages[0] function"),
    ({"response_format": {"type": "structural_tag", "structures": []}}, "response_format structural_tag"),
]  # fmt: skip


@pytest.mark.parametrize(("more", "named"), KINDS, ids=[named for _, named in KINDS])
def test_kinds_that_openai_knows_are_not_supported_and_not_unknown(more: dict[str, Any], named: str) -> None:
    with pytest.raises(ApiError) as refused:
        reader.checked(messages.ChatRequest, json.dumps({**CHAT, **more}).encode())
    assert (refused.value.message, refused.value.code) == (f"{named} is not supported", "unsupported_parameter")


@pytest.fixture(scope="module")
def folder(served: Served) -> Path:
    [found] = (served.tree / "build/stories").glob("torch-0.8.0-tp2-float16")
    return found


def reader_of(folder: Path, streams: bool = True, template: str = "") -> Reader:
    text = text_code(folder).Text(folder / TOKENIZER)
    config = (folder / "model_repo/tensorrt_llm/config.pbtxt").read_text()
    if not streams:
        config = config.replace("decoupled: true", "decoupled: false").replace("decoupled: True", "decoupled: False")
    engine = Engine("127.0.0.1:1", config, Limits(8, 256, 512, 2048), [2])
    assert engine.streams == streams
    chat = ChatTemplate(template, folder / TOKENIZER, text) if template else None
    return Reader("m", engine, text, chat, 72)


def test_an_engine_without_guides_refuses_them_by_name(folder: Path) -> None:
    """NVIDIA's backend before 0.17, or one whose guided_decoding_backend is empty;
    the torch engine declares what it takes."""
    without = reader_of(folder)
    without.engine.guides, without.engine.parameters = False, frozenset()
    for body, name in (
        ({"guided_json": {}}, "guided_json"),
        ({"guided_choice": ["a"]}, "guided_choice"),
        ({"min_p": 0.5}, "min_p"),
        ({"logprobs": 2}, "logprobs"),
        ({"echo": True, "logprobs": 0}, "echo with logprobs"),
    ):
        asked = json.dumps({**PLAIN, **body}).encode()
        reader_of(folder).read(False, asked)
        with pytest.raises(ApiError, match=f"^{name} is not supported by this engine") as refused:
            without.read(False, asked)
        assert refused.value.param == name.partition(" ")[0]


def test_stop_words_times_prompts_are_counted_first(folder: Path) -> None:
    """They are spelt in every way for every prompt: 60 prompts with 16 long ones were minutes of work."""
    asked = {**PLAIN, "prompt": ["x"] * 60, "max_tokens": 1, "stop": ["a long stop string " * 20] * 16}
    with pytest.raises(ApiError, match="16 stop strings for each of 60 prompts") as refused:
        reader_of(folder, streams=False).read(False, json.dumps(asked).encode())
    assert refused.value.status == 400 and refused.value.param == "stop"
    assert reader_of(folder).read(False, json.dumps(asked).encode()).count == 60, (
        "where the engine streams they cost nothing"
    )


def test_what_echo_repeats_is_counted_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "MAX_ECHO_CHARACTERS", 1000)
    asked = {**PLAIN, "prompt": ["x" * 20] * 2, "echo": True, "max_tokens": 1}
    assert reader_of(folder).read(False, json.dumps({**asked, "n": 25}).encode()).shown == ["x" * 20] * 2
    with pytest.raises(ApiError, match="echo: the prompts have more than 1000 characters"):
        reader_of(folder).read(False, json.dumps({**asked, "n": 26}).encode())


def test_what_echo_tells_of_is_counted_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "MAX_ECHO_TOKENS", 1000)
    asked = {**PLAIN, "prompt": [[5] * 25] * 2, "echo": True, "max_tokens": 0}
    assert reader_of(folder).read(False, json.dumps({**asked, "n": 10, "logprobs": 1}).encode()).told == [[5] * 25] * 2
    for more in ({"n": 11, "logprobs": 1}, {"n": 10, "logprobs": 2}):
        with pytest.raises(ApiError, match="echo with logprobs tells of 1[0-9]00 tokens"):
            reader_of(folder).read(False, json.dumps({**asked, **more}).encode())


def test_an_answer_survives_the_way_to_the_worker() -> None:
    asked = Asked(
        chat=True,
        stream=True,
        n=2,
        stops=["\N{SNOWMAN}"],
        shown=["x"],
        seed=(1 << 64) - 1,
        shared=b"\0\1",
        own=[b"", b"\xff"],
    )
    assert unpacked(asked.packed()) == asked
    with pytest.raises(ApiError) as refused:
        unpacked(reader.refused(ApiError(404, "no", "model", "code")))
    assert (refused.value.status, refused.value.message, refused.value.param, refused.value.code) == (
        404,
        "no",
        "model",
        "code",
    )


POWER = "{{ 30 ** 400000000 }}"
REPEAT = "{{ 'a' * 6000000000 }}"
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}"


class Child:
    """A reader as its own process, asked over its socket."""

    def __init__(self, made: Reader, path: Path) -> None:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        listener.listen()
        me = os.getpid()
        self.pid = os.fork()
        if not self.pid:
            listener.close()
            reader.serve(made, str(path), me)
        self.link = listener.accept()[0]
        listener.close()
        self.link.settimeout(60)
        reader.receive(self.link, reader.LENGTH.size)

    def ask(self, chat: bool, body: object) -> bytes:
        """Its answer; nothing if it died."""
        data = json.dumps(body).encode()
        self.link.sendall(reader.LENGTH.pack(len(data)) + bytes([chat]) + data)
        try:
            head = reader.receive(self.link, reader.LENGTH.size)
            return reader.receive(self.link, reader.LENGTH.unpack(head)[0]) if head else b""
        except ConnectionError:
            return b""

    def end(self) -> int:
        self.link.close()
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.mark.parametrize(
    ("template", "said"), [(POWER, ""), (REPEAT, "MemoryError|does not take"), (LOOP, "longer than 2 s")]
)
def test_a_hostile_template_ends_its_child_or_less(folder: Path, tmp_path: Path, template: str, said: str) -> None:
    child = Child(reader_of(folder, template=template), tmp_path / "desk")
    answer = child.ask(True, CHAT)
    if said:
        with pytest.raises(ApiError, match=said):
            unpacked(answer)
        assert unpacked(child.ask(False, {**PLAIN, "max_tokens": 1})).count == 1, "it still answers"
        assert child.end() == 0
    else:
        assert (answer, child.end()) == (b"", -24)  # SIGXCPU


def test_one_token_is_told_apart_from_all_else() -> None:
    from tritonclient.grpc import service_pb2

    def message(token: int, final: bool = False) -> bytes:
        answer = service_pb2.ModelStreamInferResponse()
        answer.infer_response.model_name, answer.infer_response.id = "tensorrt_llm", "\x04\x05\0\0\0"
        answer.infer_response.parameters["triton_final_response"].bool_param = final
        answer.infer_response.outputs.add(name="output_ids", datatype="INT32", shape=[1, 1, 1])
        answer.infer_response.outputs.add(name="sequence_length", datatype="INT32", shape=[1, 1])
        answer.infer_response.raw_output_contents.append(token.to_bytes(4, "little"))
        answer.infer_response.raw_output_contents.append((1).to_bytes(4, "little"))
        return bytes(answer.SerializeToString())

    for first in (5, 1, 0):
        found = one_token(message(first), first)
        assert found is not None
        assert [found.token(message(token)) for token in (5, 0, 1, 2047, 1 << 30)] == [5, 0, 1, 2047, 1 << 30]
    assert found is not None
    assert found.token(message(5, final=True)) is None and found.token(message(5)[:-1]) is None


def test_the_log_is_bounded_for_each_client_and_never_raises() -> None:
    receiving, sending = os.pipe()
    handler = Bounded(sending)
    own = logging.Logger("own")
    own.addHandler(handler)
    for client in ("one", "two"):
        client_of_request.set(client)
        for n in range(100):
            own.error("%s %d", client, n)
    lines = os.read(receiving, 1 << 20).splitlines()
    assert len(lines) == 2 * LINES and handler.left_out == 2 * (100 - LINES)
    client_of_request.set("three")
    os.close(receiving)
    own.error("nobody reads this")
    handler.lines.clear()
    threads: list[threading.Thread] = []
    receiving, full = os.pipe()
    handler.descriptor = full
    os.set_blocking(full, False)
    threads.append(threading.Thread(target=lambda: deque(map(own.error, ["x" * 3000] * 200))))
    threads[0].start()
    threads[0].join(20)
    assert not threads[0].is_alive(), "a full pipe does not hold it"
    for descriptor in (receiving, sending, full):
        os.close(descriptor)
