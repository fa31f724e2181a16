"""Room `model_repo`: Triton's model repository, model_repo_template/ with every hole filled.

Reads   the rooms engines and config (its tokenizer), model_repo_template/, the backend's contract table of the version
Writes  <model>/config.pbtxt and <model>/1/ for five models; preprocessing/1/tokenizer/
Needs   Triton's ModelConfig protobuf: every config is parsed before the room is published

All paths in the configs are relative to the folder that holds engines/ and model_repo/,
which is the server's working directory.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

from scripts import reports, room
from scripts.limits import limits_of
from scripts.making import ingredients
from scripts.nvidia import contracts
from scripts.tokenizer import proof
from scripts.weights.folder import check_file

TEMPLATES = Path(__file__).parent.parent / "model_repo_template"
# FileDescriptorProto of model_config.proto (BSD-3-Clause), as tritonclient carries it
MODEL_CONFIG = contracts.DOCKER / "contracts" / "model_config.binpb"
TOKENIZER = "preprocessing/1/tokenizer"
CHAT_TEMPLATE = "chat_template.jinja"
CHAT_TEMPLATE_MAX_BYTES = 1 << 20
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    CHAT_TEMPLATE,
    # several tokens may end an answer
    "generation_config.json",
)
# Later names of the same inputs; the torch engine takes both.
ALSO_CALLED = {"min_length": "min_tokens", "random_seed": "seed", "min_tokens": "min_length", "seed": "random_seed"}
# Parameters of a request that the torch engine takes (its contract.py), because no version has an input for all of them
REQUEST_PARAMETERS = ("guided_decoding_guide", "guided_decoding_guide_type", "min_p", "prompt_logprobs", "top_logprobs")
# Parameters that are left out on purpose. Either the backend's default is right (each is read in a try block,
# tensorrtllm_backend's model_instance_state.cc), or Llama does not need them: images, encoders, LoRA,
# draft models, more nodes.
LEFT_OUT = {
    "cancellation_check_period_ms", "cross_kv_cache_fraction", "cuda_graph_cache_size", "cuda_graph_mode", "decoding_mode",
    "eagle_choices", "enable_context_fmha_fp32_acc", "enable_trt_overlap", "encoder_engine_dir", "executor_worker_path",
    "gpu_device_ids", "gpu_weights_percent", "iter_stats_max_iterations", "kv_cache_host_memory_bytes", "kv_cache_onboard_blocks",
    "lookahead_ngram_size", "lookahead_verification_set_size", "lookahead_window_size", "lora_cache_gpu_memory_fraction",
    "lora_cache_host_memory_bytes", "lora_cache_max_adapter_size", "lora_cache_optimal_adapter_size", "lora_prefetch_dir",
    "max_attention_window_size", "max_num_images", "max_tokens_in_paged_kv_cache", "medusa_choices", "multi_block_mode",
    "multimodal_encoders_name", "multimodal_model_path", "num_nodes", "participant_ids", "request_stats_max_iterations",
    "sink_token_length", "speculative_decoding_fast_logits", "stats_check_period_ms", "tensorrt_llm_draft_model_name",
    "visual_model_path",
}  # fmt: skip
TRITON_TYPES = {"float32": "TYPE_FP32", "float16": "TYPE_FP16", "bfloat16": "TYPE_BF16"}


@dataclass(frozen=True)
class Settings:
    """Where the rooms are, and whose tensors the configs declare."""

    engines: Path
    config: Path
    output: Path
    trtllm_version: str
    streaming: bool
    kv_reuse: bool = False
    # the model's name for clients of the OpenAI-compatible endpoint
    name: str = "model"
    # a chat template that replaces the model's own
    chat_template: Path | None = None


def hole_values(
    engine: Mapping[str, Any],
    triton_backend: str,
    streaming: bool,
    unary_response_sender: bool,
    kv_reuse: bool = False,
    without_value: Sequence[str] = (),
) -> dict[str, str]:
    """A value for every hole that any version's templates have.

    engine: the engines' own config.json, so that the repository cannot promise more than the engines can do.
    streaming: Triton's decoupled mode, for all models that answer with text or tokens; without it they answer exactly
    once.
    unary_response_sender: whether a Python model without streaming may answer after execute() has returned.
    without_value: outputs that this version sends even if no input asks for their value.
    """
    build, network = engine["build_config"], engine["pretrained_config"]
    return {
        "triton_backend": triton_backend,
        "triton_max_batch_size": str(build["max_batch_size"]),
        "decoupled_mode": "true" if streaming else "false",
        "batching_strategy": "inflight_fused_batching",
        "engine_dir": "engines",
        "tokenizer_dir": f"model_repo/{TOKENIZER}",
        "tokenizer_type": "auto",
        "max_beam_width": str(build["max_beam_width"]),
        # not NVIDIA's: what our text models must know about the engine
        "max_input_len": str(build["max_input_len"]),
        "max_seq_len": str(limits_of(engine).max_seq_len),
        "vocab_size": str(network["vocab_size"]),
        # in-flight batching already batches: a delay here only adds to the time to the first token
        "max_queue_delay_microseconds": "0",
        # 0: no limit; a request that waits costs little, and the client's own deadline ends it
        "max_queue_size": "0",
        "preprocessing_instance_count": "1",
        # several instances may pass on the pieces of one answer out of order (tensorrtllm_backend issue 614)
        "postprocessing_instance_count": "1",
        # One instance serves many requests at once (tensorrt_llm_bls/1/text_model.py),
        # unless it has to wait in execute().
        "bls_instance_count": "1" if streaming or unary_response_sender else str(build["max_batch_size"]),
        # not NVIDIA's
        "unary_response_sender": "true" if unary_response_sender else "false",
        "sent_without_value": ",".join(without_value),
        "exclude_input_in_output": "true",
        "batch_scheduler_policy": "guaranteed_no_evict",
        "kv_cache_free_gpu_mem_fraction": "0.85",
        # upstream changed this default at 0.19; it needs paged-context FMHA in the engine
        "enable_kv_cache_reuse": "true" if kv_reuse else "false",
        "enable_chunked_context": "false",
        "normalize_log_probs": "true",
        "accumulate_tokens": "false",
        # stock 0.8.0 has the literal False: Llama 2 prompts then lack BOS (tensorrtllm_backend issues 434, 445)
        "add_special_tokens": "true",
        "skip_special_tokens": "true",
        "tensorrt_llm_model_name": "tensorrt_llm",
        # read without a guard from 0.19 on (model_instance_state.cc): they must be there, and empty means off
        "guided_decoding_backend": "",
        "xgrammar_tokenizer_info_path": "",
        "logits_datatype": TRITON_TYPES[network.get("logits_dtype", "float32")],
        # for inputs that Llama does not use; but an unfilled hole would break the file
        "encoder_input_features_data_type": "TYPE_FP16",
        "prompt_embedding_table_data_type": "TYPE_FP16",
    }


def config_holes(table: Mapping[str, Any], values: Mapping[str, str], ours: bool, where: str) -> dict[str, str]:
    """What a version's contract table says about one model, as text for the template's holes.

    ours: for the torch engine. Inputs with several names are declared under all of them (ALSO_CALLED). None is reshaped
    to only the batch axis: clients see the same shapes, and an empty batch, which would crash Triton 2.51 there,
    is refused by its size.
    """
    inputs = {tensor["name"]: tensor for tensor in table["inputs"]}
    for name, alias in ALSO_CALLED.items():
        if ours and name in inputs and alias not in inputs:
            inputs[alias] = {**inputs[name], "name": alias}
    outputs = {tensor["name"]: tensor for tensor in table["outputs"]}  # the ensemble declares one twice from 0.19 on
    parameters = {}
    for parameter in table["parameters"]:
        key, placeholder, literal = parameter["key"], parameter["placeholder"], parameter["literal_in_template"]
        hole = placeholder[2:-1] if placeholder else key
        if hole in LEFT_OUT:
            continue
        if hole not in values and literal is None:
            raise reports.engines.holes_do_not_match(where, [hole], [])
        parameters[key] = values.get(hole, literal)

    def tensor(described: Mapping[str, Any]) -> str:
        reshape = None if ours else described.get("reshape")
        return tensor_line(
            {**described, "data_type": filled(described["data_type"], values, where), "reshape": reshape}
        )

    return {
        "inputs": ",\n".join(map(tensor, inputs.values())),
        "outputs": ",\n".join(map(tensor, outputs.values())),
        "dynamic_batching": filled(_message("dynamic_batching", table["dynamic_batching"] or {}), values, where),
        "parameters": "\n".join(parameter_line(key, value) for key, value in parameters.items()),
    }


def parameter_line(key: str, value: str) -> str:
    """One line of ModelConfig.parameters."""
    return f'parameters {{ key: "{key}" value {{ string_value: {json.dumps(value)} }} }}'


def tensor_line(tensor: Mapping[str, Any]) -> str:
    """One line of ModelConfig.input or .output."""
    parts = [f'name: "{tensor["name"]}"', f"data_type: {tensor['data_type']}"]
    parts.append("dims: [ " + ", ".join(str(size) for size in tensor["dims"]) + " ]")
    if tensor.get("reshape") is not None:
        parts.append("reshape { shape: [ " + ", ".join(str(size) for size in tensor["reshape"]) + " ] }")
    parts += [f"{flag}: true" for flag in ("optional", "allow_ragged_batch") if tensor.get(flag)]
    return "  { " + " ".join(parts) + " }"


def _message(name: str, fields: Mapping[str, Any]) -> str:
    """A nested message of a table in protobuf's text format."""
    parts = []
    for key, value in fields.items():
        if isinstance(value, dict):
            parts.append(_message(key, value))
        else:
            parts.append(f"{key}: " + (f"[ {', '.join(map(str, value))} ]" if isinstance(value, list) else str(value)))
    return f"{name} {{ " + " ".join(parts) + " }"


