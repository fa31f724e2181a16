"""STREAMING=off: one response a request, over gRPC ModelInfer and HTTP infer,
as NVIDIA's unary test tools ask for it."""

from __future__ import annotations

import json
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton
from project import copy_of_project, make
from server import Served, end_tree_of, serve
from triton_requests import (
    NOISE,
    PROMPT,
    STORY,
    Outputs,
    ask,
    assert_frees_its_slot,
    core_request,
    infer,
    is_clean,
    preprocessed,
    steps_of,
    text_of,
)
from tritonclient.utils import InferenceServerException
from waiting import wins_a_race

from scripts.ask import ask_over_http
from scripts.serving.triton_client import TYPES, floats, inputs_of, ints, texts, yes

TEXT_MODELS = ["ensemble", "tensorrt_llm_bls"]
REFUSED_STREAM = "Streaming is only supported if model is deployed using decoupled mode."


@pytest.fixture(scope="module")
def unary(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The bundled model at TP=1. tensorrt_llm_bls does without a response sender, as in Triton before 24.06;
    ensemble has one."""
    tree = copy_of_project(tmp_path_factory.mktemp("unary") / "tree")
    template = tree / "model_repo_template/tensorrt_llm_bls/config.pbtxt"
    text = template.read_text().replace("${unary_response_sender}", "false").replace("${bls_instance_count}", "4")
    assert text.count('"false"') == 1
    template.write_text(text)
    running = serve(tree, "TP=1", "STREAMING=off")
    try:
        yield running
        assert running.end() == 0, "".join(running.lines)
    finally:
        end_tree_of(running.process)


def over_http(served: Served, model: str, **values: Any) -> Outputs:
    """HTTP infer, as tritonclient.http sends it in JSON: the outputs, flat; or "error" and "status"."""
    inputs = [
        {
            "name": name,
            "shape": list(value.shape),
            "datatype": TYPES[value.dtype.char],
            "data": [item.decode() if isinstance(item, bytes) else item for item in value.reshape(-1).tolist()],
        }
        for name, value in values.items()
    ]
    answer = served.post(model, "infer", inputs=inputs)
    if "error" in answer:
        return answer
    arrays = {output["name"]: (output["data"], output["shape"]) for output in answer["outputs"]}
    return {
        name: np.array([item.encode() if isinstance(item, str) else item for item in data], dtype=None).reshape(shape)
        for name, (data, shape) in arrays.items()
    }


BOTH = pytest.mark.parametrize("over", [infer, over_http])


# --- NVIDIA's tools, with their exact tensors -------------------------------------------------------------------------


@BOTH
def test_end_to_end_test_has_the_same_text_in_one_step_and_in_three(unary: Served, over: Any) -> None:
    before = over(
        unary,
        "preprocessing",
        QUERY=texts(PROMPT),
        REQUEST_OUTPUT_LEN=ints(12),
        BAD_WORDS_DICT=texts(""),
        STOP_WORDS_DICT=texts(""),
    )
    core = over(
        unary, "tensorrt_llm",
        input_ids=before["INPUT_ID"].astype(np.int32), input_lengths=before["REQUEST_INPUT_LEN"].astype(np.int32),
        request_output_len=before["REQUEST_OUTPUT_LEN"].astype(np.int32),
        bad_words_list=before["BAD_WORDS_IDS"].astype(np.int32), stop_words_list=before["STOP_WORDS_IDS"].astype(np.int32),
    )  # fmt: skip
    after = over(
        unary,
        "postprocessing",
        TOKENS_BATCH=core["output_ids"].astype(np.int32),
        SEQUENCE_LENGTH=core["sequence_length"].astype(np.int32),
        CUM_LOG_PROBS=core["cum_log_probs"].astype(np.float32),
        OUTPUT_LOG_PROBS=core["output_log_probs"].astype(np.float32),
        CONTEXT_LOGITS=core["context_logits"].astype(np.float32),
        GENERATION_LOGITS=core["generation_logits"].astype(np.float32),
    )
    for model in TEXT_MODELS:
        whole = over(
            unary, model, text_input=texts(PROMPT), max_tokens=ints(12), bad_words=texts(""), stop_words=texts("")
        )
        assert whole["text_output"].item() == after["OUTPUT"].item()
        assert STORY.startswith(whole["text_output"].item().decode()) and whole["output_log_probs"].shape == (1, 1, 12)


@BOTH
def test_benchmark_core_model(unary: Served, over: Any) -> None:
    ids = preprocessed(unary)["INPUT_ID"]
    answer = over(
        unary, "tensorrt_llm",
        input_ids=ids, input_lengths=ints(ids.shape[1]), request_output_len=ints(5), end_id=ints(-1),
    )  # fmt: skip
    assert answer["sequence_length"].tolist() == [[5]] and answer["output_ids"].shape == (1, 1, 5)


@pytest.mark.parametrize("model", TEXT_MODELS)
def test_end_to_end_grpc_client_asks_over_a_stream_all_the_same(unary: Served, model: str) -> None:
    [only] = ask(unary, model, text_input=texts(PROMPT), max_tokens=ints(12), stream=yes(False))
    assert STORY.startswith(text_of([only])) and len(text_of([only])) > 40


# --- many at once -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["tensorrt_llm", *TEXT_MODELS])
def test_eight_at_once_share_their_steps(unary: Served, model: str) -> None:
    """One after the other they would take 8 x 60 steps; no answer waits for the end of another."""
    text = {"text_input": texts(PROMPT), "max_tokens": ints(60), "end_id": ints(-1)}
    tokens = core_request(preprocessed(unary)["INPUT_ID"], 60, end_id=ints(-1))
    name, request = ("output_ids", tokens) if model == "tensorrt_llm" else ("text_output", text)
    answers: set[str] = set()

    def eight(_: object) -> None:
        with ThreadPoolExecutor(8) as clients:
            answers.update(clients.map(lambda _: str(infer(unary, model, **request)[name].tolist()), range(8)))

    assert wins_a_race(lambda: 60 <= steps_of(unary, eight) < 4 * 60)
    assert len(answers) == 1


def test_a_short_request_does_not_wait_for_a_long_one(unary: Served) -> None:
    was_first: list[bool] = []

    def both(begun: Callable[[], None]) -> None:
        ended = threading.Event()
        request = {"text_input": texts(PROMPT), "max_tokens": ints(450), "end_id": ints(-1)}
        client.async_infer("ensemble", inputs_of(request), lambda result, error: ended.set())
        begun()
        infer(unary, "ensemble", text_input=texts(PROMPT), max_tokens=ints(2))
        was_first.append(not ended.is_set())
        assert ended.wait(60)

    with triton.InferenceServerClient(unary.grpc) as client:
        assert wins_a_race(lambda: steps_of(unary, both) and was_first[-1])


@pytest.mark.parametrize("model", TEXT_MODELS)
def test_a_client_that_cancels_frees_its_slot(unary: Served, model: str) -> None:
    def leave(begun: Callable[[], None]) -> None:
        request = {"text_input": texts(PROMPT), "max_tokens": ints(450), "end_id": ints(-1)}
        running = client.async_infer(model, inputs_of(request), lambda result, error: None)
        begun()
        running.cancel()

    with triton.InferenceServerClient(unary.grpc) as client:
        assert_frees_its_slot(unary, leave)


@pytest.mark.parametrize("model", TEXT_MODELS)
def test_a_stop_word_ends_the_text_before_it_and_the_work_with_it(unary: Served, model: str) -> None:
    request = {"text_input": texts(PROMPT), "max_tokens": ints(450), "end_id": ints(-1)}

    def stopped(_: object) -> None:
        answer = infer(unary, model, stop_words=texts("never", "village"), **request)
        assert answer["text_output"].item() == b", in a small "

    assert wins_a_race(lambda: steps_of(unary, stopped) < 200)
    # this one does not end with a token, but the text is cut all the same
    request["max_tokens"] = ints(20)
    assert infer(unary, model, stop_words=texts("age surr"), **request)["text_output"].item() == b", in a small vill"


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["tensorrt_llm", *TEXT_MODELS])
def test_a_stream_is_refused_in_tensorrt_llms_words(unary: Served, model: str) -> None:
    text = {"text_input": texts(PROMPT), "max_tokens": ints(5), "stream": yes()}
    request = core_request(ints(1, 2, 3), 5, streaming=yes()) if model == "tensorrt_llm" else text
    for asked in (infer, ask):
        with pytest.raises(InferenceServerException) as refused:
            asked(unary, model, **request)
        assert refused.value.message() == REFUSED_STREAM
    answer = over_http(unary, model, **request)
    assert (answer["status"], answer["error"]) == (400, REFUSED_STREAM)


@pytest.mark.parametrize("how", ["generate", "generate_stream"])
def test_generate_has_one_response_or_one_error(unary: Served, how: str) -> None:
    def post(**body: Any) -> tuple[int, list[dict[str, Any]]]:
        url = f"{unary.http}/v2/models/ensemble/{how}"
        try:
            with urllib.request.urlopen(url, json.dumps(body).encode(), timeout=60) as answer:
                status, said = answer.status, answer.read()
        except urllib.error.HTTPError as error:
            status, said = error.code, error.read()
        return status, [json.loads(line) for line in re.findall(r"\{.*\}", said.decode())]

    status, [answer] = post(text_input=PROMPT, max_tokens=12)
    assert status == 200 and STORY.startswith(answer["text_output"])
    assert post(text_input=PROMPT, max_tokens=12, stream=True) == (400, [{"error": REFUSED_STREAM}])
    status, [answer] = post(text_input="", max_tokens=12)
    assert (status, answer) == (400, {"error": "text_input is empty"})


@pytest.mark.parametrize(
    ("model", "values", "message"),
    [
        ("ensemble", {"text_input": texts("")}, "text_input is empty"),
        ("tensorrt_llm_bls", {"text_input": texts(b"\xff")}, "text_input is not UTF-8: byte 0xff at offset 0 of 1"),
        ("ensemble", {"text_input": texts("a"), "temperature": floats(np.nan)}, "temperature is nan; it must be a finite number"),
        ("tensorrt_llm_bls", {"text_input": texts("a"), "max_tokens": ints(5000)}, "this engine takes at most 512"),
        ("tensorrt_llm", {"input_ids": ints(1), "input_lengths": ints(2), "request_output_len": ints(3)}, "input_lengths is 2"),
        ("tensorrt_llm", {"input_ids": ints(1), "input_lengths": ints(1), "request_output_len": ints(0)}, "must be greater than 0"),
    ],
)  # fmt: skip
def test_an_error_is_one_short_sentence(unary: Served, model: str, values: Any, message: str) -> None:
    request = values if model == "tensorrt_llm" else {"max_tokens": ints(5), **values}
    with pytest.raises(InferenceServerException) as refused:
        infer(unary, model, **request)
    assert message in refused.value.message() and is_clean(refused.value.message())
    assert refused.value.status() == "StatusCode.INVALID_ARGUMENT"


def test_a_request_is_stopped_by_its_id_and_still_answered(unary: Served) -> None:
    request = core_request(preprocessed(unary)["INPUT_ID"], 450, end_id=ints(-1))
    nothing = {"input_ids": ints(), "input_lengths": ints(0), "request_output_len": ints(0), "stop": yes()}
    answers: list[Any] = []

    def stop(begun: Callable[[], None]) -> None:
        ended = threading.Event()

        def heard(result: Any, error: Any) -> None:
            answers[:] = result, error
            ended.set()

        client.async_infer("tensorrt_llm", inputs_of(request), heard, request_id="7")
        begun()
        assert not client.infer("tensorrt_llm", inputs_of(nothing), request_id="7").get_response().outputs
        assert ended.wait(60)

    with triton.InferenceServerClient(unary.grpc) as client:
        assert_frees_its_slot(unary, stop)
    assert answers[1] is None and answers[0].as_numpy("output_ids").shape[2] < 450


# --- our own client, and the log --------------------------------------------------------------------------------------


def test_make_ask_sees_that_this_server_does_not_stream(unary: Served) -> None:
    done = make(unary.tree, "ask", f"HTTP_PORT={unary.http_port}", f"GRPC_PORT={unary.grpc_port}", "MAX_TOKENS=12")
    assert (done.returncode, done.stderr) == (0, "")
    assert STORY.startswith(done.stdout.strip("\n")) and len(done.stdout) > 40


def test_so_does_it_without_tritonclient(unary: Served, capsys: pytest.CaptureFixture[str]) -> None:
    ask_over_http(unary.http, PROMPT, 12)
    assert STORY.startswith(capsys.readouterr().out.strip("\n"))


def test_no_unexpected_warning_is_in_the_servers_log(unary: Served) -> None:
    """Last in this file: after every request above."""
    [log] = unary.tree.glob("build/stories/torch-*-tp1-*/serve.log")
    found = [
        line
        for line in log.read_text().splitlines()
        if re.search(r"(: |^)[WEF]\d{4} |[Ee]rror|Traceback|[Ww]arning", line)
    ]
    assert [line for line in found if not any(noise in line for noise in NOISE)] == []
