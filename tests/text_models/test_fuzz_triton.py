"""Hostile clients of Triton's two protocols do not end the server, make it hang, see a traceback or harm others."""

from __future__ import annotations

import http.client
import json
import os
import re
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from server import Served, processes_below
from triton_requests import PROMPT, STORY
from tritonclient.grpc import service_pb2, service_pb2_grpc
from waiting import until

MODELS = ["ensemble", "tensorrt_llm_bls", "preprocessing", "postprocessing", "tensorrt_llm"]
# 100 examples a test; `make test-long` has the profile "long" (conftest.py): 5,000
FUZZ = settings(
    deadline=None,
    max_examples=settings().max_examples,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
ANSWER_SECONDS = 60
# it hangs, or it is not there any more
GONE = (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAVAILABLE)
# What one answer may hold: no paths of the server, no stack
LEAK = re.compile(r"Traceback|File \"|\.py\b|site-packages|/model_repo_template/|Error:")

NAMES = st.sampled_from([
    "text_input", "max_tokens", "bad_words", "stop_words", "end_id", "pad_id", "top_k", "top_p", "temperature", "length_penalty",
    "repetition_penalty", "min_length", "presence_penalty", "frequency_penalty", "random_seed", "return_log_probs",
    "return_context_logits", "return_generation_logits", "beam_width", "stream", "embedding_bias_words", "embedding_bias_weights",
    "prompt_embedding_table", "prompt_vocab_size", "skip_special_tokens", "QUERY", "REQUEST_OUTPUT_LEN", "BAD_WORDS_DICT",
    "STOP_WORDS_DICT", "EMBEDDING_BIAS_WORDS", "EMBEDDING_BIAS_WEIGHTS", "END_ID", "PAD_ID", "TOKENS_BATCH", "SEQUENCE_LENGTH",
    "CUM_LOG_PROBS", "OUTPUT_LOG_PROBS", "CONTEXT_LOGITS", "GENERATION_LOGITS", "SKIP_SPECIAL_TOKENS", "input_ids", "input_lengths",
    "request_output_len", "runtime_top_k", "runtime_top_p", "len_penalty", "stop_words_list", "bad_words_list", "embedding_bias",
    "streaming", "stop", "lora_config", "id", "parameters", "",
])  # fmt: skip
TEXTS = st.one_of(
    st.text(max_size=40), st.sampled_from([PROMPT, "", "</s>", "\0", "안녕 👩‍👩‍👧", "a" * 5000, "\u202e"])
)
NUMBERS = st.one_of(
    st.integers(-3, 20),
    st.sampled_from([2**31 - 1, -(2**31), 2**31, 2**63, 2**64 - 1, 2**70]),
    st.floats(width=32),
    st.booleans(),
)
SCALARS = st.one_of(st.none(), TEXTS, NUMBERS)
VALUES = st.one_of(
    SCALARS,
    st.lists(SCALARS, max_size=5),
    st.recursive(SCALARS, lambda inner: st.dictionaries(TEXTS, inner, max_size=2), max_leaves=4),
)


@pytest.fixture(scope="module", autouse=True)
def unharmed(served: Served) -> Any:
    """After all of it: the same processes, an answer as before, no request left,
    and no more memory than a few answers need."""
    before, memory = processes_below(served.process.pid), resident_bytes(served)
    yield
    until(
        lambda: served.active == 0 and served.metric("nv_trt_llm_request_metrics", request_type="waiting") == 0,
        "requests are left",
    )
    assert answers(served)
    after = processes_below(served.process.pid)
    assert {pid: after.get(pid) for pid in before} == before
    assert resident_bytes(served) - memory < 400 << 20


def resident_bytes(served: Served) -> int:
    """Resident memory of all processes of the server."""
    pages = 0
    for pid in processes_below(served.process.pid):
        try:
            pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        except OSError:
            pass
    return pages * os.sysconf("SC_PAGE_SIZE")


def answers(served: Served) -> bool:
    """Another client's request is answered as ever."""
    answer = served.post("ensemble", text_input=PROMPT, max_tokens=4)
    return answer["status"] == 200 and STORY.startswith(answer["text_output"])


def http_exchange(served: Served, method: str, path: str, body: bytes, headers: dict[str, str]) -> list[Any]:
    """[status, body] of one exchange; [] when the server closed the connection without an answer (a request that is not
    HTTP)."""
    connection = http.client.HTTPConnection("127.0.0.1", served.http_port, timeout=ANSWER_SECONDS)
    try:
        connection.request(method, path, body=body, headers=headers)
        response = connection.getresponse()
        return [response.status, response.read().decode(errors="replace")]
    except (http.client.HTTPException, ConnectionError):
        return []
    finally:
        connection.close()


# --- HTTP -------------------------------------------------------------------------------------------------------------


@FUZZ
@given(
    model=st.sampled_from(MODELS),
    how=st.sampled_from(["generate", "generate_stream"]),
    body=st.dictionaries(NAMES, VALUES, max_size=6),
    asked=st.booleans(),
)
def test_any_json_over_generate(served: Served, model: str, how: str, body: dict[str, Any], asked: bool) -> None:
    """asked: what makes it a whole request is there, so that the rest is what is looked at."""
    if asked and model in ("ensemble", "tensorrt_llm_bls"):
        body = {"text_input": PROMPT, "max_tokens": 3, **body}
    status, said = http_exchange(served, "POST", f"/v2/models/{model}/{how}", json.dumps(body).encode(), {})
    assert status in (200, 400, 500, 503), said
    assert not LEAK.search(said), said


@pytest.mark.parametrize("model", MODELS)
def test_a_batch_of_nothing_is_refused(served: Served, model: str) -> None:
    """Every input that has one value, in a list of none:
    Triton 2.51 crashes on it if an input is reshaped to have no axis."""
    status, described = http_exchange(served, "GET", f"/v2/models/{model}", b"", {})
    assert status == 200
    single = [tensor["name"] for tensor in json.loads(described)["inputs"] if tensor["shape"] == [-1, 1]]
    for names in [single, *([name] for name in single), single[:3], single[-3:]]:
        body = json.dumps(dict.fromkeys(names, [])).encode()
        answer = http_exchange(served, "POST", f"/v2/models/{model}/generate", body, {})
        assert answer and answer[0] == 400, (names, answer)


BROKEN_BODIES = [
    b"", b"{", b"[]", b"null", b'"x"', b"{" * 2000, b"[" * 5000, b'{"text_input": "\\ud800", "max_tokens": 1}',
    b'{"text_input": "a", "max_tokens": 1e99}', b'{"text_input": "a", "text_input": "b", "max_tokens": 1}',
]  # fmt: skip
BODIES = st.one_of(st.binary(max_size=200), st.text(max_size=100).map(str.encode), st.sampled_from(BROKEN_BODIES))


@FUZZ
@given(model=st.sampled_from(MODELS), body=BODIES, how=st.sampled_from(["generate", "generate_stream", "infer"]))
def test_any_bytes_for_json(served: Served, model: str, how: str, body: bytes) -> None:
    answer = http_exchange(served, "POST", f"/v2/models/{model}/{how}", body, {})
    assert answer and answer[0] in (200, 400, 500, 501, 503), answer
    assert not LEAK.search(answer[1]), answer


TENSORS = st.fixed_dictionaries(
    {
        "name": NAMES,
        "shape": st.lists(st.integers(-1, 4), max_size=4),
        "datatype": st.sampled_from(["BYTES", "INT32", "FP32", "BOOL", "UINT64", "INT64", "FP16", "X", ""]),
        "data": st.lists(st.one_of(TEXTS, NUMBERS), max_size=6),
    },
    optional={
        "parameters": st.dictionaries(
            st.sampled_from(["binary_data_size", "shared_memory_region", "x"]), SCALARS, max_size=2
        )
    },
)


@FUZZ
@given(
    model=st.sampled_from(["preprocessing", "postprocessing"]),
    inputs=st.lists(TENSORS, max_size=4),
    header=st.one_of(st.none(), st.integers(-5, 500)),
)
def test_any_tensors_over_infer(served: Served, model: str, inputs: list[Any], header: Any) -> None:
    headers = {} if header is None else {"Inference-Header-Content-Length": str(header)}
    answer = http_exchange(
        served, "POST", f"/v2/models/{model}/infer", json.dumps({"inputs": inputs}).encode(), headers
    )
    assert answer and answer[0] in (200, 400, 500, 503), answer
    assert not LEAK.search(answer[1]), answer


@FUZZ
@given(
    method=st.sampled_from(["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"]),
    path=st.text("/v2modelsnbrg.%-_1", max_size=40),
)
def test_any_path(served: Served, method: str, path: str) -> None:
    answer = http_exchange(served, method, "/" + path, b"", {})
    assert not answer or not LEAK.search(answer[1]), answer


# --- gRPC -------------------------------------------------------------------------------------------------------------

WORDS = st.lists(st.integers(-(2**31), 2**31 - 1), max_size=4).map(lambda words: np.array(words, np.int32).tobytes())
RAW = st.one_of(st.binary(max_size=24), WORDS)
INPUTS = st.tuples(
    NAMES,
    st.sampled_from(["BYTES", "INT32", "FP32", "BOOL", "UINT64", "X", ""]),
    st.lists(st.integers(-2, 5), max_size=4),
    RAW,
)
MESSAGES = st.fixed_dictionaries(
    {
        "model": st.one_of(st.sampled_from(MODELS), st.text(max_size=8)),
        "version": st.sampled_from(["", "1", "9", "x"]),
        "id": st.text(max_size=8),
        "inputs": st.lists(INPUTS, max_size=5),
        "outputs": st.lists(st.sampled_from(["text_output", "output_ids", "INPUT_ID", "x", ""]), max_size=2),
        "asked": st.booleans(),
    }
)


def message_of(spelt: dict[str, Any]) -> Any:
    message = service_pb2.ModelInferRequest(model_name=spelt["model"], model_version=spelt["version"], id=spelt["id"])
    message.parameters["triton_enable_empty_final_response"].bool_param = True
    whole = [
        ("text_input", "BYTES", [1, 1], len(PROMPT).to_bytes(4, "little") + PROMPT.encode()),
        ("max_tokens", "INT32", [1, 1], (3).to_bytes(4, "little")),
    ]
    for name, datatype, shape, raw in (whole if spelt["asked"] else []) + spelt["inputs"]:
        message.inputs.add(name=name, datatype=datatype, shape=shape)
        message.raw_input_contents.append(raw)
    for name in spelt["outputs"]:
        message.outputs.add(name=name)
    return message


def stream_of(served: Served, messages: list[Any]) -> None:
    """They are answered, each with a response or one sentence."""
    with grpc.insecure_channel(served.grpc) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        try:
            said = [one.error_message for one in stub.ModelStreamInfer(iter(messages), timeout=ANSWER_SECONDS)]
        except grpc.RpcError as error:
            assert error.code() not in GONE, error
            said = [error.details()]
        assert not any(LEAK.search(one or "") for one in said), said


@FUZZ
@given(spelt=MESSAGES)
def test_any_message_on_a_grpc_stream(served: Served, spelt: dict[str, Any]) -> None:
    stream_of(served, [message_of(spelt)])


STREAMING = ["ensemble", "tensorrt_llm_bls", "tensorrt_llm"]


@FUZZ
@given(several=st.lists(MESSAGES, min_size=2, max_size=8), model=st.sampled_from(STREAMING))
def test_any_messages_one_after_the_other_on_a_grpc_stream(
    served: Served, several: list[dict[str, Any]], model: str
) -> None:
    """To models that stream, or to all others. Both on one stream may end Triton 2.51:
    model_repo_template/README.md."""
    stream_of(served, [message_of(one) for one in several if one["model"] not in STREAMING])
    known = [{**one, "version": "1" if one["version"] == "1" else ""} for one in several]
    stream_of(served, [message_of({**one, "model": model}) for one in known])


# What the server's owner may do and no client: a client that registers shared memory names any of this host's
CLOSED = ["SystemSharedMemoryRegister", "SystemSharedMemoryStatus", "CudaSharedMemoryRegister", "TraceSetting"]
CLOSED += ["LogSettings"]
METHODS = ["ModelInfer", "ModelStreamInfer", "ModelConfig", "RepositoryIndex", "ModelStatistics"]


@pytest.mark.parametrize("method", CLOSED)
def test_what_only_the_owner_may_do_is_closed_over_grpc(served: Served, method: str) -> None:
    with (
        grpc.insecure_channel(served.grpc) as channel,
        pytest.raises(grpc.RpcError, match="This protocol is restricted"),
    ):
        channel.unary_unary(f"/inference.GRPCInferenceService/{method}")(b"", timeout=ANSWER_SECONDS)


@pytest.mark.parametrize(
    "path", ["systemsharedmemory/region/x/register", "cudasharedmemory/region/x/register", "trace/setting", "logging"]
)
def test_what_only_the_owner_may_do_is_closed_over_http(served: Served, path: str) -> None:
    status, said = http_exchange(
        served, "POST", f"/v2/{path}", b'{"key": "/x", "offset": 0, "byte_size": 8}', {"bake-key": "KEY"}
    )
    assert status == 403 and "restricted" in said, said


@FUZZ
@given(spelt=MESSAGES, method=st.sampled_from(METHODS), raw=st.binary(max_size=60))
def test_any_bytes_for_a_grpc_message(served: Served, spelt: dict[str, Any], method: str, raw: bytes) -> None:
    """Bytes that are not a message, or half of one."""
    whole = message_of(spelt).SerializeToString()
    with grpc.insecure_channel(served.grpc) as channel:
        call = channel.unary_unary(f"/inference.GRPCInferenceService/{method}")
        for data in (raw, whole[: len(whole) // 2] + raw, whole):
            try:
                call(data, timeout=ANSWER_SECONDS)
            except grpc.RpcError as error:
                assert error.code() not in GONE, error
                assert not LEAK.search(error.details() or ""), error.details()


BUSY = "the server is busy: 1024 requests are in progress"


def test_more_requests_than_are_taken_at_once_are_refused(served: Served) -> None:
    """And another client is answered meanwhile, be it that the server is busy."""
    request = {"model": "ensemble", "version": "", "inputs": [], "outputs": ["text_output"], "asked": True}
    messages = [message_of({**request, "id": str(n)}) for n in range(1400)]
    answered: set[str] = set()
    refused: set[str] = set()
    others: list[Any] = []
    with grpc.insecure_channel(served.grpc) as channel:
        for answer in service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer(iter(messages), timeout=120):
            if not answered:
                others.append(served.post("ensemble", text_input=PROMPT, max_tokens=4))
            if answer.error_message:
                assert answer.error_message == BUSY
            (refused if answer.error_message else answered).add(answer.infer_response.id)
    assert len(answered | refused) == len(messages) and len(answered) >= 1024 - len(others)
    assert all(other.get("error", BUSY) == BUSY for other in others)
    assert answers(served)
