"""NVIDIA's client scripts, row by row of docker/contracts/clients.json: the tensors that a script sends, over the
protocol that it uses, to a real tritonserver with the tensors of its version;
and what the script assumes of the answer.

The rules "post-shape", "pre-decoder-ids" and "post-unknown-input" of docker/contracts/backend-rules hold here too.
"""

from __future__ import annotations

import json
import queue
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton
from project import ROOT, copy_of_project
from server import Served, end_tree_of, serve
from triton_requests import PROMPT, STORY
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

ROWS = json.loads((ROOT / "docker/contracts/clients.json").read_text())["clients"]
TOOLCHAINS = json.loads((ROOT / "docker/toolchains.json").read_text())
BACKENDS = {row["contract"]["backend"]: version for version, row in TOOLCHAINS.items()}
# Whose tensors a version's clients meet; identity_test.py is older than every TOOLCHAIN
PLACE = {"v0.5.0": "v0.8.0"}
IDS = [1, 792, 670, 260, 568]
NUMPY = {"INT32": np.int32, "FP32": np.float32, "BOOL": np.bool_, "BYTES": np.object_}
# What the scripts' options are at when they are not typed, and short answers
VALUES: dict[str, Any] = {
    "input_ids": [IDS], "input_lengths": [[len(IDS)]], "request_output_len": [[8]], "beam_width": [[1]], "temperature": [[1.0]],
    "end_id": [[2]], "pad_id": [[2]], "runtime_top_k": [[1]], "runtime_top_p": [[0.0]], "return_log_probs": [[False]],
    "num_return_sequences": [[1]], "text_input": [[PROMPT]], "max_tokens": [[8]], "bad_words": [[""]], "stop_words": [[""]],
    "QUERY": [[PROMPT]], "REQUEST_OUTPUT_LEN": [[8]], "BAD_WORDS_DICT": [[""]], "STOP_WORDS_DICT": [[""]],
}  # fmt: skip
# Options that this engine serves too, with what a user may type
OPTIONS: dict[str, Any] = {
    "repetition_penalty": [[1.1]], "presence_penalty": [[0.1]], "frequency_penalty": [[0.1]], "return_log_probs": [[True]],
    "return_context_logits": [[True]], "return_generation_logits": [[True]], "bad_words": [["forest", "dog"]],
    "stop_words": [["girl", "boy"]], "embedding_bias_words": [["little"]], "embedding_bias_weights": [[1.5]], "end_id": [[2]],
    "pad_id": [[2]], "exclude_input_in_output": [[True]], "return_num_input_tokens": [[True]], "return_num_output_tokens": [[True]],
}  # fmt: skip
Tensors = dict[str, Any]
Place = tuple[str, bool]
Check = Callable[..., None]


def row_of(script: str, version: str) -> dict[str, Any]:
    [row] = [row for row in ROWS if (row["script"], row["version"]) == (script, version)]
    return row  # type: ignore[no-any-return]


def array(name: str, value: Any, dtype: str, shape: Any) -> Any:
    """A tensor as the row describes it."""
    if dtype == "BYTES":
        value = [[item.encode() for item in line] for line in value]
    found = np.array(value, dtype=NUMPY[dtype])
    if isinstance(shape, list):
        assert len(shape) == found.ndim and all(want in (have, "n") for want, have in zip(shape, found.shape)), (
            name,
            shape,
            found.shape,
        )
    return found


def sent_by(call: dict[str, Any], given: Tensors, options: bool = False) -> Tensors:
    """What a row's script always sends; with `options` also what each option adds that this engine serves."""
    tensors = {}
    for spec in call["inputs"]:
        name = spec["name"]
        if spec["when"] == "always" or (spec["when"] == "not in the warm-up"):
            value = given[name] if name in given else VALUES[name]
        elif options and name in OPTIONS and spec["when"].startswith("--"):
            value = OPTIONS[name]
        else:
            continue
        tensors[name] = array(name, value, spec["dtype"], spec["shape"])
    return tensors


# --- servers: of each version, first one that streams, then one that does not ---


