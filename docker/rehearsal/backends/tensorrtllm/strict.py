"""What NVIDIA's Triton backend refuses, rule by rule of docker/contracts/backend-rules, in the words that it uses.

Pure: configs, arrays and ids in, a text out. Rules that name no words are refused in ours.
Nothing here knows Triton or PyTorch.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

# Names of docker/contracts/backend
V0_8, R24_10, V0_14, V1_2 = "v0.8.0", "r24.10", "v0.14.0", "v1.2.1"
LATER = (R24_10, V0_14, V1_2)
TYPES = ("V1", "v1", "inflight_batching", "inflight_fused_batching")
TRUE, FALSE = ("True", "true", "TRUE", "1"), ("False", "false", "FALSE", "0")
POLICIES = ("max_utilization", "guaranteed_no_evict")
# The stock configs declare these; no code reads them
NEVER_READ = ("runtime_top_p_min", "prompt_vocab_size", "decoder_input_lengths")
# Not tensors of a request at 0.8.0
SKIPPED_0_8 = ("START", "CORRID", "END", "stop", "streaming")
MUST_BE_NAMED = ("output_ids", "sequence_length")

FILE = " (/workspace/tensorrt_llm/cpp/tensorrt_llm/batch_manager/{file}.cpp:{line})"
TRACE = """
1       0x7f2a1c0d5f3e tensorrt_llm::common::throwRuntimeError(char const*, int, std::string const&) + 82
2       0x7f2a1d41e2b1 /opt/tritonserver/backends/tensorrtllm/libtriton_tensorrtllm.so(+0x1c2b1) [0x7f2a1d41e2b1]
3       0x7f2a9c494ac3 /usr/lib/x86_64-linux-gnu/libc.so.6(+0x94ac3) [0x7f2a9c494ac3]"""


class LoadFails(Exception):
    """The model does not load; the text is what Triton's log says."""

    def __init__(self, why: str) -> None:
        super().__init__(f"unexpected error when creating modelInstanceState: {why}")


class Fault(Exception):
    """A request that is answered with an error, always of Triton's code INTERNAL."""


def asserted(why: str) -> str:
    """As TensorRT-LLM's checks say it: with the file, the line and a stack trace."""
    return f"[TensorRT-LLM][ERROR] Assertion failed: {why}" + FILE.format(file="llmRequest", line=352) + TRACE


def at_the_door(why: str) -> Fault:
    """The backend refuses this before the engine sees it (rule error-enqueue)."""
    return Fault(asserted(why))


def engine_said(version: str, why: str, number: int = 1) -> Fault:
    """The engine's own error (rules error-engine, error-0.8.0). number: the engine's, not the client's id."""
    if version == V0_8:
        return Fault(f"Encountered error for requestId {number}: {asserted(why)}")
    return Fault(
        f"Executor failed process requestId {number} due to the following error: "
        f"Encountered an error when fetching new request: {asserted(why)}"
    )


# --- parameters ---


def boolean(parameters: Mapping[str, str], key: str, otherwise: bool) -> bool:
    """Eight words; everything else counts as not given."""
    value = parameters.get(key)
    return True if value in TRUE else False if value in FALSE else otherwise


def number(parameters: Mapping[str, str], key: str, kind: Callable[[str], Any]) -> Any:
    """As stoi and stof read: leading digits count. None when there are none."""
    pattern = r"\s*[+-]?\d+" if kind is int else r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?"
    match = re.match(pattern, parameters.get(key, ""))
    return kind(match[0]) if match else None


def is_off(value: str) -> bool:
    """Empty, or the template's own hole."""
    return not value or value.startswith("${")


@dataclass(frozen=True)
class Loaded:
    """A model that NVIDIA's backend would load, and what of it decides about requests."""

    version: str
    decoupled: bool
    exclude_input: bool
    kv_reuse: bool
    policy: str
    chunked: bool
    max_queue_size: int
    max_beam_width: int
    attention_window: list[int]
    max_input_len: int
    max_seq_len: int
    vocab_size: int
    gathers: Mapping[str, bool]
    scalars: Collection[str]
    known: Collection[str]