def filled(text: str, values: Mapping[str, str], where: str) -> str:
    """Text with its holes filled; a hole without a value and a $ that opens no hole are reports."""
    found = list(Template.pattern.finditer(text))
    for match in found:
        if match["invalid"] is not None:
            line = text.count("\n", 0, match.start()) + 1
            raise reports.engines.config_not_accepted(where, f"line {line} has a $ that opens no hole")
    unfilled = {match["named"] or match["braced"] for match in found} - {None, *values}
    if unfilled:
        raise reports.engines.holes_do_not_match(where, sorted(unfilled), [])
    return Template(text).substitute(values)


def fill_template(template: str, values: Mapping[str, str], where: str) -> str:
    """Fill strictly: a hole without a value and a value without a hole are both reports."""
    text = filled(template, values, where)
    unused = sorted(name for name in values if "${" + name + "}" not in template)
    if unused:
        raise reports.engines.holes_do_not_match(where, [], unused)
    return "\n".join(line for line in text.split("\n") if line.strip()) + "\n"


def model_config_type() -> Any:
    """Triton's ModelConfig: tritonclient's, or, without tritonclient (NVIDIA's containers),
    one made from the same description."""
    if importlib.util.find_spec("tritonclient"):
        from tritonclient.grpc import model_config_pb2

        return model_config_pb2.ModelConfig
    from google.protobuf import descriptor_pool, message_factory

    pool = descriptor_pool.DescriptorPool()
    ingredients.note_path(MODEL_CONFIG)
    pool.AddSerializedFile(MODEL_CONFIG.read_bytes())
    described = pool.FindMessageTypeByName("inference.ModelConfig")
    if hasattr(message_factory, "GetMessageClass"):
        return message_factory.GetMessageClass(described)
    return message_factory.MessageFactory(pool).GetPrototype(described)  # protobuf before 4.22