@pytest.fixture(scope="module")
def trees(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str]]:
    """backend -> (a tree, its TOOLCHAIN). The tag 0.14.0 is in no image:
    its tensors are served under the name of 24.10's."""
    found = {backend: (tree, version) for backend, version in BACKENDS.items()}
    if "v0.14.0" not in found:
        tag = copy_of_project(tmp_path_factory.mktemp("tag") / "tree")
        path = tag / "docker/toolchains.json"
        text = path.read_text()
        assert text.count('"backend": "r24.10"') == 1
        path.write_text(text.replace('"backend": "r24.10"', '"backend": "v0.14.0"'))
        found["v0.14.0"] = (tag, BACKENDS["r24.10"])
    return found


class Servers:
    """One server at a time; another place, that is another version or way of answering, ends it and starts its own."""

    def __init__(self, trees: dict[str, tuple[Path, str]]) -> None:
        self._trees = trees
        self._place: Place | None = None
        self._running: Served | None = None

    def at(self, place: Place) -> Served:
        if self._running is None or place != self._place:
            self.end()
            tree, version = self._trees[place[0]]
            self._running = serve(tree, "TP=1", f"TOOLCHAIN={version}", f"STREAMING={'on' if place[1] else 'off'}")
            self._place = place
        return self._running

    def end(self) -> None:
        if self._running is not None:
            running, self._running = self._running, None
            try:
                assert running.end() == 0, "".join(running.lines)
            finally:
                end_tree_of(running.process)


@pytest.fixture(scope="module")
def servers(trees: dict[str, tuple[Path, str]]) -> Iterator[Servers]:
    found = Servers(trees)
    yield found
    found.end()


# Which test asks whom: (its place, the row's version), and what else it takes. test_row goes from place to place.
CASES: list[Any] = []


def row(script: str, modes: Sequence[bool], **more: Sequence[Any]) -> Callable[[Check], Check]:
    """The function is called for every row of a script, at a server that streams (True) and one that does not,
    with each of `more`."""

    def keep(check: Check) -> Check:
        for one in ROWS:
            for streaming in modes if one["script"] == script else ():
                place = (PLACE.get(one["version"], one["version"]), streaming)
                for values in product(*more.values()):
                    named = "-".join(getattr(value, "__name__", str(value)) for value in values)
                    id = f"{place[0]}-{'streams' if streaming else 'unary'}-{one['version']}-{script[:-3]}-{named}"
                    CASES.append((place, id, check, (one["version"], streaming, *values)))
        return check

    return keep


# --- two protocols ---


def triton_inputs(tensors: Tensors) -> list[Any]:
    inputs = []
    for name, value in tensors.items():
        inputs.append(triton.InferInput(name, list(value.shape), np_to_triton_dtype(value.dtype)))
        inputs[-1].set_data_from_numpy(value)
    return inputs


class Response:
    """A response, whatever it came by: outputs in their order, name -> (datatype, array)."""

    def __init__(self, id: str, outputs: dict[str, tuple[str, Any]]) -> None:
        self.id, self.outputs = id, outputs

    def __getitem__(self, name: str) -> Any:
        return self.outputs[name][1]


def of_grpc(result: Any) -> Response:
    said = result.get_response()
    return Response(said.id, {one.name: (one.datatype, result.as_numpy(one.name)) for one in said.outputs})


def over_grpc(served: Served, model: str, tensors: Tensors, outputs: Sequence[str] | None = None) -> Response:
    wanted = None if outputs is None else [triton.InferRequestedOutput(name) for name in outputs]
    with triton.InferenceServerClient(served.grpc) as client:
        return of_grpc(client.infer(model, triton_inputs(tensors), request_id="7", outputs=wanted))


def over_http(served: Served, model: str, tensors: Tensors, outputs: Sequence[str] | None = None) -> Response:
    def plain(value: Any) -> Any:
        return value.decode() if isinstance(value, bytes) else value

    inputs = [
        {
            "name": name,
            "shape": list(value.shape),
            "datatype": np_to_triton_dtype(value.dtype),
            "data": [plain(item) for item in value.reshape(-1).tolist()],
        }
        for name, value in tensors.items()
    ]
    body: dict[str, Any] = {"id": "7", "inputs": inputs}
    if outputs is not None:
        body["outputs"] = [{"name": name} for name in outputs]
    request = urllib.request.Request(f"{served.http}/v2/models/{model}/infer", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=60) as answer:
        said = json.load(answer)
    return Response(
        said["id"],
        {
            one["name"]: (
                one["datatype"],
                np.array(
                    [item.encode() if isinstance(item, str) else item for item in one["data"]], NUMPY[one["datatype"]]
                ).reshape(one["shape"]),
            )
            for one in said["outputs"]
        },
    )


