"""One rehearsed server per TOOLCHAIN: the answers of its strict stand-in,
and what our text models and endpoint make of them. Its rooms, and the accuracy gate over its engines.

Rules that need a served model are named here (docker/contracts/backend-rules); all others are broken in
tests/nvidia/test_backend_rules.py.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from project import ROOT, make
from rehearsing import verify
from server import Served, end_tree_of, serve
from triton_requests import PROMPT, STORY, Stream, core_request, tell
from tritonclient.utils import InferenceServerException

from scripts.serving.triton_client import floats, ints, texts, yes

RULES = json.loads((ROOT / "docker/contracts/backend-rules/rules.json").read_text())
TOOLCHAINS = json.loads((ROOT / "docker/toolchains.json").read_text())
BACKENDS = {row["contract"]["backend"]: version for version, row in TOOLCHAINS.items()}
IDS = ints(1, 792, 670, 260, 568)
# What a request that names no outputs gets beside what it asks for, by rule
ZEROS: dict[str, tuple[str, dict[str, tuple[int, ...]]]] = {
    "v0.8.0": ("response-dummies-0.8.0", {"cum_log_probs": (1, 1), "output_log_probs": (1, 1, 6), "context_logits": (1, 1, 1),
               "generation_logits": (1, 1, 1, 1)}),
    "r24.10": ("response-dummies-r24.10", {"cum_log_probs": (1, 1), "output_log_probs": (1, 1, 5), "context_logits": (1, 1, 1),
               "generation_logits": (1, 1, 1, 1), "batch_index": (1, 1)}),
    "v0.14.0": ("response-sequence-index", {"sequence_index": (1, 1)}),
    "v1.2.1": ("response-no-dummies", {}),
}  # fmt: skip
Answer = tuple[dict[str, Any], bool]


def gpus_for(version: str) -> str:
    return "2x V100-SXM2-16GB" if "7.0" in TOOLCHAINS[version]["architectures"] else "2x A100-80GB"


@pytest.fixture(scope="module", params=BACKENDS)
def rehearsed(request: pytest.FixtureRequest, tree: Any) -> Iterator[tuple[str, Served]]:
    """(the backend's name, a server of its TOOLCHAIN)."""
    version = BACKENDS[request.param]
    words = ["ENGINE=tensorrt", f"TOOLCHAIN={version}", f"REHEARSAL={gpus_for(version)}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REHEARSAL_DOCKER", "no")
        running = serve(tree, *words)
    try:
        yield request.param, running
        assert running.end() == 0, "".join(running.lines)
    finally:
        end_tree_of(running.process)


def answers(served: Served, request_id: str = "", outputs: Any = None, **values: Any) -> list[Answer]:
    """Every response of tensorrt_llm: its tensors, and whether it is the last. An error is raised."""
    found: list[Answer] = []
    with closing(Stream(served)) as stream:
        stream.send("tensorrt_llm", request_id, outputs, **values)
        while not found or not found[-1][1]:
            response = stream.next().get_response()
            final = response.parameters["triton_final_response"].bool_param
            found.append((tensors_of(response), final))
    return found


def tensors_of(response: Any) -> dict[str, Any]:
    arrays = {}
    for output, raw in zip(response.outputs, response.raw_output_contents):
        kind = {"INT32": np.int32, "FP32": np.float32, "INT64": np.int64}[output.datatype]
        arrays[output.name] = np.frombuffer(raw, kind).reshape(output.shape)
    return arrays


def error_of(served: Served, request_id: str = "", outputs: Any = None, **values: Any) -> str:
    with pytest.raises(InferenceServerException) as problem:
        answers(served, request_id, outputs, **values)
    return str(problem.value)


def greedy(n: int, **values: Any) -> dict[str, Any]:
    return {"input_ids": IDS, "input_lengths": ints(5), "request_output_len": ints(n), "end_id": ints(2), **values}


def test_outputs_without_a_value_are_left_out_or_zeros_as_the_version_does_it(rehearsed: Any) -> None:
    """The rules "response-shapes", "response-batch-index" and those of ZEROS: "response-dummies-0.8.0", ..."""
    backend, served = rehearsed
    rule, zeros = ZEROS[backend]
    assert backend in next(one["versions"] for one in RULES["rules"] if one["id"] == rule)
    assert set(zeros) == set(RULES["without_value"][backend])
    [(tensors, final)] = answers(served, **greedy(6))
    shapes = {name: value.shape for name, value in tensors.items()}
    assert final and shapes == {"output_ids": (1, 1, 6), "sequence_length": (1, 1), **zeros}
    assert tensors["sequence_length"].item() == 6
    assert all(not tensors[name].any() for name in zeros)
    [(asked, _)] = answers(served, **greedy(6, return_log_probs=yes()))
    assert asked["output_log_probs"].shape == (1, 1, 6) and asked["cum_log_probs"].item() < 0
    [(named, _)] = answers(served, outputs=["output_ids", "sequence_length"], **greedy(6))
    assert set(named) == {"output_ids", "sequence_length"}
    # an index only for more than one row or sequence (but "response-batch-index" of 24.10),
    # counts only when they are wanted
    if backend == "v1.2.1":  # the rule "response-token-counts-1.2.1"
        [(counted, _)] = answers(served, **greedy(6, return_num_input_tokens=yes(), return_num_output_tokens=yes()))
        assert (counted["num_input_tokens"].item(), counted["num_output_tokens"].item()) == (5, 6)


def test_a_stream_has_new_tokens_only_and_ends_with_tokens(rehearsed: Any) -> None:
    """The rules "stream-tokens", "response-unary" and "response-final"."""
    backend, served = rehearsed
    streamed = answers(served, **greedy(8, streaming=yes()))
    assert all(set(tensors) >= {"output_ids", "sequence_length"} for tensors, _ in streamed)
    tokens = [token for tensors, _ in streamed for token in tensors["output_ids"].reshape(-1).tolist()]
    [(whole, final)] = answers(served, **greedy(8))
    assert final and whole["output_ids"].reshape(-1).tolist() == tokens and len(tokens) == 8
    declared = {tensor["name"] for tensor in served_table(backend)["inputs"]}
    if "exclude_input_in_output" in declared:
        [(prompted, _)] = answers(served, **greedy(8, exclude_input_in_output=yes(False)))
        assert prompted["output_ids"].reshape(-1).tolist() == IDS.reshape(-1).tolist() + tokens
        assert prompted["sequence_length"].item() == 13


def served_table(backend: str) -> Any:
    return json.loads((ROOT / f"docker/contracts/backend/{backend}.json").read_text())["tensorrt_llm"]


def test_a_named_output_needs_the_other_from_0_10_on(rehearsed: Any) -> None:
    backend, served = rehearsed
    if backend == "v0.8.0":
        [(tensors, _)] = answers(served, outputs=["output_ids"], **greedy(3))
        assert set(tensors) == {"output_ids"}
        return
    said = error_of(served, outputs=["output_ids"], **greedy(3))
    assert "sequence_length tensor must be present in list of output tensors" in said
    assert said.startswith("[StatusCode.INTERNAL]") or "Error encountered while populating response" in said
    assert ".cpp:" in said and "throwRuntimeError" in said  # as the original: with a stack trace


def test_a_stop_ends_a_running_request_with_what_it_has(rehearsed: Any) -> None:
    """The rules "stop-before-checks" and "stop-order"."""
    backend, served = rehearsed
    stop = {"input_ids": ints(9), "input_lengths": ints(0), "request_output_len": ints(0), "stop": yes()}
    with closing(Stream(served)) as stream, closing(Stream(served)) as other:
        stream.send("tensorrt_llm", "r1", **greedy(200, streaming=yes(), end_id=ints(-1)))
        assert stream.next().as_numpy("output_ids").size
        other.send("tensorrt_llm", "r1", ["output_ids"], **stop)
        answer = other.next().get_response()
        assert not answer.outputs and answer.parameters["triton_final_response"].bool_param
        counts = [answer.as_numpy("output_ids").size for answer in stream.until_final()]
    assert sum(counts) < 199
    assert "request" in error_of(served, **stop).lower()
    if backend == "v0.8.0":
        assert "not active" in error_of(served, "r1", **stop)
    else:
        assert answers(served, "r1", **stop) == [({}, True)]


def test_many_requests_at_once_do_not_share_an_id(rehearsed: Any) -> None:
    """At 0.8.0 ids that begin with digits would collide: 89 % of the time with 32 requests."""
    _, served = rehearsed
    with closing(Stream(served)) as stream:
        for n in range(32):
            stream.send("ensemble", str(n), text_input=texts(PROMPT), max_tokens=ints(24), stream=yes())
        told: dict[str, str] = {str(n): "" for n in range(32)}
        ended = 0
        while ended < 32:
            answer = stream.next()
            text = answer.as_numpy("text_output")
            if text is not None:
                told[answer.get_response().id] += text.item().decode()
            ended += answer.get_response().parameters["triton_final_response"].bool_param
    assert len(set(told.values())) == 1 and told["0"].strip()


def test_no_stack_trace_reaches_a_client_and_its_own_mistake_is_told_as_such(rehearsed: Any) -> None:
    _, served = rehearsed
    mistakes: list[dict[str, Any]] = [{"temperature": -1.0}, {"top_p": 1.5}, {"repetition_penalty": -1.0}]
    for mistake in mistakes:
        said = served.post("ensemble", text_input=PROMPT, max_tokens=4, **mistake)
        # Triton's generate says 400 whatever the code is, so the codes are in tests/text_models/test_engine_words.py
        assert said["status"] == 400, said
        assert not any(part in said["error"] for part in ("\n", ".cpp", "0x7f", "requestId", "TensorRT-LLM")), said
        assert len(said["error"]) > 10


def test_the_endpoint_streams_and_nothing_is_refused(rehearsed: Any) -> None:
    _, served = rehearsed
    asked = {"model": "stories", "prompt": PROMPT, "max_tokens": 16, "temperature": 0, "stream": True}
    request = urllib.request.Request(
        f"{served.openai}/v1/completions", json.dumps(asked).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        events = [line[6:] for line in answer.read().decode().splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    pieces = [choice["text"] for event in events[:-1] for choice in json.loads(event)["choices"]]
    assert STORY.startswith("".join(pieces)) and len(pieces) > 2
    assert STORY.startswith(tell(served, max_tokens=12))


def variant(served: Served, backend: str) -> Path:
    """The folder of the rooms that it serves."""
    [engines] = served.tree.glob(f"build/stories/rehearsal-tensorrt-{BACKENDS[backend]}-*/engines/manifest.json")
    return engines.parent.parent


def test_the_rooms_say_which_version_and_gpu_they_are_for_and_that_it_is_a_rehearsal(rehearsed: Any) -> None:
    backend, served = rehearsed
    version, rooms = BACKENDS[backend], variant(served, backend)
    told = [line for line in served.lines if line.split(" ")[0] in ("checkpoint", "engines", "model_repo", "serve")]
    assert told and all("[rehearsal]" in line for line in told), told
    manifest = json.loads((rooms / "engines/manifest.json").read_text())
    assert manifest["facts"]["rehearsal"] is True
    # the container reports the exact string of its image, and the engine carries it
    reported = TOOLCHAINS[version]["trtllm"]
    assert manifest["tools"]["tensorrt_llm"] == manifest["facts"]["trtllm_reported"] == reported
    assert json.loads((rooms / "engines/config.json").read_text())["version"] == reported
    assert manifest["facts"]["gpu"]["compute_capability"] == ("7.0" if "V100" in gpus_for(version) else "8.0")
    assert "rehearsal: the torch engine stands in for TensorRT-LLM" in (rooms / "serve.log").read_text()
    assert 'backend: "tensorrtllm"' in (rooms / "model_repo/tensorrt_llm/config.pbtxt").read_text()
    assert [path.name for path in (rooms / "model_repo/tensorrt_llm/1").iterdir()] == [".keep"]


def test_the_gate_asks_every_position_through_the_versions_own_runtime(rehearsed: Any, tmp_path: Path) -> None:
    backend, served = rehearsed
    version, rooms, verified = BACKENDS[backend], variant(served, backend), tmp_path / "verified"
    if version == "0.14.0":  # with all prompts, by make; the others with three
        words = ["ENGINE=tensorrt", f"TOOLCHAIN={version}", f"REHEARSAL={gpus_for(version)}"]
        done, verified = make(served.tree, "verified", *words, REHEARSAL_DOCKER="no"), rooms / "verified"
    else:
        assert make(served.tree, "hf").returncode == 0
        done = verify(served.tree, version, gpus_for(version), rooms / "engines", verified)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((verified / "report.json").read_text())
    assert report["passed"] and report["engine"]["engine"] == "tensorrt" and report["engine"]["rehearsal"] is True
    asked = 16 * report["asked"]["prompts"]
    assert report["greedy_tokens"]["equal"] == asked
    # the positions of the prompts' own tokens are compared too; their perplexity is that of Hugging Face's model
    assert report["positions"] > asked and len(set(report["perplexity"].values())) == 1
    assert "A rehearsal" in (verified / "report.html").read_text()
    assert json.loads((verified / "manifest.json").read_text())["facts"]["rehearsal"] is True


def test_ranks_above_0_never_finish_loading(rehearsed: Any) -> None:
    """The rule "load-workers-never-return": the server is ready, and ends in order, without them."""
    backend, served = rehearsed
    assert served.post("ensemble", text_input=PROMPT, max_tokens=1)["status"] == 200
    log = variant(served, backend) / "serve.log"
    loaded = [line[:7] for line in log.read_text().splitlines() if "successfully loaded 'tensorrt_llm'" in line]
    assert loaded == ["rank 0:"]


def test_nvidias_core_client_is_served(rehearsed: Any) -> None:
    """What inflight_batcher_llm_client.py always sends; runtime_top_p 0.0 counts as not given."""
    _, served = rehearsed
    streamed = answers(served, **core_request(IDS, 6, streaming=yes(), temperature=floats(1.0)))
    assert sum(tensors["output_ids"].size for tensors, _ in streamed) == 6