def check_config(text: str, model: str, engine: Mapping[str, Any]) -> Any:
    """A filled config as Triton's own protobuf, after it was compared with the engines."""
    from google.protobuf import text_format

    def refused(reason: str) -> reports.Problem:
        return reports.engines.config_not_accepted(f"{model}/config.pbtxt", reason)

    try:
        config = text_format.Parse(text, model_config_type()())
    except text_format.ParseError as error:
        raise refused(str(error)) from None
    if config.name != model:
        raise refused(f"it names the model {config.name}, but its folder is {model}")
    limits = engine["build_config"]
    parameters = {key: parameter.string_value for key, parameter in config.parameters.items()}
    for name, value in (
        ("max_batch_size", config.max_batch_size),
        *((name, int(parameters[name])) for name in ("max_beam_width", "max_input_len") if name in parameters),
    ):
        if value > limits[name]:
            raise refused(f"{name} is {value}, but the engines were built for {limits[name]}")
    for tensors in (config.input, config.output):
        names = [tensor.name for tensor in tensors]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise refused(f"{', '.join(twice)} is declared twice")
    for key, value in parameters.items():
        if value.startswith("/"):
            raise refused(f"{key} is {value}, a path that only this machine has")
    return config


def check_engine(engine: Mapping[str, Any], kv_reuse: bool) -> None:
    """The configs ask for in-flight batching, and perhaps for KV cache reuse:
    the engines must have been built with what these need.

    The C++ backend refuses the first at load and the second at the first request (tensorrtllm_backend issues 89,
    271, 323).
    """
    build = engine["build_config"]
    plugins = build["plugin_config"]
    paged = str(build.get("kv_cache_type") or "paged").lower() == "paged" and plugins.get("paged_kv_cache", True)
    needed = {
        "in-flight batching": {
            "gpt_attention_plugin": plugins.get("gpt_attention_plugin"),
            "remove_input_padding": plugins.get("remove_input_padding"),
            "paged_kv_cache": paged,
        },
        "KV cache reuse": {"use_paged_context_fmha": plugins.get("use_paged_context_fmha")} if kv_reuse else {},
    }
    for feature, flags in needed.items():
        missing = [name for name, value in flags.items() if not value]
        if missing:
            raise reports.engines.engine_lacks(feature, missing)