BOTH = (over_http, over_grpc)


def streamed(served: Served, model: str, *requests: tuple[str, Tensors, Sequence[str] | None]) -> list[Response]:
    """async_stream_infer: requests of (id, tensors, outputs) on one stream; every response until each has ended.
    Errors are raised."""
    answers: queue.Queue[Any] = queue.Queue()
    found, ended = [], 0
    with triton.InferenceServerClient(served.grpc) as client:
        client.start_stream(lambda result, error: answers.put(error or result))
        for request_id, tensors, outputs in requests:
            wanted = None if outputs is None else [triton.InferRequestedOutput(name) for name in outputs]
            client.async_stream_infer(
                model, triton_inputs(tensors), request_id=request_id, outputs=wanted, enable_empty_final_response=True
            )
        while ended < len(requests):
            answer = answers.get(timeout=60)
            if isinstance(answer, InferenceServerException):
                raise answer
            found.append(of_grpc(answer))
            ended += answer.get_response().parameters["triton_final_response"].bool_param
        client.stop_stream()
    return found


def check(row_outputs: list[dict[str, Any]], responses: Sequence[Response], options: Sequence[str] = ()) -> None:
    """Outputs that a script reads always, or reads because of an option: there, and of the type that it reads."""
    for spec in row_outputs:
        names = [spec["name"]] if " " not in spec["name"] and spec["name"] != "outputs[0]" else []
        may_miss = "or missing" in spec["assumes"] or "printed when there" in spec["assumes"]
        for name in names if spec["when"] == "always" or spec["when"] in options else []:
            for response in responses:
                assert may_miss or name in response.outputs, (name, list(response.outputs))
                if name in response.outputs and spec["dtype"] in NUMPY:
                    assert response.outputs[name][0] == spec["dtype"], name


# --- inflight_batcher_llm_client.py ---


@row("inflight_batcher_llm_client.py", (True, False))
def inflight_batcher_llm_client(served_by: Served, version: str, streaming: bool) -> None:
    row = row_of("inflight_batcher_llm_client.py", version)
    always = sent_by(row, {"streaming": [[streaming]]})
    more = sent_by(row, {"streaming": [[streaming]]}, options=True)
    declared = tensors_of(served_by)
    more = {name: value for name, value in more.items() if name in declared}
    assert set(always) <= declared and len(more) > len(always)
    options = ["--return-log-probs", "--return-context-logits", "--return-generation-logits"]
    for tensors, asked in ((always, []), (more, options)):
        if streaming:
            responses = [one for one in streamed(served_by, "tensorrt_llm", ("1", tensors, None)) if one.outputs]
        else:
            responses = [over_grpc(served_by, "tensorrt_llm", tensors)]
        # logits of a stream come where there are any: the script prints what is there
        check(row["outputs"], responses[:1], asked)
        check(row["outputs"], responses)
        tokens: list[int] = []
        for response in responses:
            assert response["output_ids"].ndim == 3 and response["sequence_length"].shape == (1, 1)
            tokens += response["output_ids"][0][0].tolist()
        assert len(tokens) == 8
    with_names = ["output_ids", "sequence_length"]
    if streaming:
        [*named] = [one for one in streamed(served_by, "tensorrt_llm", ("1", always, with_names)) if one.outputs]
        assert all(list(one.outputs) == with_names for one in named)
        stop = sent_by(
            row["stop_request"],
            {"input_ids": [[0]], "input_lengths": [[0]], "request_output_len": [[0]], "stop": [[True]]},
        )
        long = {**always, "request_output_len": np.array([[200]], np.int32), "end_id": np.array([[-1]], np.int32)}
        answers = streamed(served_by, "tensorrt_llm", ("1", long, None), ("1", stop, None))
        assert sum(one["output_ids"].size for one in answers if one.outputs) < 200
        assert any(not one.outputs for one in answers)  # the script takes it for the answer to its stop


def tensors_of(served: Served, model: str = "tensorrt_llm", kind: str = "input") -> set[str]:
    with triton.InferenceServerClient(served.grpc) as client:
        config = client.get_model_config(model, as_json=True)["config"]
    return {tensor["name"] for tensor in config[kind]}


# --- end_to_end_grpc_client.py ---


