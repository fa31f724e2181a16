"""Every config of every version parses with Triton's protobuf, and has NVIDIA's tensors, no hole,
and no limit above the engines'."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from google.protobuf import text_format
from project import ROOT
from tritonclient.grpc import model_config_pb2

from scripts import build_model_repo, reports, room
from scripts.nvidia import contracts

VERSIONS = contracts.versions()
KINDS = json.loads((contracts.DOCKER / "engines.json").read_text())
TEMPLATES = {path.parent.name: path.read_text() for path in build_model_repo.TEMPLATES.glob("*/config.pbtxt")}
TEXT_MODELS = {"ensemble", "tensorrt_llm_bls"}
# Parameters of our own text models, which NVIDIA's tables do not have
OWN = {
    "preprocessing": {"vocab_size", "max_input_len", "max_seq_len"},
    "ensemble": {
        "tokenizer_dir",
        "vocab_size",
        "max_input_len",
        "max_seq_len",
        "unary_response_sender",
        "sent_without_value",
    },
    "tensorrt_llm_bls": {
        "tokenizer_dir",
        "vocab_size",
        "max_input_len",
        "max_seq_len",
        "unary_response_sender",
        "sent_without_value",
    },
}
# What a Llama has no use for: images, encoders, draft models, prompt tables; the text models do not translate it.
NOT_FOR_LLAMA = {
    "decoder_text_input", "image_input", "image_bytes_input", "image_url_input", "image_sizes_input", "video_bytes_input",
    "num_draft_tokens", "use_draft_logits", "prompt_table_extra_id",
}  # fmt: skip


def engine_config(version: str, **build: Any) -> dict[str, Any]:
    """An engines' config.json as that version writes it, with limits that all differ."""
    config: dict[str, Any] = contracts.table("engine-config", version)
    config["build_config"].update({"max_batch_size": 6, "max_input_len": 700, "max_beam_width": 3, **build})
    config["pretrained_config"]["vocab_size"] = 32011
    return config


def render(
    version: str = "0.8.0",
    kind: str = "torch",
    templates: Any = TEMPLATES,
    streaming: bool = True,
    kv_reuse: bool = False,
    plugins: Any = (),
    **build: Any,
) -> dict[str, str]:
    tables, engine = contracts.table("backend", version), engine_config(version, **build)
    engine["build_config"]["plugin_config"].update(plugins)
    return build_model_repo.render(templates, tables, engine, KINDS[kind], version, streaming, kv_reuse)


def parsed(texts: dict[str, str]) -> dict[str, Any]:
    return {model: text_format.Parse(text, model_config_pb2.ModelConfig()) for model, text in texts.items()}


def changed(model: str, old: str, new: str) -> dict[str, str]:
    assert old in TEMPLATES[model]
    return {**TEMPLATES, model: TEMPLATES[model].replace(old, new)}


def refused(templates: dict[str, str], **build: Any) -> str:
    with pytest.raises(reports.Problem) as problem:
        render(templates=templates, **build)
    return problem.value.report()


every_repository = pytest.mark.parametrize(
    ("version", "kind"), [(version, kind) for version in VERSIONS for kind in KINDS]
)


def described(tensor: Any) -> dict[str, Any]:
    """A tensor of a parsed config in the form of the tables."""
    return {
        "data_type": model_config_pb2.DataType.Name(tensor.data_type),
        "dims": list(tensor.dims),
        "reshape": list(tensor.reshape.shape) if tensor.HasField("reshape") else None,
        "optional": getattr(tensor, "optional", False),
        "ragged": getattr(tensor, "allow_ragged_batch", False),
    }


def tabled(tensor: Any, kind: str) -> dict[str, Any]:
    types = {
        "${logits_datatype}": "TYPE_FP32",
        "${encoder_input_features_data_type}": "TYPE_FP16",
        "${prompt_embedding_table_data_type}": "TYPE_FP16",
    }
    return {
        "data_type": types.get(tensor["data_type"], tensor["data_type"]),
        "dims": tensor["dims"],
        "reshape": None if kind == "torch" else tensor.get("reshape"),  # for clients it is the same shape
        "optional": bool(tensor.get("optional")),
        "ragged": bool(tensor.get("allow_ragged_batch")),
    }


