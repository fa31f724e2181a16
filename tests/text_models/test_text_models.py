"""Good and bad requests of NVIDIA's clients to the text models of a real Triton; and what its log says afterwards."""

from __future__ import annotations

import json
import re
import socket
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import closing
from typing import Any

import numpy as np
import pytest
import tokenizers
from project import make
from server import Served
from triton_requests import (
    NOISE,
    PROMPT,
    PROMPTS,
    STORY,
    Stream,
    ask,
    assert_frees_its_slot,
    core_request,
    infer,
    is_clean,
    preprocessed,
    steps_of,
    tell,
    text_of,
)
from tritonclient.utils import InferenceServerException
from waiting import until, wins_a_race

from scripts.serving.triton_client import floats, ints, texts, yes


@pytest.mark.parametrize("model", ["ensemble", "tensorrt_llm_bls"])
@pytest.mark.parametrize("streaming", [False, True])
def test_end_to_end_grpc_client(served: Served, model: str, streaming: bool) -> None:
    always = {"stream": yes(streaming), "beam_width": ints(1), "temperature": floats(1.0)}
    optional = {
        "bad_words": texts(""),
        "stop_words": texts(""),
        "repetition_penalty": floats(1.0),
        "presence_penalty": floats(0.0),
        "frequency_penalty": floats(0.0),
        "end_id": ints(2),
        "pad_id": ints(2),
    }
    for more in ({}, optional):
        responses = ask(served, model, text_input=texts(PROMPT), max_tokens=ints(12), **always, **more)
        assert STORY.startswith(text_of(responses)) and len(text_of(responses)) > 40
        assert (len(responses) > 1) == streaming
        assert sum(response["output_log_probs"].size for response in responses) == 12


@pytest.mark.parametrize("streaming", [False, True])
def test_genai_perf(served: Served, streaming: bool) -> None:
    """--service-kind triton --backend tensorrtllm, with --output-tokens-mean 12 --output-tokens-mean-deterministic."""
    asked = {
        "text_input": texts(PROMPT),
        "max_tokens": ints(12),
        "min_length": ints(12),
        **({"stream": yes()} if streaming else {}),
    }
    responses = ask(served, "ensemble", **asked)
    assert STORY.startswith(text_of(responses)) and (len(responses) > 1) == streaming
    metadata = json.loads(urllib.request.urlopen(f"{served.http}/v2/models/ensemble/config", timeout=60).read())
    assert metadata["model_transaction_policy"]["decoupled"] is True  # perf_analyzer streams only then


def test_special_tokens_are_hidden_or_shown_by_request(served: Served) -> None:
    request = {"TOKENS_BATCH": ints(1, 2, 300)[None], "SEQUENCE_LENGTH": ints(3), **NO_LOG_PROBS}
    hidden, shown = (
        infer(served, "postprocessing", **request, **asked)["OUTPUT"].item()
        for asked in ({}, {"SKIP_SPECIAL_TOKENS": yes(False)})
    )
    assert (hidden, shown) == (b"The", b"<s></s> The")
    assert tell(served, skip_special_tokens=yes(False)) == tell(served)


def test_inflight_batcher_llm_client(served: Served) -> None:
    ids = preprocessed(served)["INPUT_ID"]
    [whole] = ask(served, "tensorrt_llm", **core_request(ids, 12))
    parts = ask(served, "tensorrt_llm", **core_request(ids, 12, streaming=yes()))
    assert whole["output_ids"].shape == (1, 1, 12) and whole["sequence_length"].tolist() == [[12]]
    assert np.concatenate([part["output_ids"] for part in parts], axis=2).tolist() == whole["output_ids"].tolist()