@row("end_to_end_grpc_client.py", (True, False), model=("ensemble", "tensorrt_llm_bls"))
def end_to_end_grpc_client(served_by: Served, version: str, streaming: bool, model: str) -> None:
    row = row_of("end_to_end_grpc_client.py", version)
    names_outputs = row["requested_outputs"] != "none named"
    for options in (False, True):
        tensors = sent_by(row, {"stream": [[streaming]]}, options)
        logits = ["context_logits", "generation_logits"] if options else []
        outputs = ["text_output", *logits] if names_outputs else None
        responses = [one for one in streamed(served_by, model, ("1", tensors, outputs)) if one.outputs]
        asked = ["--return-context-logits", "--return-generation-logits"] if options and not streaming else []
        check(row["outputs"], responses, asked)
        text = ""
        for response in responses:
            assert response["text_output"].ndim == 1 and isinstance(response["text_output"][0], bytes)
            text += response["text_output"][0].decode("utf8")
            if "batch_index" in response.outputs:
                assert response["batch_index"][0][0] == 0
        assert options or STORY.startswith(text)
        assert (len(responses) > 1) == streaming or options


# --- end_to_end_test.py ---


@row("end_to_end_test.py", (False,), over=BOTH)
def end_to_end_test(served_by: Served, version: str, streaming: bool, over: Any) -> None:
    row = row_of("end_to_end_test.py", version)
    calls = {call["model"]: call for call in row["calls"]}
    before = over(served_by, "preprocessing", sent_by(calls["preprocessing"], {}))
    check(calls["preprocessing"]["outputs"], [before])
    assert before["INPUT_ID"].shape == (1, len(IDS)) and before["INPUT_ID"].tolist() == [IDS]
    assert before["REQUEST_INPUT_LEN"].tolist() == [[len(IDS)]] and before["REQUEST_OUTPUT_LEN"].tolist() == [[8]]
    core_given = {
        "input_ids": before["INPUT_ID"],
        "input_lengths": before["REQUEST_INPUT_LEN"],
        "end_id": before["OUT_END_ID"],
        "request_output_len": before["REQUEST_OUTPUT_LEN"],
        "pad_id": before["OUT_PAD_ID"],
    }
    if "DECODER_INPUT_ID" in {spec["name"] for spec in calls["preprocessing"]["outputs"]}:
        core_given["decoder_input_ids"] = before["DECODER_INPUT_ID"]
        assert before["DECODER_INPUT_ID"].tolist() == before["OUT_PAD_ID"].tolist()
    core = over(served_by, "tensorrt_llm", sent_by(calls["tensorrt_llm"], core_given))
    check(calls["tensorrt_llm"]["outputs"], [core])
    after_given = {
        "TOKENS_BATCH": core["output_ids"],
        "SEQUENCE_LENGTH": core["sequence_length"],
        **{
            name.upper(): core[name]
            for name in ("cum_log_probs", "output_log_probs", "context_logits", "generation_logits")
            if name in core.outputs
        },
    }
    after = over(served_by, "postprocessing", sent_by(calls["postprocessing"], after_given))
    check(calls["postprocessing"]["outputs"], [after])
    assert after["OUTPUT"].shape == (1,)
    if "OUT_GENERATION_LOGITS" in {spec["name"] for spec in calls["postprocessing"]["outputs"]}:
        assert np.allclose(after["OUT_GENERATION_LOGITS"], core["generation_logits"])
    for model in ("ensemble", *(["tensorrt_llm_bls"] if "tensorrt_llm_bls" in calls else [])):
        outputs = None if calls["ensemble"].get("requested_outputs", "none named") == "none named" else ["text_output"]
        whole = over(served_by, model, sent_by(calls[model], {}), outputs)
        check(calls[model]["outputs"], [whole])
        assert (whole["text_output"] == after["OUTPUT"]).all() and STORY.startswith(whole["text_output"][0].decode())
        for name in set(whole.outputs) & {"cum_log_probs", "context_logits", "generation_logits"}:
            assert whole[name].shape == core[name].shape and np.allclose(whole[name], core[name]), name


# --- benchmark_core_model.py, and identity_test.py, which it replaced ---


@row("benchmark_core_model.py", (False,), over=BOTH)
def benchmark_core_model(served_by: Served, version: str, streaming: bool, over: Any) -> None:
    tensors = sent_by(row_of("benchmark_core_model.py", version), {"end_id": [[-1]], "pad_id": [[0]]})
    core_benchmark(over(served_by, "tensorrt_llm", tensors))