def check_together(configs: Mapping[str, Any]) -> None:
    """A Problem unless the models agree on one way of answering, one tokenizer and one batch size."""
    asked = {
        "decoupled": {
            model: configs[model].model_transaction_policy.decoupled
            for model in ("tensorrt_llm", "tensorrt_llm_bls", "ensemble")
        },
        "tokenizer_dir": {
            model: config.parameters["tokenizer_dir"].string_value
            for model, config in configs.items()
            if model != "tensorrt_llm"
        },
        "max_batch_size": {model: config.max_batch_size for model, config in configs.items()},
    }
    for name, values in asked.items():
        if len(set(values.values())) != 1:
            found = ", ".join(f"{model} has {value}" for model, value in values.items())
            raise reports.engines.config_not_accepted("config.pbtxt", f"{name} differs between models: {found}")


def render(
    templates: Mapping[str, str],
    tables: Mapping[str, Any],
    engine: Mapping[str, Any],
    engine_kind: Mapping[str, Any],
    trtllm_version: str,
    streaming: bool,
    kv_reuse: bool = False,
    end_ids: Sequence[int] = (),
) -> dict[str, str]:
    """All config.pbtxt of a repository: model -> text. Nothing is returned unless all of them pass together.

    end_ids: the tokens that end an answer. If there are several, the torch engine gets all of them; TensorRT-LLM takes
    one per request, and the text models send it the others as stop words.
    """
    # the torch engine's Triton is the pinned one, which can do this
    unary_response_sender = engine_kind["model_code"] or contracts.toolchain(trtllm_version)["unary_response_sender"]
    # the torch engine can always reuse its blocks
    check_engine(engine, kv_reuse and not engine_kind["model_code"])
    without_value = contracts.sent_without_value(trtllm_version)
    values = hole_values(
        engine, engine_kind["triton_backend"], streaming, unary_response_sender, kv_reuse, without_value
    )
    missing = {
        placeholder["name"]
        for table in tables.values()
        for placeholder in table["placeholders"]
        if placeholder["must_fill"] and not values.get(placeholder["name"])
    }
    if missing:
        raise reports.engines.holes_do_not_match("docker/contracts/backend", sorted(missing), [])
    texts, configs = {}, {}
    for model, template in templates.items():
        where = f"model_repo_template/{model}/config.pbtxt"
        holes = config_holes(tables[model], values, engine_kind["model_code"], where)
        if model == "tensorrt_llm" and engine_kind["model_code"]:
            holes["parameters"] += "\n" + parameter_line("sent_without_value", values["sent_without_value"])
            holes["parameters"] += "\n" + parameter_line("request_parameters", ",".join(REQUEST_PARAMETERS))
        # Every value of this model's table must find a hole;
        # a template uses only some of the values for the whole repository.
        common = {**values, "trtllm_version": trtllm_version}
        used = {name: value for name, value in common.items() if "${" + name + "}" in template}
        if model == "tensorrt_llm" and engine_kind["model_code"] and len(end_ids) > 1:
            listed = ",".join(map(str, end_ids))
            holes["parameters"] += f'\nparameters {{ key: "end_ids" value {{ string_value: "{listed}" }} }}'
        texts[model] = fill_template(template, {**holes, **used}, where)
        configs[model] = check_config(texts[model], model, engine)
    check_together(configs)
    return texts