def load(
    version: str,
    config: Mapping[str, Any],
    engine: Mapping[str, Any] | None,
    table: Mapping[str, Any],
    world: int,
    variables: Mapping[str, str],
) -> Loaded:
    """config: Triton's ModelConfig as JSON; engine: config.json of gpt_model_path; table:
    the version's tensors of tensorrt_llm."""
    parameters = {key: value.get("string_value", "") for key, value in config.get("parameters", {}).items()}
    kind = parameters.get("gpt_model_type")
    if kind not in TYPES:
        raise LoadFails("Invalid gpt_model_type. Must be v1/inflight_batching/inflight_fused_batching.")
    if variables.get("TRTLLM_ORCHESTRATOR", "0") != "0":
        raise LoadFails("TRTLLM_ORCHESTRATOR asks for the orchestrator mode; our launcher starts the leader mode only")
    engine = _engine(version, parameters, engine)
    build, network = engine["build_config"], engine["pretrained_config"]
    plugins = build["plugin_config"]
    mapping = network["mapping"]
    ranks = mapping["tp_size"] * mapping.get("pp_size", 1) * mapping.get("cp_size", 1)
    _in_flight(build, plugins)
    kv_reuse = boolean(parameters, "enable_kv_cache_reuse", version == V1_2)
    chunked = boolean(parameters, "enable_chunked_context", False)
    for name, on in (("KV cache reuse", kv_reuse), ("chunked context", chunked)):
        if on and not plugins.get("use_paged_context_fmha"):
            raise LoadFails(asserted(f"{name} needs an engine with use_paged_context_fmha"))
    beams = number(parameters, "max_beam_width", int) or 1
    if beams > build["max_beam_width"]:
        raise LoadFails(asserted(f"max_beam_width {beams} is above the engine's {build['max_beam_width']}"))
    policy = parameters.get("batch_scheduler_policy", "")
    window = re.findall(r"\d+", parameters.get("max_attention_window_size", ""))
    if version == V1_2:
        _only_1_2(kind, parameters, config, ranks, world)
    scalars = [tensor["name"] for tensor in table["inputs"] if tensor["dims"] == [1]]
    return Loaded(
        version=version,
        decoupled=bool(config.get("model_transaction_policy", {}).get("decoupled")),
        exclude_input=boolean(parameters, "exclude_input_in_output", False),
        kv_reuse=kv_reuse,
        policy=policy if policy in POLICIES else "guaranteed_no_evict",
        chunked=chunked,
        max_queue_size=int(
            config.get("dynamic_batching", {}).get("default_queue_policy", {}).get("max_queue_size", 0) or 0
        ),
        max_beam_width=beams,
        attention_window=[int(size) for size in (window[:1] if version == V0_8 else window)],
        max_input_len=build["max_input_len"],
        max_seq_len=build.get("max_seq_len") or build["max_input_len"] + build["max_output_len"],
        vocab_size=network["vocab_size"],
        gathers={name: bool(build.get(f"gather_{name}_logits")) for name in ("context", "generation")},
        scalars=scalars,
        known=[tensor["name"] for tensor in table["inputs"]],
    )