@row("benchmark_core_model.py", (True,))
def benchmark_core_model_decoupled(served_by: Served, version: str, streaming: bool) -> None:
    """--decoupled -i grpc, which 0.8.0's script does not have."""
    found = row_of("benchmark_core_model.py", version)
    assert ("--decoupled" in found["decoupled"]) == (version != "v0.8.0")
    tensors = sent_by(found, {"end_id": [[-1]], "pad_id": [[0]]})
    for response in streamed(served_by, "tensorrt_llm", ("7", tensors, None)):
        core_benchmark(response)


@row("identity_test.py", (False,), over=BOTH)
def identity_test(served_by: Served, version: str, streaming: bool, over: Any) -> None:
    core_benchmark(over(served_by, "tensorrt_llm", sent_by(row_of("identity_test.py", version), {})))


def core_benchmark(response: Response) -> None:
    """Both count the tokens by the third number of the first output's shape, and find their request by its id."""
    name, (_, ids) = next(iter(response.outputs.items()))
    assert (name, ids.shape, response.id) == ("output_ids", (1, 1, 8), "7")


# --- test_max_queue_size.py, which must fail: no queue limit is set ---


@row("test_max_queue_size.py", (True,))
def max_queue_size_finds_no_limit(served_by: Served, version: str, streaming: bool) -> None:
    """Its row is in the README's table: it wants a refusal, and our limit is 0, none."""
    [spec] = row_of("test_max_queue_size.py", version)["inputs"]
    assert spec["shape"] == "as there"
    core = row_of("inflight_batcher_llm_client.py", version)
    named = set(spec["name"].split(", "))
    tensors = {
        name: array(name, {**VALUES, "streaming": [[False]]}[name], one["dtype"], one["shape"])
        for one in core["inputs"]
        if (name := one["name"]) in named
    }
    assert set(tensors) == named
    responses = streamed(served_by, "tensorrt_llm", *[(str(n), tensors, None) for n in range(1, 25)])
    assert sum(one["output_ids"].size for one in responses if one.outputs) == 24 * 8


# --- and who meets what ---


def clients_of_the_tag_do_not_fit_24_10(served_by: Served, script: str) -> None:
    tensors = sent_by(row_of(script, "v0.14.0"), {"streaming": [[False]], "stream": [[False]]})
    with pytest.raises(InferenceServerException) as problem:
        over_grpc(served_by, "tensorrt_llm" if "inflight" in script else "ensemble", tensors)
    assert "unexpected inference input 'num_return_sequences'" in str(problem.value)


for script in ("inflight_batcher_llm_client.py", "end_to_end_grpc_client.py"):
    name = f"r24.10-unary-refuses-v0.14.0-{script[:-3]}"
    CASES.append((("r24.10", False), name, clients_of_the_tag_do_not_fit_24_10, (script,)))


def postprocessing_takes_two_inputs(served_by: Served) -> None:
    """The rule "post-unknown-input"; SKIP_SPECIAL_TOKENS is ours."""
    assert tensors_of(served_by, "postprocessing") == {"TOKENS_BATCH", "SEQUENCE_LENGTH", "SKIP_SPECIAL_TOKENS"}


for backend in ("v0.14.0", "v1.2.1"):
    CASES.append(((backend, False), f"{backend}-unary-post-unknown-input", postprocessing_takes_two_inputs, ()))


@pytest.mark.parametrize("case", [pytest.param(case, id=case[1]) for case in sorted(CASES, key=lambda case: case[0])])
def test_row(servers: Servers, case: Any) -> None:
    """In the order of the places, so that each has one server."""
    place, _, check_row, arguments = case
    check_row(servers.at(place), *arguments)


def test_every_row_has_its_test_and_those_that_fail_their_reason() -> None:
    tested = {
        "inflight_batcher_llm_client.py",
        "end_to_end_grpc_client.py",
        "end_to_end_test.py",
        "benchmark_core_model.py",
        "identity_test.py",
        "test_max_queue_size.py",
    }
    assert {row["script"] for row in ROWS} == tested
    assert {PLACE.get(row["version"], row["version"]) for row in ROWS} == {*BACKENDS, "v0.14.0"}
    readme = (ROOT / "model_repo_template/README.md").read_text()
    for said in ("test_max_queue_size.py", "end_to_end_test.py", "benchmark_core_model.py", "num_return_sequences"):
        assert said in readme, said