def build_model_repo(settings: Settings) -> None:
    """Fill the room `model_repo`."""
    engines, described = room.read_manifest(settings.engines), room.read_manifest(settings.config)
    engine = json.loads((settings.engines / "config.json").read_bytes())
    kind = json.loads((contracts.DOCKER / "engines.json").read_text())[engines["facts"]["engine"]]
    ingredients.note_row("docker/engines.json", engines["facts"]["engine"])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if name not in described["files"]:
            raise reports.weights.tokenizer_unreadable(
                settings.config / name, "this file is missing, but the text models need it"
            )
    template = read_chat_template(settings.chat_template)
    if template is not None and settings.chat_template is not None:
        try_chat_template(settings.config, settings.chat_template, template)
    tables = contracts.table("backend", settings.trtllm_version)
    ingredients.note(f"{TEMPLATES.name}/*/config.pbtxt")
    templates = {path.parent.name: path.read_text() for path in sorted(TEMPLATES.glob("*/config.pbtxt"))}
    configs = render(
        templates, tables, engine, kind, settings.trtllm_version, settings.streaming, settings.kv_reuse, ends_of(settings.config)
    )  # fmt: skip
    room.say(
        "model_repo",
        f"{len(configs)} models with the tensors of TensorRT-LLM {settings.trtllm_version}, engine "
        f"{engines['facts']['engine']}" + ("" if settings.streaming else ", no streaming (decoupled: false)"),
    )
    with room.filling(
        settings.output,
        reads={"engines": settings.engines, "config": settings.config},
        arguments={
            "trtllm_version": settings.trtllm_version,
            "streaming": settings.streaming,
            "kv_reuse": settings.kv_reuse,
            "name": settings.name,
        },
    ) as filling:
        for model, config in configs.items():
            filling.write(f"{model}/config.pbtxt", config.encode())
            code = _code_of(model) if model != "tensorrt_llm" or kind["model_code"] else []
            for path in code:
                filling.write(f"{model}/1/{path.name}", path.read_bytes())
            if not code:  # Triton wants the version folder; git and docker lose empty ones
                filling.write(f"{model}/1/.keep", b"")
        if template is not None:
            filling.write(f"{TOKENIZER}/{CHAT_TEMPLATE}", template)
        for name in TOKENIZER_FILES:
            if name in described["files"] and not (template is not None and name == CHAT_TEMPLATE):
                filling.write(f"{TOKENIZER}/{name}", _without_path(name, (settings.config / name).read_bytes()))
        filling.facts = {"models": sorted(configs)}


def ends_of(config: Path) -> list[int]:
    """Every token that ends an answer, as the room config lists them."""
    listed = config / "generation_config.json"
    named = json.loads(listed.read_bytes()).get("eos_token_id") if listed.is_file() else None
    return [named] if isinstance(named, int) else list(named or [])


def read_chat_template(path: Path | None) -> bytes | None:
    """CHAT_TEMPLATE's file, checked as far as possible without a conversation; a Problem if it is not a template."""
    if path is None:
        return None
    check_file(path)
    try:
        with path.open("rb") as file:
            data = file.read(CHAT_TEMPLATE_MAX_BYTES + 1)
        text = data.decode("utf-8")
    except (OSError, ValueError) as error:
        raise reports.weights.chat_template_unfit(path, str(error)) from None
    if len(data) > CHAT_TEMPLATE_MAX_BYTES or "messages" not in text:
        raise reports.weights.chat_template_unfit(
            path, "a chat template says what is done with `messages`, in at most 1 MB"
        )
    return data


def try_chat_template(config: Path, path: Path, template: bytes) -> None:
    """A Problem if the endpoint could not use CHAT_TEMPLATE with the model's tokenizer.
    (The room config has tried the model's own.)"""
    names = [name for name in TOKENIZER_FILES if (config / name).is_file() and name != CHAT_TEMPLATE]
    files = {**{name: (config / name).read_bytes() for name in names}, CHAT_TEMPLATE: template}
    proof.open_as_served(files, lambda name: path if name == CHAT_TEMPLATE else config / name)


def _code_of(model: str) -> list[Path]:
    ingredients.note(f"{TEMPLATES.name}/{model}/1/*.py")
    return sorted((TEMPLATES / model / "1").glob("*.py"))


def _without_path(name: str, data: bytes) -> bytes:
    """tokenizer_config.json without the folder that it was loaded from,
    a path of another machine that older transformers noted."""
    if name != "tokenizer_config.json" or b"name_or_path" not in data:
        return data
    return json.dumps({key: value for key, value in json.loads(data).items() if key != "name_or_path"}).encode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag in ("--engines", "--config", "--output"):
        parser.add_argument(flag, type=Path, required=True)
    parser.add_argument("--trtllm-version", required=True)
    parser.add_argument(
        "--kv-reuse", choices=("on", "off"), default="off", help="share the cache of requests that begin alike"
    )
    parser.add_argument("--streaming", choices=("on", "off"), required=True, help="Triton's decoupled mode")
    parser.add_argument(
        "--name", default="model", help="the model's name for clients of the OpenAI-compatible endpoint"
    )
    parser.add_argument("--chat-template", default="", help="a Jinja file, instead of the model's own")
    args = parser.parse_args()
    build_model_repo(
        Settings(
            args.engines, args.config, args.output, args.trtllm_version, args.streaming == "on", args.kv_reuse == "on",
            name=args.name, chat_template=Path(args.chat_template) if args.chat_template else None,
        )
    )  # fmt: skip


if __name__ == "__main__":
    reports.run(main)