@every_repository
def test_tensors_are_those_of_the_table(version: str, kind: str) -> None:
    configs, tables = parsed(render(version, kind)), contracts.table("backend", version)
    assert set(configs) == set(tables)
    for model, table in tables.items():
        inputs = {tensor["name"]: tabled(tensor, kind) for tensor in table["inputs"]}
        if kind == "torch":  # this engine takes an input by the name that any version gave it
            for one, other in (("min_length", "min_tokens"), ("random_seed", "seed")):
                named = inputs.get(one) or inputs.get(other)
                inputs.update({one: named, other: named} if named else {})
        # ours: special tokens are hidden or shown as a request says
        ours = {
            "postprocessing": "SKIP_SPECIAL_TOKENS",
            "ensemble": "skip_special_tokens",
            "tensorrt_llm_bls": "skip_special_tokens",
        }
        declared = {tensor.name: described(tensor) for tensor in configs[model].input if tensor.name != ours.get(model)}
        assert declared == inputs
        assert len(configs[model].output) == len({tensor["name"] for tensor in table["outputs"]})
        assert {tensor.name: described(tensor) for tensor in configs[model].output} == {
            tensor["name"]: tabled(tensor, kind) for tensor in table["outputs"]
        }


@every_repository
def test_parameters_are_those_of_the_table_but_for_what_is_left_out_by_name(version: str, kind: str) -> None:
    configs, tables = parsed(render(version, kind)), contracts.table("backend", version)
    for model, table in tables.items():
        keys = {
            p["key"]
            for p in table["parameters"]
            if (p["placeholder"] or f"${{{p['key']}}}")[2:-1] not in build_model_repo.LEFT_OUT
        }
        own = OWN.get(
            model, {"sent_without_value", "request_parameters"} if (model, kind) == ("tensorrt_llm", "torch") else set()
        )
        assert set(configs[model].parameters) == keys | own
    assert configs["tensorrt_llm"].backend == {"torch": "python", "tensorrt": "tensorrtllm"}[kind]
    for model in TEXT_MODELS:
        assert configs[model].parameters["vocab_size"].string_value == "32011"
        assert configs[model].parameters["max_input_len"].string_value == "700"
    for model, config in configs.items():
        assert config.max_batch_size == 6
        assert config.model_transaction_policy.decoupled == (model in TEXT_MODELS | {"tensorrt_llm"})


@every_repository
def test_without_streaming_a_request_has_one_response_and_none_waits_for_another(version: str, kind: str) -> None:
    configs = parsed(render(version, kind, streaming=False))
    assert [model for model, config in configs.items() if config.model_transaction_policy.decoupled] == []
    for model in TEXT_MODELS:
        # Triton of 24.02: a unary Python model answers when execute() returns,
        # so each request of a batch needs an instance
        must_wait = (version, kind) == ("0.8.0", "tensorrt")
        assert configs[model].instance_group[0].count == (6 if must_wait else 1)
        assert configs[model].parameters["unary_response_sender"].string_value == ("false" if must_wait else "true")
    assert configs["tensorrt_llm"].instance_group[0].count == 1
    streaming = parsed(render(version, kind))
    assert {streaming[model].instance_group[0].count for model in TEXT_MODELS} == {1}


def test_what_is_left_out_is_in_a_table_and_never_must_be_filled() -> None:
    holes, must_fill = set(), set()
    for version in VERSIONS:
        for table in contracts.table("backend", version).values():
            holes |= {(p["placeholder"] or f"${{{p['key']}}}")[2:-1] for p in table["parameters"]}
            must_fill |= {p["name"] for p in table["placeholders"] if p["must_fill"]}
    assert holes >= build_model_repo.LEFT_OUT
    assert not build_model_repo.LEFT_OUT & must_fill


def test_what_the_backend_reads_without_a_guard_is_there() -> None:
    """From 0.19 on a missing key of these three fails the load."""
    parameters = parsed(render("1.2.1", "tensorrt"))["tensorrt_llm"].parameters
    assert parameters["guided_decoding_backend"].string_value == ""
    assert parameters["xgrammar_tokenizer_info_path"].string_value == ""
    assert parameters["tokenizer_dir"].string_value == "model_repo/preprocessing/1/tokenizer"


