"""Room `model_repo`: Triton's model repository, model_repo_template/ with every hole filled.

Reads   the rooms engines and hf (its tokenizer), model_repo_template/, the backend's contract table of the version
Writes  <model>/config.pbtxt and <model>/1/ for five models; preprocessing/1/tokenizer/
Needs   the ModelConfig protobuf of tritonclient: every config is parsed before the room is published

All paths in the configs are relative to the folder that holds engines/ and model_repo/, which is the server's working directory.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any, Dict, List, Mapping, Optional, Sequence

from scripts import contracts, errors, room

TEMPLATES = Path(__file__).parent.parent / "model_repo_template"
TOKENIZER = "preprocessing/1/tokenizer"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "chat_template.jinja",
)
# Names that later versions gave to the same inputs; our own models accept both.
ALSO_CALLED = {"min_length": "min_tokens", "random_seed": "seed", "min_tokens": "min_length", "seed": "random_seed"}


@dataclass(frozen=True)
class Settings:
    """Where the rooms are, and whose tensors the configs declare."""

    engines: Path
    hf: Path
    output: Path
    trtllm_version: str


def hole_values(engine: Mapping[str, Any], triton_backend: str) -> Dict[str, Optional[str]]:
    """A value for every hole that any version's templates have. None: left out on purpose, the backend's default holds.

    engine: the engines' own config.json, so that the repository cannot promise what the engines do not keep.
    """
    build = engine["build_config"]
    return {
        "triton_backend": triton_backend,
        "triton_max_batch_size": str(build["max_batch_size"]),
        "decoupled_mode": "true",
        "batching_strategy": "inflight_fused_batching",
        "engine_dir": "engines",
        "tokenizer_dir": f"model_repo/{TOKENIZER}",
        "tokenizer_type": "auto",
        "max_beam_width": str(build["max_beam_width"]),
        # in-flight batching already batches: waiting at the door only adds to the time to first token
        "max_queue_delay_microseconds": "0",
        # 0: no limit; a request that waits costs little, and the client's own deadline ends it
        "max_queue_size": "0",
        "preprocessing_instance_count": "1",
        # more than one may hand the pieces of one answer on out of order (tensorrtllm_backend issue 614)
        "postprocessing_instance_count": "1",
        # one instance serves many requests at once (tensorrt_llm_bls/1/text_model.py)
        "bls_instance_count": "1",
        "exclude_input_in_output": "true",
        "batch_scheduler_policy": "guaranteed_no_evict",
        "kv_cache_free_gpu_mem_fraction": "0.85",
        # upstream changed this default at 0.19; it needs paged-context FMHA in the engine
        "enable_kv_cache_reuse": "false",
        "enable_chunked_context": "false",
        "normalize_log_probs": "true",
        "enable_trt_overlap": "false",
        "accumulate_tokens": "false",
        # stock 0.8.0 has the literal False: Llama 2 prompts then lack BOS (tensorrtllm_backend issues 434, 445)
        "add_special_tokens": "true",
        "skip_special_tokens": "true",
        "tensorrt_llm_model_name": "tensorrt_llm",
        "logits_datatype": "TYPE_FP32",
        "encoder_input_features_data_type": "TYPE_FP16",
        "prompt_embedding_table_data_type": "TYPE_FP16",
    }


def config_holes(table: Mapping[str, Any], values: Mapping[str, Optional[str]], ours: bool) -> Dict[str, str]:
    """What a version's contract table says about one model, as text for the template's holes.

    ours: the model is Python code of this project, which takes every name that any version gave to an input.
    """
    inputs = {tensor["name"]: tensor for tensor in table["inputs"]}
    for name, alias in ALSO_CALLED.items():
        if ours and name in inputs and alias not in inputs:
            inputs[alias] = {**inputs[name], "name": alias}
    outputs = {tensor["name"]: tensor for tensor in table["outputs"]}  # the 0.19 ensemble declares one twice
    parameters: Dict[str, Optional[str]] = {}
    for parameter in table["parameters"]:
        key, placeholder = parameter["key"], parameter["placeholder"]
        hole = placeholder[2:-1] if placeholder else key
        parameters[key] = values.get(hole, parameter["literal_in_template"])
    return {
        "inputs": ",\n".join(_tensor(tensor, values) for tensor in inputs.values()),
        "outputs": ",\n".join(_tensor(tensor, values) for tensor in outputs.values()),
        "dynamic_batching": _message("dynamic_batching", table["dynamic_batching"], values),
        "parameters": "\n".join(
            f'parameters {{ key: "{key}" value {{ string_value: {json.dumps(value)} }} }}'
            for key, value in parameters.items()
            if value is not None
        ),
    }


def _tensor(tensor: Mapping[str, Any], values: Mapping[str, Optional[str]]) -> str:
    """One line of ModelConfig.input or .output."""
    parts = [f'name: "{tensor["name"]}"', f"data_type: {filled(tensor['data_type'], values)}"]
    parts.append("dims: [ " + ", ".join(str(size) for size in tensor["dims"]) + " ]")
    if tensor.get("reshape") is not None:
        parts.append("reshape { shape: [ " + ", ".join(str(size) for size in tensor["reshape"]) + " ] }")
    parts += [f"{flag}: true" for flag in ("optional", "allow_ragged_batch") if tensor.get(flag)]
    return "  { " + " ".join(parts) + " }"


def _message(name: str, fields: Optional[Mapping[str, Any]], values: Mapping[str, Optional[str]]) -> str:
    """A table's nested message in text format; nothing when the table has none."""
    if fields is None:
        return ""
    parts = []
    for key, value in fields.items():
        if isinstance(value, dict):
            parts.append(_message(key, value, values))
        elif isinstance(value, list):
            parts.append(f"{key}: [ " + ", ".join(filled(str(item), values) for item in value) + " ]")
        else:
            parts.append(f"{key}: {filled(str(value), values)}")
    return f"{name} {{ " + " ".join(parts) + " }"