def test_inflight_batcher_llm_client_stops_a_request_by_its_id(served: Served) -> None:
    ids = preprocessed(served)["INPUT_ID"]
    with closing(Stream(served)) as stream:
        stream.send("tensorrt_llm", "7", **core_request(ids, 400, streaming=yes(), end_id=ints(-1)))
        stream.next()
        nothing = {"input_ids": ints(), "input_lengths": ints(0), "request_output_len": ints(0), "stop": yes()}
        stream.send("tensorrt_llm", "7", **nothing)
        n_tokens = sum(answer.as_numpy("output_ids").size for _ in range(2) for answer in stream.until_final())
    assert n_tokens < 300


def test_end_to_end_test_has_the_same_text_in_one_step_and_in_three(served: Served) -> None:
    before = preprocessed(served)
    ids, lengths = before["INPUT_ID"], before["REQUEST_INPUT_LEN"]
    [core] = ask(
        served, "tensorrt_llm", input_ids=ids, input_lengths=lengths, request_output_len=before["REQUEST_OUTPUT_LEN"],
        bad_words_list=before["BAD_WORDS_IDS"], stop_words_list=before["STOP_WORDS_IDS"], embedding_bias=before["EMBEDDING_BIAS"],
        end_id=before["OUT_END_ID"], pad_id=before["OUT_PAD_ID"],
    )  # fmt: skip
    after = infer(
        served,
        "postprocessing",
        TOKENS_BATCH=core["output_ids"],
        SEQUENCE_LENGTH=core["sequence_length"],
        CUM_LOG_PROBS=core["cum_log_probs"],
        OUTPUT_LOG_PROBS=core["output_log_probs"],
        CONTEXT_LOGITS=core["context_logits"],
        GENERATION_LOGITS=core["generation_logits"],
    )
    assert after["OUTPUT"].item().decode() == tell(served, bad_words=texts(""), stop_words=texts(""))
    for name in ("CUM_LOG_PROBS", "OUTPUT_LOG_PROBS", "CONTEXT_LOGITS", "GENERATION_LOGITS"):
        assert np.array_equal(after[f"OUT_{name}"], core[name.lower()])


def test_benchmark_core_model(served: Served) -> None:
    ids = preprocessed(served)["INPUT_ID"]
    [answer] = ask(
        served,
        "tensorrt_llm",
        input_ids=ids,
        input_lengths=ints(ids.shape[1]),
        request_output_len=ints(5),
        end_id=ints(-1),
    )
    assert answer["sequence_length"].tolist() == [[5]]


def test_the_models_over_http(served: Served) -> None:
    body = {
        "inputs": [
            {"name": "QUERY", "shape": [1, 1], "datatype": "BYTES", "data": [PROMPT]},
            {"name": "REQUEST_OUTPUT_LEN", "shape": [1, 1], "datatype": "INT32", "data": [3]},
        ]
    }
    outputs = {output["name"]: output for output in served.post("preprocessing", "infer", **body)["outputs"]}
    ids = outputs["INPUT_ID"]["data"]
    core = served.post("tensorrt_llm", input_ids=ids, input_lengths=len(ids), request_output_len=3)
    assert len(core["output_ids"]) == 3
    body = {
        "inputs": [
            {"name": "TOKENS_BATCH", "shape": [1, 1, 3], "datatype": "INT32", "data": core["output_ids"]},
            {"name": "SEQUENCE_LENGTH", "shape": [1, 1], "datatype": "INT32", "data": [3]},
            {"name": "CUM_LOG_PROBS", "shape": [1, 1], "datatype": "FP32", "data": [0.0]},
            {"name": "OUTPUT_LOG_PROBS", "shape": [1, 1, 3], "datatype": "FP32", "data": [0.0, 0.0, 0.0]},
        ]
    }
    outputs = {output["name"]: output for output in served.post("postprocessing", "infer", **body)["outputs"]}
    assert outputs["OUTPUT"]["data"] == [", in a"]