def test_the_prompt_table_has_one_type_in_all_models_of_1_2_1() -> None:
    for model, config in parsed(render("1.2.1", "tensorrt")).items():
        types = {tensor.data_type for tensor in config.input if tensor.name == "prompt_embedding_table"}
        assert types <= {model_config_pb2.TYPE_FP16}, model


@pytest.fixture
def text_model() -> Iterator[ModuleType]:
    """The text model's module, with a stand-in for Triton's."""
    with pytest.MonkeyPatch.context() as patch:
        triton = ModuleType("triton_python_backend_utils")
        vars(triton).update(TRITONSERVER_RESPONSE_COMPLETE_FINAL=1)
        patch.setitem(sys.modules, "triton_python_backend_utils", triton)
        patch.syspath_prepend(str(ROOT / "model_repo_template" / "tensorrt_llm_bls" / "1"))
        spec = importlib.util.spec_from_file_location(
            "text_model", ROOT / "model_repo_template/tensorrt_llm_bls/1/text_model.py"
        )
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
        sys.modules.pop("sent", None)


@every_repository
def test_what_a_text_model_takes_the_engine_takes_too(version: str, kind: str, text_model: Any) -> None:
    configs = parsed(render(version, kind))
    engine = {tensor.name for tensor in configs["tensorrt_llm"].input}
    outputs = {tensor.name for tensor in configs["tensorrt_llm"].output}
    for model in TEXT_MODELS:
        for tensor in configs[model].input:
            if tensor.name not in text_model.TRANSLATED | NOT_FOR_LLAMA:
                assert text_model.RENAMED.get(tensor.name, tensor.name) in engine, tensor.name
        assert {tensor.name for tensor in configs[model].output} - {"text_output"} <= outputs
    made = {
        "input_ids",
        "input_lengths",
        "request_output_len",
        "end_id",
        "pad_id",
        "streaming",
        "stop",
        "bad_words_list",
        "embedding_bias",
    }
    assert made <= engine


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("${inputs}", "", "Values without a placeholder: inputs"),
        ("${decoupled_mode}", "${decoupled_moed}", "Placeholders without a value: decoupled_moed"),
        ("${decoupled_mode}", "${decoupled mode}", "line 8 has a $ that opens no hole"),
        ('backend: "python"', "backend: python", "Expected string"),
        ("max_batch_size", "max_batchsize", "max_batchsize"),
        ('name: "ensemble"', 'name: "ensembel"', "it names the model ensembel, but its folder is ensemble"),
        ("${triton_max_batch_size}", "7", "max_batch_size is 7, but the engines were built for 6"),
        ("${max_input_len}", "701", "max_input_len is 701, but the engines were built for 700"),
        ("${tokenizer_dir}", "/models/tokenizer", "tokenizer_dir is /models/tokenizer"),
        ("${decoupled_mode}", "false", "decoupled differs between models"),
        ("${tokenizer_dir}", "elsewhere", "tokenizer_dir differs between models"),
        ("${triton_max_batch_size}", "5", "max_batch_size differs between models"),
        (
            "output [",
            'output [ { name: "text_output" data_type: TYPE_STRING dims: [ -1 ] },',
            "text_output is declared twice",
        ),
    ],
)
def test_a_template_with_a_fault_is_refused(old: str, new: str, named: str) -> None:
    report = refused(changed("ensemble", old, new))
    assert named in " ".join(report.split())
    assert report.rstrip().split("\n")[-1].strip().startswith("make model_repo")


def test_a_limit_above_the_engines_is_refused() -> None:
    assert "max_beam_width is 4, but the engines were built for 3" in refused(
        {
            **TEMPLATES,
            "tensorrt_llm": TEMPLATES["tensorrt_llm"]
            + 'parameters { key: "max_beam_width" value { string_value: "4" } }\n',
        }
    )


