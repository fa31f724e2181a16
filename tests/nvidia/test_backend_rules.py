"""Tests break every rule of docker/contracts/backend-rules on purpose:
the rehearsal refuses in the original's words, per version.

A rule that nothing enforces needs a written reason; a rule without a test here fails the first test.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton
from project import ROOT
from server import Served
from strict_backend import TABLE, TOOLCHAINS, fails, loaded, model_config, refused, served_as, stop_refused, strict
from tritonclient.utils import InferenceServerException

from scripts.nvidia import contracts

RULES: dict[str, Any] = {rule["id"]: rule for rule in TABLE["rules"]}
Texts = Iterable[str]
Break = Callable[[str], Texts | None]
BREAKS: dict[str, Break] = {}


def breaks(rule: str) -> Callable[[Break], Break]:
    """The function returns the refusals, or asserts what the version allows and returns None."""

    def keep(function: Break) -> Break:
        assert rule in RULES and rule not in BREAKS, rule
        BREAKS[rule] = function
        return function

    return keep


# --- outputs ---


@breaks("outputs-required")
def _(version: str) -> Texts:
    for wanted in (["output_ids"], ["sequence_length"], ["cum_log_probs"]):
        with pytest.raises(strict.Fault) as fault:
            strict.check_outputs(version, wanted)
        if wanted == ["output_ids"]:
            yield str(fault.value)
    strict.check_outputs(version, ["sequence_length", "output_ids"])


@breaks("outputs-free-0.8.0")
def _(version: str) -> None:
    strict.check_outputs(version, ["output_ids"])
    strict.check_outputs(version, [])


# --- inputs ---


@breaks("inputs-required-config-1.2.1")
def _(version: str) -> Texts:
    yield refused(version, input_ids=None)


@breaks("inputs-undeclared-by-trtllm-0.8.0")
def _(version: str) -> Texts:
    yield refused(version, num_return_sequences=[[1]])


@breaks("inputs-undeclared-later")
def _(version: str) -> None:
    names = [*RULES["inputs-undeclared-later"]["never_read"], "no_such_input"]
    values: dict[str, Any] = {name: [[1]] for name in names}
    assert not set(served_as(version, **values)) & set(names)


@breaks("inputs-ids-2d")
def _(version: str) -> Texts:
    yield refused(version, input_ids=[[[5, 6]]])


@breaks("inputs-max-tokens")
def _(version: str) -> Texts:
    yield refused(version, request_output_len=None)


@breaks("inputs-singleton")
def _(version: str) -> Texts:
    yield refused(version, temperature=[[1.0, 2.0]])
    yield refused(version, request_output_len=[[4, 4]])


@breaks("inputs-lengths-batch-one")
def _(version: str) -> None:
    assert served_as(version, input_lengths=[[1]])["input_lengths"].tolist() == [[3]]
    assert served_as(version, input_lengths=None)["input_lengths"].tolist() == [[3]]


@breaks("inputs-batch-needs-decoupled")
def _(version: str) -> Texts:
    unary = loaded(version, decoupled=False)
    yield refused(version, unary, input_ids=[[5], [6]], request_output_len=[[4], [4]], streaming=[[False], [False]])


@breaks("inputs-batch-0.8.0")
def _(version: str) -> Texts:
    yield refused(version, input_ids=[[5], [6]])


@breaks("inputs-word-lists")
def _(version: str) -> Texts:
    for name in ("stop_words_list", "bad_words_list"):
        goods: list[Any] = [[[[0], [-1]]], [[[5, 6, 7], [1, 3, -1]]], [[[], []]]]
        for good in goods:
            served_as(version, **dict[str, Any]({name: good}))
        yield refused(version, **{name: [[[5, 6], [-1, 2]]]})
        yield refused(version, **{name: [[[5, 6], [2, 1]]]})
        yield refused(version, **{name: [[[5, 6], [1, 3]]]})


@breaks("inputs-embedding-bias")
def _(version: str) -> None:
    assert "embedding_bias" not in served_as(version, embedding_bias=np.zeros((1, 0), np.float32))
    assert "embedding_bias" in served_as(version, embedding_bias=np.zeros((1, 7), np.float32))


@breaks("inputs-top-p-zero")
def _(version: str) -> None:
    assert "runtime_top_p" not in served_as(version, runtime_top_p=[[0.0]])
    assert "runtime_top_p" in served_as(version, runtime_top_p=[[0.5]])


@breaks("inputs-early-stopping")
def _(version: str) -> Texts:
    yield refused(version, early_stopping=[[True]])


@breaks("inputs-exclude")
def _(version: str) -> None:
    if "exclude_input_in_output" in {
        t["name"] for t in contracts.table("backend", TOOLCHAINS[version])["tensorrt_llm"]["inputs"]
    }:
        assert "exclude_input_in_output" in served_as(version, exclude_input_in_output=[[False]])


@breaks("inputs-prompt-length")
def _(version: str) -> Texts:
    limit = loaded(version).max_input_len
    served_as(version, input_ids=np.full((1, limit), 5))
    yield refused(version, input_ids=np.full((1, limit + 1), 5))
    longest = loaded(version).max_seq_len
    assert served_as(version, request_output_len=[[longest]])["request_output_len"].item() == longest - 3


@breaks("inputs-sampling-0.14.0")
def _(version: str) -> Texts:
    for name, value in (
        ("runtime_top_k", -1),
        ("runtime_top_p", 1.1),
        ("temperature", -0.5),
        ("repetition_penalty", 0.0),
        ("min_length", -1),
        ("beam_width", 0),
    ):
        yield refused(version, **{name: [[value]]})
    assert served_as(version, temperature=[[0.0]])["runtime_top_k"].item() == 1


@breaks("inputs-sampling-1.2.1")
def _(version: str) -> Texts:
    for name, value in (
        ("runtime_top_k", -1), ("runtime_top_p", 1.1), ("temperature", -0.5), ("repetition_penalty", 0.0), ("min_length", -1),
        ("beam_width", 2), ("num_return_sequences", 0), ("end_id", 1 << 20), ("end_id", -2), ("request_output_len", 0),
    ):  # fmt: skip
        yield refused(version, **{name: [[value]]})
    yield refused(version, input_ids=np.zeros((1, 0), np.int32))


@breaks("inputs-logits-need-engine")
def _(version: str) -> Texts:
    for name in ("context", "generation"):
        yield refused(version, **{f"return_{name}_logits": [[True]]})
        gathers = loaded(version, build={f"gather_{name}_logits": True})
        served_as(version, gathers, **dict[str, Any]({f"return_{name}_logits": [[True]]}))


@breaks("inputs-prompt-table-0.8.0")
def _(version: str) -> Texts:
    yield refused(version, prompt_vocab_size=[[1]])
    yield refused(version, prompt_embedding_table=np.zeros((1, 2, 2), np.float32))


@breaks("stream-eviction-1.2.1")
def _(version: str) -> Texts:
    evicts = loaded(version, batch_scheduler_policy="max_utilization")
    served_as(version, evicts, request_output_len=[[evicts.max_input_len - 2]])
    yield refused(version, evicts, request_output_len=[[evicts.max_input_len - 1]])
    served_as(version, request_output_len=[[evicts.max_input_len - 1]])


@breaks("streaming-needs-decoupled")
def _(version: str) -> Texts:
    unary = loaded(version, decoupled=False)
    served_as(version, unary, streaming=[[False]])
    yield refused(version, unary)


@breaks("queue-full")
def _(version: str) -> Texts:
    def three(config: dict[str, Any]) -> None:
        config["dynamic_batching"]["default_queue_policy"]["max_queue_size"] = 3

    small = loaded(version, change=three)
    served_as(version, small, waiting=2)
    yield refused(version, small, waiting=3)
    served_as(version, waiting=1000)  # ours: 0, no limit


BREAKS["queue-full-0.14"] = BREAKS["queue-full"]


# --- ids, stop ---


@breaks("id-unique-0.8.0")
def _(version: str) -> Texts:
    yield refused(version, request_id="12", active=[12])
    served_as(version, request_id="12", active=[13])
    served_as(version, request_id="0", active=[0])  # counts as none


@breaks("id-leading-digits-0.8.0")
def _(version: str) -> Texts:
    assert strict.id_number("3f2a") == strict.id_number("3bcd") == 3 and strict.id_number("0f2a") == 0
    assert strict.id_number("r3f2a") != strict.id_number("r3bcd")
    yield refused(version, request_id="3bcd", active=[strict.id_number("3f2a")])
    served_as(version, request_id="r3bcd", active=[strict.id_number("r3f2a")])


@breaks("id-not-unique-later")
def _(version: str) -> None:
    served_as(version, request_id="a", active=["a"])
    served_as(version, request_id="", active=["a"])


@breaks("stop-needs-id")
def _(version: str) -> Texts:
    yield stop_refused(version, "")
    strict.check_stop(version, "unknown", [])


@breaks("stop-needs-id-0.8.0")
def _(version: str) -> Texts:
    yield stop_refused(version, "")
    yield stop_refused(version, "0f2a")
    yield stop_refused(version, "12", [13])
    strict.check_stop(version, "12", [12])


# --- loading ---


@breaks("load-type")
def _(version: str) -> Texts:
    yield fails(version, gpt_model_type="inflight")
    yield fails(version, without="gpt_model_type")


@breaks("load-no-parameters")
def _(version: str) -> Texts:
    yield fails(version, change=lambda config: config.pop("parameters"))


@breaks("load-v1-1.2.1")
def _(version: str) -> Texts:
    yield fails(version, gpt_model_type="V1")
    loaded("r24.10", gpt_model_type="V1")


@breaks("load-inflight-needs")
def _(version: str) -> Texts:
    for name in ("gpt_attention_plugin", "remove_input_padding", "paged_kv_cache"):
        text = fails(version, plugins={name: None})
        assert name in text
        yield text


@breaks("load-engine-0.8.0")
def _(version: str) -> Texts:
    yield fails(version, engine=False)


@breaks("load-engine-later")
def _(version: str) -> Texts:
    yield fails(version, gpt_model_path="/no/such/folder")
    yield fails(version, without="gpt_model_path")
    assert "no engine" in fails(version, engine=False)


@breaks("load-encoder")
def _(version: str) -> Texts:
    yield fails(version, encoder_model_path=str(ROOT))
    loaded(version, encoder_model_path="/no/such/folder")


@breaks("load-guided-1.2.1")
def _(version: str) -> Texts:
    for key in RULES["load-guided-1.2.1"]["required_parameters"]:
        text = fails(version, without=key)
        assert key in text
        yield text.replace(key, "tokenizer_dir")
    both = {"xgrammar_tokenizer_info_path": "/no/such/file", "guided_decoding_backend": "xgrammar"}
    fails(version, **both)
    fails(version, **{**both, "xgrammar_tokenizer_info_path": str(ROOT), "guided_decoding_backend": "other"})
    loaded(version, xgrammar_tokenizer_info_path="${hole}", guided_decoding_backend="xgrammar")


@breaks("load-kv-1.2.1")
def _(version: str) -> Texts:
    for fraction in ("1.0", "0.0", "1"):
        yield fails(version, kv_cache_free_gpu_mem_fraction=fraction)
    yield fails(version, cross_kv_cache_fraction="1.0")
    for key in ("max_tokens_in_paged_kv_cache", "sink_token_length", "max_beam_width", "max_attention_window_size"):
        yield fails(version, **{key: "-1"})
    loaded(version, kv_cache_free_gpu_mem_fraction="0.99")


@breaks("load-kv-reuse")
def _(version: str) -> None:
    default = RULES["load-kv-reuse"]["default"][version]
    fmha = {"use_paged_context_fmha": True}
    given: list[dict[str, Any]] = [{"without": "enable_kv_cache_reuse"}, {"enable_kv_cache_reuse": "on"}]
    for words in given:
        assert loaded(version, plugins=fmha, **words).kv_reuse is default
        if default:
            assert "use_paged_context_fmha" in fails(version, plugins={"use_paged_context_fmha": False}, **words)
    assert not loaded(version, plugins={"use_paged_context_fmha": False}).kv_reuse  # ours says false


@breaks("load-chunked")
def _(version: str) -> Texts:
    assert not loaded(version, without="enable_chunked_context").chunked
    yield fails(version, enable_chunked_context="true", plugins={"use_paged_context_fmha": False})
    assert loaded(version, enable_chunked_context="true", plugins={"use_paged_context_fmha": True}).chunked


@breaks("load-attention-window")
def _(version: str) -> None:
    sizes = loaded(version, max_attention_window_size="4096,2048").attention_window
    assert sizes == ([4096] if version == "v0.8.0" else [4096, 2048])


@breaks("load-bool-words")
def _(version: str) -> None:
    for word in ("True", "true", "TRUE", "1"):
        assert strict.boolean({"a": word}, "a", False)
    for word in ("False", "false", "FALSE", "0"):
        assert not strict.boolean({"a": word}, "a", True)
    for word in ("yes", "on", "", "tRUE"):
        assert strict.boolean({"a": word}, "a", True) and not strict.boolean({"a": word}, "a", False)
    assert loaded(version, exclude_input_in_output="True").exclude_input


@breaks("load-numbers")
def _(version: str) -> None:
    assert strict.number({"a": "8k"}, "a", int) == 8 and strict.number({"a": "0.5x"}, "a", float) == 0.5
    assert strict.number({"a": "k8"}, "a", int) is None and strict.number({}, "a", int) is None
    assert loaded(version, max_beam_width="1k").max_beam_width == 1


@breaks("load-policy")
def _(version: str) -> None:
    assert loaded(version, batch_scheduler_policy="static_batch").policy == "guaranteed_no_evict"
    assert loaded(version, batch_scheduler_policy="max_utilization").policy == "max_utilization"


@breaks("load-exclude")
def _(version: str) -> None:
    assert not loaded(version, without="exclude_input_in_output").exclude_input
    assert not loaded(version, exclude_input_in_output="yes").exclude_input
    assert loaded(version).exclude_input


@breaks("load-beam")
def _(version: str) -> Texts:
    assert loaded(version, without="max_beam_width").max_beam_width == 1
    yield fails(version, max_beam_width="2")


@breaks("load-device-ids")
def _(version: str) -> None:
    loaded(version, gpu_device_ids="")
    loaded(version, gpu_device_ids="0,1")
    if version == "v1.2.1":
        fails(version, gpu_device_ids="0,1,2,3")
        loaded(version, gpu_device_ids="0", num_nodes="2")


@breaks("load-participants-1.2.1")
def _(version: str) -> Texts:
    yield fails(version, participant_ids="0,1,2")
    loaded(version, participant_ids="0,1", world=8)


@breaks("load-leader-world")
def _(version: str) -> Texts:
    for world in (1, 3, 4):
        yield fails(version, world=world)


@breaks("load-orchestrator")
def _(version: str) -> Texts:
    yield fails(version, variables={"TRTLLM_ORCHESTRATOR": "1"})
    loaded(version, variables={"TRTLLM_ORCHESTRATOR": "0"})


@breaks("load-lookahead-1.2.1")
def _(version: str) -> Texts:
    yield fails(version, decoding_mode="lookahead")
    loaded(version, decoding_mode="no_such_mode")


@breaks("load-no-dynamic-batching")
def _(version: str) -> None:
    assert loaded(version, change=lambda config: config.pop("dynamic_batching", None)).max_queue_size == 0


@breaks("load-logits-type-1.2.1")
def _(version: str) -> Texts:
    def half(config: dict[str, Any]) -> None:
        next(t for t in config["output"] if t["name"] == "generation_logits")["data_type"] = "TYPE_BF16"

    yield fails(version, change=half)


@breaks("error-load")
def _(version: str) -> Texts:
    yield fails(version, gpt_model_type="")


# --- errors ---


@breaks("error-enqueue")
def _(version: str) -> None:
    text = refused(version, request_output_len=None)
    assert re.match(r"\[TensorRT-LLM\]\[ERROR\] Assertion failed: .* \(/\S+:\d+\)\n1 .*\n2 ", text)


@breaks("error-engine")
def _(version: str) -> None:
    text = refused(version, input_ids=np.full((1, loaded(version).max_input_len + 1), 5))
    assert re.match(r"Executor failed process requestId \d+ due to the following error: ", text) and "\n1 " in text


@breaks("error-filling")
def _(version: str) -> None:
    [text] = BREAKS["outputs-required"](version) or []
    assert text.startswith("Error encountered while populating response: ")


@breaks("error-0.8.0")
def _(version: str) -> None:
    assert re.match(r"Encountered error for requestId \d+: ", refused(version, prompt_vocab_size=[[1]]))


# --- what is seen on a served model (tests/test_rehearsed_server.py, tests/text_models/test_clients.py) ---

ON_A_SERVER = {
    "tests/test_rehearsed_server.py": {
        "stop-before-checks", "stop-order", "stream-tokens", "response-shapes", "response-dummies-r24.10", "response-no-dummies",
        "response-dummies-0.8.0", "response-batch-index", "response-sequence-index", "response-token-counts-1.2.1",
        "response-final", "response-unary", "load-workers-never-return",
    },
    "tests/text_models/test_clients.py": {"post-unknown-input", "post-shape", "pre-decoder-ids"},
}  # fmt: skip


def test_every_rule_is_enforced_and_broken_or_says_why_not() -> None:
    by: dict[str, set[str]] = {"rehearsal": set(BREAKS) | ON_A_SERVER["tests/test_rehearsed_server.py"]}
    by.update(tritonserver=set(TO_TRITON) | set(AT_A_VERSION), models=ON_A_SERVER["tests/text_models/test_clients.py"])
    found: dict[str, set[str]] = {name: set() for name in by}
    for rule in TABLE["rules"]:
        assert ("enforced_by" in rule) != bool(rule.get("not_enforced", "")), rule["id"]
        if "enforced_by" in rule:
            found[rule["enforced_by"]].add(rule["id"])
        else:
            assert len(rule["not_enforced"].split()) > 4, rule["id"]
        assert rule["source"] and set(rule["versions"]) <= set(TABLE["versions"]), rule["id"]
        assert rule["certainty"] in ("sure", "inferred"), rule["id"]
        # what stands in for 1.2.1 is never sure of it
        assert ("v1.2.1" in rule["versions"]) == ("v1.2.1" in rule.get("inferred_for", [])), rule["id"]
    assert found == by
    for file, rules in ON_A_SERVER.items():
        text = (ROOT / file).read_text()
        assert [rule for rule in rules if f'"{rule}"' not in text] == [], file


def pattern(error: str) -> str:
    """The table's words as a regular expression: N, M, x, NAME, PATH and ... stand for what changes."""
    holes = {"N": r"\d+", "M": r"\d+", "x": r"\w+", "NAME": r"\w+", "PATH": r"\S*", "3": r"\d+"}
    alternatives = []
    for words in error.split(" | "):
        parts = re.split(r"(\.\.\.|\b(?:N|M|x|NAME|PATH|3)\b)", words)
        alternatives.append("".join(".*" if p == "..." else holes.get(p, re.escape(p)) for p in parts))
    return "|".join(alternatives)