@pytest.mark.parametrize("prompt", [PROMPT, "  two  spaces ", "안녕", "👩‍👩‍👧", "</s><s>", "a\0b"])
def test_prompts_get_hugging_faces_ids_with_the_beginning_in_front(served: Served, prompt: str) -> None:
    assert make(served.tree, "hf").returncode == 0
    hf = tokenizers.Tokenizer.from_file(str(served.tree / "build/stories/hf/tokenizer.json"))
    hf.encode_special_tokens = True
    before = preprocessed(served, prompt)
    assert before["INPUT_ID"].tolist() == [hf.encode(prompt).ids]
    assert before["INPUT_ID"][0, 0] == 1
    assert before["REQUEST_INPUT_LEN"].tolist() == [[before["INPUT_ID"].size]]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_stop_word_ends_the_text_before_it_and_the_work_with_it(served: Served, streaming: bool) -> None:
    """Across tokens, in the middle of one, and with nothing of it streamed."""

    def stopped(_: object) -> None:
        responses = ask(
            served, "ensemble",
            text_input=texts(PROMPT), max_tokens=ints(450), stop_words=texts("never", "age surr"), stream=yes(streaming),
            return_log_probs=yes(),
        )  # fmt: skip
        assert text_of(responses) == ", in a small vill"
        assert sum(response["output_log_probs"].size for response in responses) >= 6

    assert wins_a_race(lambda: steps_of(served, stopped) < 300)


def test_bad_words_and_biased_words(served: Served) -> None:
    assert "village" in tell(served)
    assert "village" not in tell(served, bad_words=texts("village"))
    assert "small" not in tell(
        served, embedding_bias_words=texts("small", "tiny"), embedding_bias_weights=floats(-50.0, -1.0)
    )
    everywhere = tell(served, embedding_bias_words=texts("dragon"), embedding_bias_weights=floats(100.0))
    assert "dragon" in everywhere


def test_broken_characters_are_the_same_streamed_and_whole(served: Served) -> None:
    """Bytes are made likely until the model says little but broken characters."""
    biased = {"embedding_bias_words": texts("😀", "한"), "embedding_bias_weights": floats(30.0, 29.0), "max_tokens": 40}
    sampled = {**biased, "top_k": ints(50), "random_seed": np.array([[5]], dtype=np.uint64), "temperature": floats(9.0)}
    whole = tell(served, **sampled)
    assert "\N{REPLACEMENT CHARACTER}" in whole
    assert tell(served, stream=yes(), **sampled) == whole


def test_log_probs_and_logits(served: Served) -> None:
    flags = {name: yes() for name in ("return_log_probs", "return_context_logits", "return_generation_logits")}
    n_prompt = preprocessed(served)["INPUT_ID"].size
    for model in ("ensemble", "tensorrt_llm_bls"):
        [whole] = ask(served, model, text_input=texts(PROMPT), max_tokens=ints(6), **flags)
        assert whole["context_logits"].shape == (1, n_prompt, 2048)
        assert whole["generation_logits"].shape == (1, 1, 6, 2048)
        logits = whole["generation_logits"][0, 0].astype(np.float64)
        chosen = logits.max(axis=1) - np.log(np.exp(logits).sum(axis=1))
        assert np.allclose(whole["output_log_probs"][0, 0], chosen, atol=1e-4)
        assert np.allclose(whole["cum_log_probs"], chosen.sum(), atol=1e-3)
        parts = ask(served, model, text_input=texts(PROMPT), max_tokens=ints(6), stream=yes(), **flags)
        for name, axis in (("output_log_probs", 2), ("generation_logits", 2)):
            assert np.array_equal(np.concatenate([part[name] for part in parts], axis=axis), whole[name])
        assert np.array_equal(parts[0]["context_logits"], whole["context_logits"])
        assert parts[-1]["cum_log_probs"] == whole["cum_log_probs"]


def test_what_was_not_asked_for_is_zeros_of_the_smallest_shape(served: Served) -> None:
    """As in NVIDIA's backend at 0.8.0: clients feed them to postprocessing."""
    [whole] = ask(served, "ensemble", text_input=texts(PROMPT), max_tokens=ints(3))
    shapes = {name: value.shape for name, value in whole.items()}
    assert shapes == {
        "text_output": (1,),
        "cum_log_probs": (1, 1),
        "output_log_probs": (1, 1, 3),
        "context_logits": (1, 1, 1),
        "generation_logits": (1, 1, 1, 1),
    }
    [only] = [
        list(r) for r in ask(served, "ensemble", outputs=["text_output"], text_input=texts(PROMPT), max_tokens=ints(3))
    ]
    assert only == ["text_output"]