def filled(text: str, values: Mapping[str, Optional[str]]) -> str:
    """A table's cell with its hole filled; a hole that we have no value for is our error."""
    return Template(text).substitute({name: value for name, value in values.items() if value is not None})


def fill_template(template: str, values: Mapping[str, str], where: str) -> str:
    """Strict: a hole without a value and a value without a hole are both errors."""
    holes = {
        match["named"] or match["braced"]
        for match in Template.pattern.finditer(template)
        if match["named"] or match["braced"]
    }
    unfilled, unused = sorted(holes - set(values)), sorted(set(values) - holes)
    if unfilled or unused:
        raise errors.holes_do_not_match(where, unfilled, unused)
    text = Template(template).substitute(values)
    return "\n".join(line for line in text.split("\n") if line.strip()) + "\n"


def check_config(text: str, model: str, engine: Mapping[str, Any]) -> None:
    """Parse a filled config with Triton's own protobuf and hold it against the engines."""
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    where = f"{model}/config.pbtxt"
    if "${" in text:
        raise errors.config_not_accepted(where, "a hole is left")
    try:
        config = text_format.Parse(text, model_config_pb2.ModelConfig())
    except text_format.ParseError as error:
        raise errors.config_not_accepted(where, str(error)) from None
    limit = engine["build_config"]["max_batch_size"]
    if config.name != model:
        raise errors.config_not_accepted(where, f"it names the model {config.name}, its folder is {model}")
    if config.max_batch_size != limit:
        raise errors.config_not_accepted(
            where, f"max_batch_size is {config.max_batch_size}, the engines were built for {limit}"
        )
    for tensors in (config.input, config.output):
        names = [tensor.name for tensor in tensors]
        if len(set(names)) != len(names):
            raise errors.config_not_accepted(where, "a tensor is declared twice")