@pytest.mark.parametrize(
    ("rule", "version"),
    [(id, version) for id, rule in RULES.items() if id in BREAKS for version in rule["versions"]],
)
def test_the_rehearsal_refuses_what_breaks_it(rule: str, version: str) -> None:
    texts: list[str] = list(BREAKS[rule](version) or [])
    if "error" in RULES[rule]:
        assert texts, rule
    for text in texts if "error" in RULES[rule] else []:
        assert re.search(pattern(RULES[rule]["error"]), text, re.DOTALL), (text, RULES[rule]["error"])


# --- what tritonserver refuses by itself ---

CORE = {"input_ids": [[5, 6, 7]], "input_lengths": [[3]], "request_output_len": [[2]]}


def core_inputs(dtype: str = "INT32", **changes: Any) -> list[Any]:
    tensors = []
    for name, value in {**CORE, **changes}.items():
        if value is None:
            continue
        array = np.array(value, dtype=np.int32 if dtype == "INT32" or name != "input_ids" else np.int64)
        tensors.append(triton.InferInput(name, list(array.shape), "INT32" if array.dtype == np.int32 else "INT64"))
        tensors[-1].set_data_from_numpy(array)
    return tensors


def triton_refuses(served: Served, inputs: list[Any], outputs: list[str] | None = None) -> str:
    wanted = None if outputs is None else [triton.InferRequestedOutput(name) for name in outputs]
    answers: list[Any] = []
    with triton.InferenceServerClient(served.grpc) as client:
        client.start_stream(lambda result, error: answers.append((result, error)))
        client.async_stream_infer("tensorrt_llm", inputs, outputs=wanted)
        client.stop_stream()
    error = answers[0][1]
    assert isinstance(error, InferenceServerException), answers
    return str(error)