def _engine(version: str, parameters: Mapping[str, str], engine: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """The engines' config.json, or why there is none."""
    path, encoder = parameters.get("gpt_model_path", ""), parameters.get("encoder_model_path", "")
    if version != V0_8 and encoder and Path(encoder).exists():
        raise LoadFails(f"{encoder} exists, so this is an encoder-decoder model; Llama has no encoder")
    if version != V0_8 and (not path or not Path(path).exists()):
        raise LoadFails(asserted("Both encoder and decoder model paths are empty"))
    if engine is None:
        raise LoadFails(
            f"Cannot find engine config file {path}/config.json"
            if version == V0_8
            else asserted(f"there is no engine in {path}")
        )
    return engine


def _in_flight(build: Mapping[str, Any], plugins: Mapping[str, Any]) -> None:
    paged = str(build.get("kv_cache_type") or "paged").lower() == "paged" and plugins.get("paged_kv_cache", True)
    has = {
        "gpt_attention_plugin": plugins.get("gpt_attention_plugin"),
        "remove_input_padding": plugins.get("remove_input_padding"),
        "paged_kv_cache": paged,
    }
    if lacking := [name for name, value in has.items() if not value]:
        raise LoadFails(asserted(f"in-flight batching needs an engine with {', '.join(lacking)}"))


def _only_1_2(kind: str, parameters: Mapping[str, str], config: Mapping[str, Any], ranks: int, world: int) -> None:
    if kind in ("V1", "v1"):
        raise LoadFails(asserted("static batching (gpt_model_type V1) is gone"))
    for key in ("tokenizer_dir", "xgrammar_tokenizer_info_path", "guided_decoding_backend"):
        if key not in parameters:
            raise LoadFails(f"Cannot find parameter with name: {key}")
    info, guided = parameters["xgrammar_tokenizer_info_path"], parameters["guided_decoding_backend"]
    if not is_off(info) and not is_off(guided) and (guided != "xgrammar" or not Path(info).exists()):
        raise LoadFails(f"guided decoding by {guided} with {info}: the file must exist and the backend be xgrammar")
    fraction = number(parameters, "kv_cache_free_gpu_mem_fraction", float)
    if fraction is not None and not 0 < fraction < 1:
        raise LoadFails(asserted(f"kv_cache_free_gpu_mem_fraction {fraction} is not between 0 and 1"))
    cross = number(parameters, "cross_kv_cache_fraction", float)
    if cross is not None and not 0 < cross < 1:
        raise LoadFails(asserted(f"cross_kv_cache_fraction {cross} is not between 0 and 1"))
    for key in ("max_tokens_in_paged_kv_cache", "sink_token_length", "max_beam_width", "max_attention_window_size"):
        value = number(parameters, key, int)
        if value is not None and value <= 0:
            raise LoadFails(asserted(f"{key} {value} is not above 0"))
    lookahead = [f"lookahead_{part}" for part in ("window_size", "ngram_size", "verification_set_size")]
    if parameters.get("decoding_mode") == "lookahead" and any(
        number(parameters, key, int) is None for key in lookahead
    ):
        raise LoadFails(f"decoding_mode lookahead needs {', '.join(lookahead)}")
    for output in config.get("output", []):
        is_logits = output["name"] in ("context_logits", "generation_logits")
        if is_logits and output["data_type"] not in ("TYPE_FP32", "TYPE_FP16"):
            raise LoadFails(f"logits of type {output['data_type']}; only FP32 and FP16 are supported")
    ids = [group.split(",") for group in parameters.get("participant_ids", "").split(";") if group]
    if any(len(group) != ranks for group in ids):
        raise LoadFails(asserted(f"participant_ids names {len(ids[0])} ranks; the engine has {ranks}"))
    devices = [group.split(",") for group in parameters.get("gpu_device_ids", "").split(";") if group]
    nodes = number(parameters, "num_nodes", int) or 1
    if any(len(group) * nodes != ranks for group in devices):
        raise LoadFails(asserted(f"gpu_device_ids names {len(devices[0])} GPUs; the engine has {ranks} ranks"))
    if not ids and world != ranks:
        raise LoadFails(asserted(f"{world} MPI ranks; tp * pp * cp of the engine is {ranks}"))


# --- requests ---


def id_number(text: str) -> int:
    """A request id as 0.8.0 reads it: leading digits are a number, all else is hashed. 0 is none."""
    digits = re.match(r"\s*[+-]?\d+", text)
    if digits:
        return abs(int(digits[0]))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big") if text else 0


def identity(version: str, request_id: str) -> Any:
    """What two requests must share to be the same for a stop."""
    return id_number(request_id) if version == V0_8 else request_id


def check_stop(version: str, request_id: str, active: Collection[Any]) -> None:
    """active: identities of the requests that wait or run."""
    if version != V0_8:
        if not request_id:
            raise Fault("Trying to stop a request but request ID is not provided")
        return
    known = id_number(request_id)
    if not known:
        raise Fault("Cannot send stop request without specifying a request_id")
    if known not in active:
        raise Fault(f"Received stop request for requestId {known} but it's not active (might be completed already).")


def read(
    loaded: Loaded, inputs: Mapping[str, Any], request_id: str = "", active: Collection[Any] = (), waiting: int = 0
) -> dict[str, Any]:
    """The inputs that count, as the engine gets them. inputs: arrays with the batch axis in front."""
    version = loaded.version
    given = _read_0_8(loaded, inputs, request_id, active) if version == V0_8 else _read_later(loaded, inputs)
    if "streaming" in inputs and np.any(inputs["streaming"]) and not loaded.decoupled:
        raise Fault("Streaming is only supported if model is deployed using decoupled mode.")
    if "early_stopping" in given:
        raise Fault("early_stopping is declared one byte and read as four: nothing good can come of sending it")
    if version != V0_8:
        _check_limits(loaded, given, waiting)
    return given


def _read_0_8(loaded: Loaded, inputs: Mapping[str, Any], request_id: str, active: Collection[Any]) -> dict[str, Any]:
    known = id_number(request_id)
    if known and known in active:
        raise Fault(f"requestId {known} is already in progress, request is ignored.")
    for name in inputs:
        if name not in (*loaded.known, *SKIPPED_0_8):
            raise Fault(f"Invalid tensor name: {name}")
    if "input_ids" in inputs and len(inputs["input_ids"]) > 1:
        raise Fault("Inflight batching backend expects requests with batch size of 1.")
    if ("prompt_embedding_table" in inputs) != ("prompt_vocab_size" in inputs):
        raise engine_said(V0_8, "prompt_embedding_table and prompt_vocab_size must come together", known)
    if "draft_logits" in inputs and "draft_input_ids" not in inputs:
        raise engine_said(V0_8, "draft_logits needs draft_input_ids", known)
    return dict(inputs)


def _read_later(loaded: Loaded, inputs: Mapping[str, Any]) -> dict[str, Any]:
    given = {name: value for name, value in inputs.items() if name in loaded.known and name not in NEVER_READ}
    if "input_ids" not in given:
        if loaded.version == V1_2:
            raise at_the_door("inputTokens or encoderInputFeatures tensor not provided")
        raise at_the_door("input_ids is not present in the request")
    ids = given["input_ids"]
    if ids.ndim != 2:
        raise at_the_door("Expected inputTokens tensors to have 2 dimensions")
    rows = len(ids)
    if rows > 1 and not loaded.decoupled:
        raise at_the_door("Batch size > 1 requires the tensorrt_llm backend to be using decoupled transaction policy")
    if rows > 1:
        raise Fault("the stand-in takes one row per request; NVIDIA's backend takes more here")
    if "request_output_len" not in given:
        raise at_the_door("request_output_len is not present in the request")
    for name in loaded.scalars:
        if name in given and name != "input_lengths" and given[name].size != rows:
            raise at_the_door(f"Invalid size for tensor {name}")
    # not looked at with one row
    given["input_lengths"] = np.full((1, 1), ids.shape[1], np.int32)
    for name in ("bad_words_list", "stop_words_list"):
        if name in given:
            _check_words(given[name])
    bias = given.get("embedding_bias")
    if bias is not None and not bias.size:
        del given["embedding_bias"]
    if "runtime_top_p" in given and given["runtime_top_p"].item() <= 0:
        del given["runtime_top_p"]
    return given


def _check_words(words: Any) -> None:
    """One flat list of 2n: ids, then where each word ends."""
    flat = words.reshape(-1).tolist()
    n = len(flat) // 2
    ends = flat[n:]
    stop = next((at for at, end in enumerate(ends) if end == -1), n)
    if any(end != -1 for end in ends[stop:]):
        raise at_the_door("Sparse list must not have additional offsets after a -1")
    before = 0
    for end in ends[:stop]:
        if end <= before:
            raise at_the_door("Sparse list must not have offsets that do not rise")
        if end > n:
            raise at_the_door("Sparse list must not have offsets beyond its ids")
        before = end


def _check_limits(loaded: Loaded, given: dict[str, Any], waiting: int) -> None:
    version, length = loaded.version, given["input_ids"].shape[1]
    asked = given["request_output_len"].item()
    if loaded.max_queue_size and waiting >= loaded.max_queue_size:
        raise Fault(f"Maximum queue size of {loaded.max_queue_size} has been reached, please try again later")
    if version == V1_2:
        _sampling_1_2(loaded, given, asked)
    else:
        _sampling_0_14(version, given)
    if length > loaded.max_input_len:
        raise engine_said(
            version,
            f"Prompt length ({length}) exceeds maximum input length ({loaded.max_input_len})."
            " Set log level to info and check TRTLLM logs for how maximum input length is set",
        )
    if length + asked > loaded.max_seq_len:  # cut, and only the log says so
        given["request_output_len"] = np.full((1, 1), loaded.max_seq_len - length, np.int32)
    streaming = "streaming" in given and bool(given["streaming"].any())
    evicts = loaded.policy != "guaranteed_no_evict" and not loaded.chunked
    if version == V1_2 and streaming and evicts and length + asked - 1 > loaded.max_input_len:
        raise engine_said(version, "streaming with eviction: prompt and output must fit max_input_len")


def _value(given: Mapping[str, Any], *names: str) -> Any:
    return next((given[name].item() for name in names if name in given), None)


def _sampling_0_14(version: str, given: dict[str, Any]) -> None:
    bounds: dict[str, Callable[[float], bool]] = {
        "runtime_top_k": lambda value: value > -1,
        "runtime_top_p": lambda value: -1e-6 < value <= 1,
        "temperature": lambda value: value > -1e-6,
        "repetition_penalty": lambda value: value > 0,
        "min_length": lambda value: value > -1,
        "beam_width": lambda value: value > 0,
    }
    for name, fits in bounds.items():
        value = _value(given, name)
        if value is not None and not fits(value):
            raise engine_said(version, "Incorrect sampling config")
    if _value(given, "temperature") == 0:
        del given["temperature"]
        given["runtime_top_k"] = np.ones((1, 1), np.int32)


def _sampling_1_2(loaded: Loaded, given: dict[str, Any], asked: int) -> None:
    bounds: dict[str, Callable[[float], bool]] = {
        "beam_width": lambda value: 1 <= value <= loaded.max_beam_width,
        "runtime_top_k": lambda value: value >= 0,
        "runtime_top_p": lambda value: 0 < value <= 1,
        "temperature": lambda value: value >= 0,
        "repetition_penalty": lambda value: value > 0,
        "min_tokens": lambda value: value >= 0,
        "num_return_sequences": lambda value: value > 0,
        "end_id": lambda value: -1 <= value < loaded.vocab_size,
    }
    for name, fits in bounds.items():
        value = _value(given, name)
        if value is not None and not fits(value):
            raise at_the_door(f"{name} is {value}")
    if not given["input_ids"].size or asked <= 0:
        raise at_the_door("input_ids must not be empty and request_output_len must be above 0")
    if _value(given, "return_context_logits") and not loaded.gathers["context"]:
        raise engine_said(V1_2, "Return context logit need to build engine with gather_context")
    if _value(given, "return_generation_logits") and not loaded.gathers["generation"]:
        raise engine_said(V1_2, "gather_generation_logits must be enabled with --gather_generation_logits")


# --- responses ---


def check_outputs(version: str, wanted: Collection[str]) -> None:
    """With the first tokens: the outputs that a request named, or all of the config when it named none."""
    for name in MUST_BE_NAMED if version in LATER else ():
        if name not in wanted:
            why = asserted(f"{name} tensor must be present in list of output tensors")
            raise Fault(f"Error encountered while populating response: {why}")


def without_value(version: str, arrays: Mapping[str, Any], log_probs: bool, n_prompt: int) -> dict[str, Any]:
    """The zeros of 24.10 are as long as the prompt."""
    arrays = dict(arrays)
    if version == R24_10 and not log_probs and "output_log_probs" in arrays:
        arrays["output_log_probs"] = np.zeros((1, 1, n_prompt), np.float32)
    return arrays