def check_together(configs: Mapping[str, str]) -> None:
    """What the models ask of each other: the text models must be able to say to tensorrt_llm what they were told."""
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    parsed = {model: text_format.Parse(text, model_config_pb2.ModelConfig()) for model, text in configs.items()}
    decoupled = {
        model: parsed[model].model_transaction_policy.decoupled
        for model in ("tensorrt_llm", "tensorrt_llm_bls", "ensemble")
    }
    if len(set(decoupled.values())) != 1:
        raise errors.config_not_accepted("config.pbtxt", f"decoupled differs between models: {decoupled}")
    directories = {
        model: parsed[model].parameters["tokenizer_dir"].string_value for model in configs if model != "tensorrt_llm"
    }
    if len(set(directories.values())) != 1:
        raise errors.config_not_accepted("config.pbtxt", f"tokenizer_dir differs between models: {directories}")


def render(
    templates: Mapping[str, str],
    tables: Mapping[str, Any],
    engine: Mapping[str, Any],
    engine_kind: Mapping[str, Any],
    trtllm_version: str,
) -> Dict[str, str]:
    """All config.pbtxt of a repository: model -> text. Nothing is returned unless all of them pass together."""
    values = hole_values(engine, engine_kind["triton_backend"])
    missing = sorted(
        {
            placeholder["name"]
            for table in tables.values()
            for placeholder in table["placeholders"]
            if placeholder["must_fill"] and values.get(placeholder["name"]) is None
        }
    )
    if missing:
        raise errors.holes_do_not_match("docker/contracts/backend", missing, [])
    configs = {}
    for model, template in templates.items():
        ours = model != "tensorrt_llm" or engine_kind["model_code"]
        holes = config_holes(tables[model], values, ours)
        common = {"trtllm_version": trtllm_version, **{name: value for name, value in values.items() if value is not None}}
        # What the table says of this model must find its hole; of the values for the whole repository a template uses its own.
        used = {name: value for name, value in common.items() if "${" + name + "}" in template}
        configs[model] = fill_template(template, {**holes, **used}, f"model_repo_template/{model}/config.pbtxt")
        check_config(configs[model], model, engine)
    check_together(configs)
    return configs


def build_model_repo(settings: Settings) -> None:
    """Fill the room `model_repo`."""
    engines, hf = room.read_manifest(settings.engines), room.read_manifest(settings.hf)
    engine = json.loads((settings.engines / "config.json").read_bytes())
    kind = json.loads((contracts.DOCKER / "engines.json").read_text())[engines["facts"]["engine"]]
    tables = contracts.table("backend", settings.trtllm_version)
    templates = {path.parent.name: path.read_text() for path in sorted(TEMPLATES.glob("*/config.pbtxt"))}
    configs = render(templates, tables, engine, kind, settings.trtllm_version)
    room.say(
        "model_repo",
        f"{len(configs)} models with the tensors of TensorRT-LLM {settings.trtllm_version}, engine {engines['facts']['engine']}",
    )
    with room.filling(
        settings.output,
        reads={"engines": settings.engines, "hf": settings.hf},
        arguments={"trtllm_version": settings.trtllm_version},
    ) as filling:
        for model, config in configs.items():
            filling.write(f"{model}/config.pbtxt", config.encode())
            code = _code_of(model) if model != "tensorrt_llm" or kind["model_code"] else []
            for path in code:
                filling.write(f"{model}/1/{path.name}", path.read_bytes())
            if not code:  # Triton wants the version folder; git and docker lose empty ones
                filling.write(f"{model}/1/.keep", b"")
        for name in TOKENIZER_FILES:
            if name in hf["files"]:
                filling.write(f"{TOKENIZER}/{name}", (settings.hf / name).read_bytes())
        filling.facts = {"models": sorted(configs)}


def _code_of(model: str) -> Sequence[Path]:
    found: List[Path] = sorted((TEMPLATES / model / "1").glob("*.py"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag in ("--engines", "--hf", "--output"):
        parser.add_argument(flag, type=Path, required=True)
    parser.add_argument("--trtllm-version", required=True)
    args = parser.parse_args()
    build_model_repo(Settings(args.engines, args.hf, args.output, args.trtllm_version))


if __name__ == "__main__":
    errors.run(main)