def short_bytes() -> list[Any]:
    tensors = core_inputs()
    tensors[0]._raw_content = tensors[0]._raw_content[:-4]
    return tensors


TO_TRITON: dict[str, Callable[[Served], str]] = {
    "outputs-unknown": lambda served: triton_refuses(served, core_inputs(), ["output_ids", "x"]),
    "inputs-required-config": lambda served: triton_refuses(served, core_inputs(request_output_len=None)),
    "inputs-count": lambda served: triton_refuses(served, core_inputs(input_ids=None)),
    "inputs-unknown": lambda served: triton_refuses(served, core_inputs(x=[[1]])),
    "inputs-dtype": lambda served: triton_refuses(served, core_inputs("INT64")),
    "inputs-batch-axis": lambda served: triton_refuses(served, core_inputs(input_ids=[5, 6, 7])),
    "inputs-reshape": lambda served: triton_refuses(served, core_inputs(request_output_len=[2])),
    "inputs-byte-size": lambda served: triton_refuses(served, short_bytes()),
}
# Only at a version whose config lacks the input: the default server's does, as 24.10's
AT_A_VERSION: dict[str, Callable[[Served], str]] = {
    "inputs-num-return-r24.10": lambda served: triton_refuses(served, core_inputs(num_return_sequences=[[1]])),
}


@pytest.mark.parametrize("rule", [*TO_TRITON, *AT_A_VERSION])
def test_tritonserver_refuses_what_breaks_it(served: Served, rule: str) -> None:
    said = {**TO_TRITON, **AT_A_VERSION}[rule](served)
    if "error" in RULES[rule]:
        assert re.search(pattern(RULES[rule]["error"]), said), said


def test_24_10_declares_no_num_return_sequences() -> None:
    names = {tensor["name"] for tensor in model_config("r24.10")["input"]}
    assert "num_return_sequences" not in names
    assert "num_return_sequences" in {tensor["name"] for tensor in model_config("v0.14.0")["input"]}