def test_seeds_by_either_name(served: Served) -> None:
    def told(**seed: int) -> str:
        values: dict[str, Any] = {name: np.array([[value]], dtype=np.uint64) for name, value in seed.items()}
        return tell(served, top_k=ints(40), temperature=floats(1.5), **values)

    assert told(random_seed=3) == told(random_seed=3) == told(seed=3) != told(random_seed=4)


def test_an_end_id_ends_and_a_min_length_keeps_it_from_ending(served: Served) -> None:
    end = int(
        ask(served, "tensorrt_llm", **core_request(preprocessed(served)["INPUT_ID"], 3))[0]["output_ids"][0, 0, 2]
    )
    assert tell(served, end_id=ints(end)) == ", in"
    for name in ("min_length", "min_tokens"):
        assert len(tell(served, end_id=ints(end), **{name: ints(9)})) > len(", in a")


def test_an_answer_that_ends_at_once_is_one_empty_response(served: Served) -> None:
    first = int(
        ask(served, "tensorrt_llm", **core_request(preprocessed(served)["INPUT_ID"], 1))[0]["output_ids"].item()
    )
    answer = served.post("ensemble", text_input=PROMPT, max_tokens=4, end_id=first)
    assert (answer["status"], answer["text_output"]) == (200, "")


HTTP_REFUSALS: dict[str, Any] = {
    "empty": ({"text_input": ""}, "text_input is empty"),
    "too long": ({"text_input": "the dog " * 150}, "the prompt has 302 tokens; this engine takes at most 256"),
    "far too long": ({"text_input": "dog " * 50_000}, "text_input has 200000 bytes"),
    "many long words": (
        {"bad_words": ["x" * 500] * 9},
        "bad_words holds 4500 bytes; all words of a request may have 4096",
    ),
    "two texts": ({"text_input": [PROMPT, PROMPT]}, "text_input holds 2 texts; a request is one text"),
    "no tokens": ({"max_tokens": 0}, "max_tokens is 0; it must be greater than 0"),
    "fewer": ({"max_tokens": -3}, "max_tokens is -3; it must be greater than 0"),
    "too many": ({"max_tokens": 5000}, "max_tokens 5000 make 5005; this engine takes at most 512"),
    "nan": ({"temperature": float("nan")}, "temperature is nan; it must be a finite number"),
    "end": ({"end_id": 2048}, "end_id is 2048; the vocabulary has ids 0 to 2047"),
    "beams": ({"beam_width": 2}, "beam_width is 2; this engine supports only 1"),
    "top_k": ({"top_k": -1}, "top_k is -1"),
    "bias": (
        {"embedding_bias_words": ["a", "b"], "embedding_bias_weights": [1.0]},
        "embedding_bias_words holds 2 words, embedding_bias_weights 1 weights",
    ),
    "infinite bias": (
        {"embedding_bias_words": ["a"], "embedding_bias_weights": [float("inf")]},
        "embedding_bias holds a value",
    ),
    "no limit": ({"max_tokens": None}, "max_tokens"),
    "no limit, Triton counts": ({"max_tokens": None, "top_k": 1}, "max_tokens is missing"),
    "no text, Triton counts": ({"text_input": None, "top_k": 1}, "text_input is missing"),
}


@pytest.mark.parametrize("case", HTTP_REFUSALS)
@pytest.mark.parametrize("how", ["generate", "generate_stream"])
def test_a_bad_request_over_http_is_one_short_sentence(served: Served, case: str, how: str) -> None:
    changed, message = HTTP_REFUSALS[case]
    body = {"text_input": PROMPT, "max_tokens": 5, "stream": how != "generate", **changed}
    status, answer = post(served, how, {name: value for name, value in body.items() if value is not None})
    assert status == 400
    [error] = re.findall(r'^(?:data: )?\{"error":"(.*)"\}\s*$', answer)
    assert message in error
    assert is_clean(error)