def test_a_parameter_that_nobody_decided_about_is_refused() -> None:
    tables = contracts.table("backend", "0.8.0")
    tables["tensorrt_llm"]["parameters"].append(
        {"key": "new_one", "placeholder": "${new_hole}", "literal_in_template": None}
    )
    with pytest.raises(reports.Problem) as problem:
        build_model_repo.render(TEMPLATES, tables, engine_config("0.8.0"), KINDS["torch"], "0.8.0", True)
    assert "new_hole" in problem.value.seen


# --- the room ---------------------------------------------------------------------------------------------------------


def rooms(folder: Path, tokenizer_config: Any, kind: str = "torch") -> build_model_repo.Settings:
    """Rooms engines and hf with what model_repo reads of them."""
    with room.filling(folder / "hf", arguments={}) as filling:
        filling.write("tokenizer.json", b"{}")
        if tokenizer_config is not None:
            filling.write("tokenizer_config.json", json.dumps(tokenizer_config).encode())
    with room.filling(folder / "engines", reads={}, arguments={}) as filling:
        filling.write("config.json", json.dumps(engine_config("0.8.0")).encode())
        filling.facts = {"engine": kind}
    return build_model_repo.Settings(folder / "engines", folder / "hf", folder / "model_repo", "0.8.0", True)


@pytest.mark.parametrize("kind", KINDS)
def test_no_file_of_the_room_names_a_path_of_this_machine(tmp_path: Path, kind: str) -> None:
    """Older transformers wrote into tokenizer_config.json where they had loaded it from."""
    settings = rooms(tmp_path, {"name_or_path": str(tmp_path), "eos_token": "</s>"}, kind)
    build_model_repo.build_model_repo(settings)
    files = {path: path.read_text() for path in settings.output.rglob("*") if path.is_file()}
    named = [str(path) for path, text in files.items() if any(part in text for part in (str(tmp_path), str(ROOT)))]
    assert named == []
    code = {path.parent.parent.name for path in settings.output.glob("*/1/*.py")}
    assert code == {"ensemble", "preprocessing", "postprocessing", "tensorrt_llm_bls"} | (
        {"tensorrt_llm"} if kind == "torch" else set()
    )
    assert all(
        (settings.output / model / "1").is_dir() and any((settings.output / model / "1").iterdir())
        for model in TEMPLATES
    )
    kept = json.loads((settings.output / build_model_repo.TOKENIZER / "tokenizer_config.json").read_text())
    assert kept == {"eos_token": "</s>"}


def test_every_filled_file_names_its_template(tmp_path: Path) -> None:
    settings = rooms(tmp_path, {})
    build_model_repo.build_model_repo(settings)
    first: list[str] = [path.read_text().split("\n")[0] for path in settings.output.glob("*/config.pbtxt")]
    assert len(first) == 5
    assert all(line.startswith("# Filled from model_repo_template/") for line in first)


def test_a_model_without_its_tokenizers_config_is_a_report(tmp_path: Path) -> None:
    with pytest.raises(reports.Problem) as problem:
        build_model_repo.build_model_repo(rooms(tmp_path, None))
    assert "tokenizer_config.json" in problem.value.where
    assert not (tmp_path / "model_repo").exists()


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("lacking", ["gpt_attention_plugin", "remove_input_padding", "paged_kv_cache"])
def test_in_flight_batching_is_not_promised_of_engines_without_its_plugins(version: str, lacking: str) -> None:
    with pytest.raises(reports.Problem) as problem:
        render(version, "tensorrt", plugins={lacking: None})
    assert lacking in problem.value.report() and "make engines" in problem.value.report()


@pytest.mark.parametrize("version", VERSIONS)
def test_kv_cache_reuse_needs_paged_context_fmha(version: str) -> None:
    with pytest.raises(reports.Problem) as problem:
        render(version, "tensorrt", kv_reuse=True, plugins={"use_paged_context_fmha": False})
    assert "use_paged_context_fmha" in problem.value.report() and "KV_REUSE=off" in problem.value.report()
    configs = parsed(render(version, "tensorrt", kv_reuse=True, plugins={"use_paged_context_fmha": True}))
    assert configs["tensorrt_llm"].parameters["enable_kv_cache_reuse"].string_value == "true"
    assert (
        parsed(render(version, "tensorrt"))["tensorrt_llm"].parameters["enable_kv_cache_reuse"].string_value == "false"
    )