def post(served: Served, how: str, body: Any) -> tuple[int, str]:
    """Status and body as they come."""
    try:
        with urllib.request.urlopen(
            f"{served.http}/v2/models/ensemble/{how}", json.dumps(body).encode(), timeout=60
        ) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


GRPC_REFUSALS: dict[str, Any] = {
    "not UTF-8": ({"text_input": texts(b"ab\xff")}, "text_input is not UTF-8: byte 0xff at offset 2 of 3"),
    "stop not UTF-8": ({"stop_words": texts(b"\xc3")}, "stop_words is not UTF-8: byte 0xc3 at offset 0 of 1"),
    "two texts": ({"text_input": texts("a", "b")}, "text_input holds 2 texts; a request is one text"),
    "no text": ({"text_input": texts()}, "text_input holds 0 texts; a request is one text"),
    "a batch": (
        {"text_input": texts("a", "b").reshape(2, 1), "max_tokens": ints(5, 5).reshape(2, 1)},
        "text_input holds 2 texts; a request is one text",
    ),
    "two limits": ({"max_tokens": ints(5, 6)}, "max_tokens holds 2 values; it takes one"),
    "nan": ({"temperature": floats(np.nan)}, "temperature is nan; it must be a finite number"),
    "shape": ({"temperature": floats(1.0, 1.0)}, "unexpected shape for input 'temperature'"),
    "no batch": ({"text_input": texts("a")[0]}, "unexpected shape for input 'text_input'"),
    "type": ({"max_tokens": ints(5).astype(np.int64)}, "inference input 'max_tokens' data-type is 'INT64'"),
    "unknown": ({"max_token": ints(5)}, "unexpected inference input 'max_token' for model 'ensemble'"),
    "unsupported": (
        {"prompt_embedding_table": np.zeros((1, 3, 4), np.float16)},
        "prompt_embedding_table is not supported",
    ),
}


@pytest.mark.parametrize("case", GRPC_REFUSALS)
def test_a_bad_request_over_grpc_is_one_short_sentence(served: Served, case: str) -> None:
    changed, message = GRPC_REFUSALS[case]
    with pytest.raises(InferenceServerException) as refused:
        ask(served, "ensemble", **{"text_input": texts(PROMPT), "max_tokens": ints(5), **changed})
    assert message in refused.value.message()
    assert is_clean(refused.value.message().split(" NOTE: ")[0])


NO_LOG_PROBS = {"CUM_LOG_PROBS": floats(0), "OUTPUT_LOG_PROBS": floats(0)[None]}


@pytest.mark.parametrize(
    ("model", "values", "message"),
    [
        (
            "preprocessing",
            {"QUERY": texts(b"\xff"), "REQUEST_OUTPUT_LEN": ints(5)},
            "QUERY is not UTF-8: byte 0xff at offset 0 of 1",
        ),
        ("preprocessing", {"QUERY": texts(""), "REQUEST_OUTPUT_LEN": ints(5)}, "QUERY is empty"),
        (
            "postprocessing",
            {"TOKENS_BATCH": ints(1, 2, 3)[None], "SEQUENCE_LENGTH": ints(4), **NO_LOG_PROBS},
            "SEQUENCE_LENGTH is [[4]]; TOKENS_BATCH has 3 tokens",
        ),
        (
            "postprocessing",
            {"TOKENS_BATCH": ints(1, 2)[None], "SEQUENCE_LENGTH": ints(1, 1), **NO_LOG_PROBS},
            "there must be one length per beam",
        ),
    ],
)
def test_a_bad_request_to_the_steps(served: Served, model: str, values: Any, message: str) -> None:
    with pytest.raises(InferenceServerException) as refused:
        infer(served, model, **values)
    assert message in refused.value.message()
    assert refused.value.status() == "StatusCode.INVALID_ARGUMENT"


def test_a_prompt_of_emoji_is_answered(served: Served) -> None:
    answer = served.post("ensemble", text_input="😀👩‍👩‍👧🏳️‍🌈", max_tokens=5)
    assert answer["status"] == 200 and answer["text_output"]


def test_a_grpc_client_that_cancels_frees_its_slot(served: Served) -> None:
    def leave(begun: Callable[[], None]) -> None:
        stream = Stream(served)
        stream.send("ensemble", text_input=texts(PROMPT), max_tokens=ints(450), end_id=ints(-1), stream=yes())
        begun()
        stream.close(cancel=True)

    assert_frees_its_slot(served, leave)


def test_an_http_client_that_leaves_its_stream_frees_its_slot(served: Served) -> None:
    body = json.dumps({"text_input": PROMPT, "max_tokens": 450, "end_id": -1, "stream": True})
    head = f"POST /v2/models/ensemble/generate_stream HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"

    def leave(begun: Callable[[], None]) -> None:
        with socket.create_connection(("127.0.0.1", served.http_port)) as connection:
            connection.sendall(head.encode() + body.encode())
            begun()

    assert_frees_its_slot(served, leave)


def test_a_request_that_waits_for_a_slot_can_leave_too(served: Served) -> None:
    def waiting() -> float:
        return served.metric("nv_trt_llm_request_metrics", request_type="waiting")

    slots = int(served.metric("nv_trt_llm_request_metrics", request_type="max"))
    still_full = []

    def leave(begun: Callable[[], None]) -> None:
        streams = [Stream(served) for _ in range(2)]
        request = {"max_tokens": ints(450), "end_id": ints(-1), "stream": yes()}
        for n in range(slots):
            streams[0].send("ensemble", str(n), text_input=texts(PROMPT), **request)
        begun()
        streams[1].send("ensemble", text_input=texts(PROMPT), **request)
        until(lambda: waiting() == 1 or served.active == 0, "nobody waits")
        streams[1].close(cancel=True)
        until(lambda: waiting() == 0, "it waits on")
        still_full.append(served.active == slots)
        streams[0].close(cancel=True)

    assert wins_a_race(lambda: steps_of(served, leave) < 400 and still_full[-1])


@pytest.mark.parametrize("n_streams", [8, 64])
def test_many_at_once_get_what_each_gets_alone(served: Served, n_streams: int) -> None:
    """Half of them want the text only: outputs that no request wants have crashed the server."""
    alone = {prompt: tell(served, prompt=prompt, max_tokens=16) for prompt in PROMPTS}
    together: dict[str, str] = {str(n): "" for n in range(n_streams)}
    with closing(Stream(served)) as stream:
        for n in range(n_streams):
            stream.send(
                ["ensemble", "tensorrt_llm_bls"][n // 8 % 2], str(n), ["text_output"] if n % 2 else None,
                text_input=texts(PROMPTS[n % 8]), max_tokens=ints(16), stream=yes(),
            )  # fmt: skip
        for _ in range(n_streams):
            for answer in stream.until_final():
                together[answer.get_response().id] += answer.as_numpy("text_output").item().decode()
    assert together == {str(n): alone[PROMPTS[n % 8]] for n in range(n_streams)}


def test_no_unexpected_warning_is_in_the_servers_log(served: Served) -> None:
    """Last in this file: after every request above."""
    assert served.post("ensemble", text_input=PROMPT, max_tokens=12)["text_output"] == tell(served)
    [log] = served.tree.glob("build/stories/torch-*-tp2-*/serve.log")
    found = [
        line
        for line in log.read_text().splitlines()
        if re.search(r"(: |^)[WEF]\d{4} |[Ee]rror|Traceback|[Ww]arning", line)
    ]
    assert [line for line in found if not any(noise in line for noise in NOISE)] == []
