"""make plan and its arithmetic: bytes agree with upstream's tables and users' measurements,
verdicts with arithmetic by hand."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from project import ROOT, make
from stand_ins import nvidia_smi, on_path

from scripts import plan, reports, settings
from scripts.making.journey import name_of
from scripts.nvidia import contracts, gpus, memory, trtllm_build
from scripts.weights import split
from scripts.weights.shape import LlamaShape, params_of

GB, MIB = 10**9, 1 << 20
V100S, A100S, H100S, H200S = "4x V100-SXM2-16GB", "2x A100-80GB", "2x H100-80GB", "8x H200-141GB"
OLDEST, LAST_FOR_VOLTA, *_, NEWEST = contracts.versions()
# as models/llama-2-*.mk and the Makefile set them
PRESET = {
    "ENGINE": "tensorrt",
    "TP": "2",
    "DTYPE": "float16",
    "CONTEXT": "4096",
    "MAX_SEQ_LEN": "4096",
    "MAX_BATCH_SIZE": "8",
    "TOOLCHAIN": "",
    **{name: settings.BY_NAME[name].default for name in ("HOST", "HTTP_PORT", "GRPC_PORT", "METRICS_PORT")},
}


def choice(**changed: str) -> plan.Choice:
    model = changed.get("MODEL", "llama-2-7b")
    return plan.Choice({**PRESET, "MODEL": model, "WEIGHTS": f"weights/{model}", **changed})


def planned(**changed: str) -> plan.Journey:
    asked = choice(**changed)
    return plan.journey_of(asked, plan.model_of(asked), plan.gpus_of(asked))


def preset_shape(model: str) -> LlamaShape:
    params = params_of(json.loads(plan.SHAPES.read_text())[model], plan.SHAPES)
    return params.shape(params.vocab_size or 0)


def engine(shape: LlamaShape, tp_size: int = 1, **changed: Any) -> memory.Engine:
    """float16, batch 8, prompts of 2048 tokens in texts of 4096, steps of 8192."""
    asked = {"max_batch_size": 8, "max_input_len": 2048, "max_seq_len": 4096, "max_num_tokens": 8192, **changed}
    return memory.Engine(shape, asked.pop("dtype", "float16"), tp_size, **asked)


# what a laptop has: neither docker nor nvidia-smi, and no Python before a test puts one there
PROGRAMS = "make bash cat realpath sha256sum sed sort find head tail tr cut grep awk env mkdir dirname id paste wc"

# --- bytes ---


def test_the_presets_have_their_published_number_of_parameters() -> None:
    counts = {model: memory.parameters(preset_shape(model)) for model in json.loads(plan.SHAPES.read_text())}
    assert counts["llama-2-7b"] == counts["llama-2-7b-chat"] == 6_738_415_616
    assert counts["llama-2-13b"] == counts["llama-2-13b-chat"] == 13_015_864_320
    assert counts["llama-2-70b"] == counts["llama-2-70b-chat"] == 68_976_648_192
    assert (
        counts["smollm2-135m"] == 134_515_008 + 49152 * 576
    )  # its output layer is its embedding; a checkpoint has both
    assert {*counts, "stories"} == {path.stem for path in (ROOT / "models").glob("*.mk")}


def test_rank_files_have_the_bytes_of_upstreams_table() -> None:
    rows = json.loads((ROOT / "docker/contracts/rank-tensors/v0.8.0.json").read_text())
    for row, model in zip(rows, ("llama-2-7b", "llama-2-13b", "llama-2-70b"), strict=True):
        assert memory.stage_bytes(engine(preset_shape(model), row["tp"])) == [row["payload_bytes_fp16"]]


@pytest.mark.parametrize("tp_size", [1, 2, 3, 6, 12])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_rank_files_have_the_bytes_that_checkpoint_writes(tp_size: int, dtype: str) -> None:
    shape = LlamaShape(
        hidden_size=96, intermediate_size=132, n_layers=5, n_heads=12, n_kv_heads=6 if tp_size == 12 else 3 * 2, vocab_size=101
    )  # fmt: skip
    tensors = split.rank_tensors(shape, tp_size, 0).values()
    item = memory.ITEM_BYTES[dtype]
    assert memory.stage_bytes(engine(shape, tp_size, dtype=dtype)) == [sum(math.prod(t.shape) for t in tensors) * item]


def test_pipeline_stages_share_the_layers_and_keep_the_ends() -> None:
    shape = preset_shape("llama-2-7b")
    (whole,) = memory.stage_bytes(engine(shape, 2))
    first, second, third, last = memory.stage_bytes(engine(shape, 2, pp_size=4))
    assert first + second + third + last == whole
    # embedding: 32000 x 4096 x 2 bytes; lm_head: half of that at TP=2, and one norm
    assert second == third == first - 262_144_000 == last - 131_072_000 - 8192


def test_quantized_weights_leave_embedding_and_head() -> None:
    shape = preset_shape("llama-2-7b")
    # 6476005376 numbers in linear layers, 262144000 in embedding and head, 65 norms of 4096
    ends = 2 * (262_144_000 + 65 * 4096)
    assert memory.stage_bytes(engine(shape, quant="fp8")) == [6_476_005_376 + ends]
    assert memory.stage_bytes(engine(shape, quant="int4_awq")) == [int(6_476_005_376 * (0.5 + 2 / 128)) + ends]
    for quant in ("int8_wo", "sq"):  # and some scales
        assert 0 < memory.stage_bytes(engine(shape, quant=quant))[0] - 6_476_005_376 - ends < 10_000_000


def test_kv_cache_of_a_token() -> None:
    """2 x layers x heads of the rank x 128 x 2 bytes; a head that several ranks need lies on each."""
    seven, seventy = preset_shape("llama-2-7b"), preset_shape("llama-2-70b")
    assert [memory.kv_bytes_per_token(engine(seven, tp)) for tp in (1, 2, 4)] == [524_288, 262_144, 131_072]
    assert [memory.kv_bytes_per_token(engine(seventy, tp)) for tp in (1, 8, 16)] == [327_680, 40_960, 40_960]
    assert memory.kv_bytes_per_token(engine(seven, 2, pp_size=2)) == 131_072


# --- held against what was measured: memory.md of TensorRT-LLM (Llama-2-7B in FP8, H100),
# its issue 1188 (Qwen2.5-0.5B, A4000) ---

QWEN = LlamaShape(hidden_size=896, intermediate_size=4864, n_layers=24, n_heads=14, n_kv_heads=2, vocab_size=151_936)


@pytest.mark.parametrize(
    ("shape", "limits", "measured_mib"),
    [
        (QWEN, {"max_num_tokens": 8192, "max_batch_size": 2048}, 773.51),
        (QWEN, {"max_num_tokens": 512, "max_batch_size": 1}, 43.26),
        (preset_shape("llama-2-7b"), {"max_num_tokens": 8192, "max_batch_size": 256}, 1134.01),
    ],
    ids=["qwen-8192", "qwen-512", "llama-8192"],
)
def test_measured_activations_lie_between_the_bounds(
    shape: LlamaShape, limits: dict[str, int], measured_mib: float
) -> None:
    least, most = memory.activation_bytes(engine(shape, **limits))
    assert least <= measured_mib * MIB <= most


def test_the_measured_log_of_a_7b_on_an_h100_comes_out() -> None:
    """6695 MiB of engine, 259840 tokens of FP8 KV cache at a fraction of 0.9, blocks of 64 tokens."""
    asked = engine(preset_shape("llama-2-7b"), quant="fp8", max_batch_size=256)
    fit = memory.fit(asked, int(79.10 * 1024 * MIB), 64)
    assert fit.weights_bytes == pytest.approx(6695 * MIB, rel=0.01)
    fit = dataclasses.replace(fit, kv_bytes_per_token=fit.kv_bytes_per_token // 2, kv_fraction=0.9)
    least, most = fit.kv_tokens
    assert least <= 259_840 <= most and most - least < 0.03 * most


def test_measured_buffers_for_sampling() -> None:
    for batch, vocab_size, measured in ((2048, 151_936, 2.66e9 + 5.76e9), (256, 32_000, 43.29e6 + 180.30e6)):
        assert memory.SAMPLING_COPIES * batch * vocab_size * 4 == pytest.approx(measured, rel=0.05)


# --- the grid ---

# GPU memory is nvidia-smi's: V100 16.94, A100 85.90, H100 85.52, H200 150.76 GB. Weights of a rank at TP 1, 2, 4, 8 in
# GB: 7B 13.48 6.87 3.57 1.91, 13B 26.03 13.18 6.75 3.54, 70B 137.95 69.24 34.88 17.71. The rest (steps of 8192 tokens,
# CUDA, NCCL, sampling) is 1.0 to 2.2 GB for 7B. A text of 4096 tokens takes 4096 x 524288 = 2.15 GB for 7B, 3.36 for
# 13B, 1.34 for 70B, over TP, and 85 % of what is left holds it or not:
#   7B  V100 TP 1: 16.94 - 13.48 - (0.49 + 0.51) = 2.47 at best, x 0.85 = 2.10 < 2.15: no. TP 2: 16.94 - 6.87 - 2.17 at
# worst, x 0.85 = 6.7. 13B V100 TP 1: 26 > 16.9. TP 2: at best 16.94 - 13.18 - 1.00 = 2.76 x 0.85 = 2.35, at worst 16.94
# - 13.18 - 2.39 = 1.38 x 0.85 = 1.17; needed 1.68: tight. TP 4: 16.94 - 6.75 - 2.13 = 8.06 x 0.85 = 6.85 against 0.84:
# fits. 70B V100: 34.88 at TP 4 > 16.94. A100, H100 TP 1: 137.95 > 85.9. TP 2: 85.52 - 69.24 - 3.09 = 13.19 x 0.85 =
# 11.2 against 0.67: fits. H200 TP 1: 150.76 - 137.95 - 3.54 = 9.27 x 0.85 = 7.9 against 1.34: fits.
NO, FEW = "does not fit", "more ranks than GPUs"
GRID: dict[tuple[str, str], list[str]] = {
    ("llama-2-7b", V100S): ["no", "fits", "fits", "few"],
    ("llama-2-7b", A100S): ["fits", "fits", "few", "few"],
    ("llama-2-7b", H100S): ["fits", "fits", "few", "few"],
    ("llama-2-7b", H200S): ["fits", "fits", "fits", "fits"],
    ("llama-2-13b-chat", V100S): ["no", "tight", "fits", "few"],
    ("llama-2-13b-chat", A100S): ["fits", "fits", "few", "few"],
    ("llama-2-13b-chat", H100S): ["fits", "fits", "few", "few"],
    ("llama-2-13b-chat", H200S): ["fits", "fits", "fits", "fits"],
    ("llama-2-70b", V100S): ["no", "no", "no", "few"],
    ("llama-2-70b", A100S): ["no", "fits", "few", "few"],
    ("llama-2-70b", H100S): ["no", "fits", "few", "few"],
    ("llama-2-70b", H200S): ["fits", "fits", "fits", "fits"],
}


@pytest.mark.parametrize(("model", "gpu"), GRID, ids="-".join)
def test_what_fits_and_what_does_not(model: str, gpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    verdicts = []
    for tp_size in ("1", "2", "4", "8"):
        typed = {"MODEL": model, "TP": tp_size, "ENGINE": "tensorrt", "ASSUME_GPU": gpu}
        monkeypatch.setenv("BAKE_SETTINGS", "\n".join(f"{name}={value}" for name, value in typed.items()))
        try:
            journey = planned(**typed)
            assert journey.fit and journey.toolchain == (LAST_FOR_VOLTA if gpu == V100S else NEWEST)
            verdicts.append(journey.fit.verdict)
        except reports.Problem as problem:
            verdicts.append({f"{model} {NO}": "no", FEW: "few"}[problem.title])
            assert_mended(problem.command, MODEL=model)
    assert verdicts == GRID[model, gpu]


def assert_mended(command: str, **kept: str) -> None:
    """The command that a refusal ends in is a plan that is not refused for the same reason: more ranks,
    or something that fits."""
    words = shlex.split(command)
    assert words[:2] == ["make", "plan"]
    changed = dict(word.split("=", 1) for word in words[2:])
    try:
        journey = planned(**{**kept, **changed})
        assert journey.fit and journey.fit.verdict != "no"
    except reports.Problem as problem:
        # fewer ranks that exist may still be too small; that report's own command then fits
        assert problem.title.endswith(NO)
        assert_mended(problem.command, **kept)


def test_batch_is_what_the_kv_cache_holds_at_worst() -> None:
    fit = planned(ASSUME_GPU=V100S).fit
    assert fit and fit.kv_tokens[0] // 4096 == fit.batch == 6
    roomy = planned(ASSUME_GPU=A100S).fit
    assert roomy and roomy.batch == 8  # never more than MAX_BATCH_SIZE


# --- refusals: the reason and both values ---


@pytest.mark.parametrize(
    ("changed", "title", "seen"),
    [
        ({"ASSUME_GPU": V100S, "TOOLCHAIN": NEWEST}, "TensorRT-LLM does not run on this GPU", ["7.0", "8.0", NEWEST]),
        ({"ASSUME_GPU": V100S, "DTYPE": "bfloat16"}, "bfloat16 does not run on this GPU", ["7.0", "8.0"]),
        ({"ASSUME_GPU": V100S, "KV_REUSE": "on"}, "KV cache reuse does not run on this GPU", ["7.0", "8.0"]),
        ({"ASSUME_GPU": A100S, "QUANT": "fp8"}, "FP8 does not run on this GPU", ["8.0", "8.9"]),
        ({"ASSUME_GPU": V100S, "QUANT": "int4_awq"}, "W4A16_AWQ does not run on this GPU", ["7.0", "8.0"]),
        ({"ASSUME_GPU": A100S, "TP": "1", "PP": "4"}, "more ranks than GPUs", ["4 ranks", "2 (2x A100-80GB)"]),
        ({"ASSUME_GPU": A100S, "TP": "3"}, "3 ranks cannot share this model", ["TP is 3", "heads is 32"]),
        ({"ASSUME_GPU": A100S, "PP": "5"}, "PP does not divide the layers", ["PP is 5", "32 layers"]),
        (
            {"ASSUME_GPU": H100S, "QUANT": "fp8", "TOOLCHAIN": "0.8.0"},
            "QUANT=fp8 is not possible with TensorRT-LLM 0.8.0",
            ["nvidia-ammo"],
        ),
        ({"ASSUME_GPU": "", "QUANT": "int4_awq", "TOOLCHAIN": "0.8.0"}, "QUANT=int4_awq is not possible with TensorRT-LLM 0.8.0",
         ["nvidia-ammo"]),
        ({"ASSUME_GPU": V100S, "MAX_NUM_TOKENS": "512"}, "MAX_NUM_TOKENS is too small", ["512", "2048"]),
        ({"ASSUME_GPU": H100S, "QUANT": "fp8", "DTYPE": "float32"}, "DTYPE cannot be float32", ["float32", "QUANT=fp8"]),
        ({"ASSUME_GPU": A100S, "QUANT": "fp4"}, "QUANT cannot be fp4", ["fp4", "int8_wo"]),
        ({"ASSUME_GPU": A100S, "MAX_SEQ_LEN": "5000"}, "MAX_SEQ_LEN is too large", ["5000", "4096"]),
        ({"ASSUME_GPU": "2x X100"}, "no such GPU", ["X100"]),
        ({"ASSUME_GPU": V100S, "TP": "1"}, "llama-2-7b does not fit", ["15.8 GiB", "12.6 GiB", "2048 to 3968 tokens", "4096"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_what_cannot_work_is_refused(changed: dict[str, str], title: str, seen: Sequence[str]) -> None:
    with pytest.raises(reports.Problem) as raised:
        planned(**changed)
    assert raised.value.title == title
    assert all(value in raised.value.report() for value in seen), raised.value.report()
    assert raised.value.command.startswith("make ")


def test_fp8_runs_from_ada_on_and_bfloat16_from_ampere_on() -> None:
    assert planned(ASSUME_GPU=H100S, QUANT="fp8").fit
    assert planned(ASSUME_GPU=A100S, DTYPE="bfloat16").fit


def test_where_more_ranks_do_not_help_shorter_texts_or_fewer_bytes_do() -> None:
    def advice(**changed: str) -> str:
        with pytest.raises(reports.Problem) as raised:
            planned(**changed)
        assert_mended(raised.value.command, **changed)
        return raised.value.command

    assert "MAX_SEQ_LEN=2048" in advice(ASSUME_GPU="1x V100-SXM2-16GB", TP="1")
    assert "QUANT=int8_wo" in advice(ASSUME_GPU="1x L4", MODEL="llama-2-13b", TP="1")
    assert "ASSUME_GPU" in advice(ASSUME_GPU="1x L4", MODEL="llama-2-70b", TP="1")


# --- the page ---


def test_the_page_tells_rooms_bytes_commands_and_what_nvidias_programs_are_told() -> None:
    assert ", no streaming, on 4x V100" in plan.words(planned(ASSUME_GPU=V100S, STREAMING="off"))
    page = plan.words(planned(ASSUME_GPU=V100S))
    assert "no streaming" not in page
    lines = page.splitlines()
    assert lines[0] == f"llama-2-7b by TensorRT-LLM {LAST_FOR_VOLTA} in float16, TP 2, on 4x V100-SXM2-16GB (assumed)"
    rooms = {line.split()[0]: line.split() for line in lines[3:] if line}
    assert rooms["hf"][1:5] == ["13.5", "GB", "1.1", "GB"]
    assert rooms["checkpoint"][1:3] == rooms["engines"][1:3] == ["13.7", "GB"]  # 2 x 6.87
    assert rooms["engines"][3:5] == ["23.6", "GB"]  # 3 x 6.87 + 3
    assert contracts.toolchain(LAST_FOR_VOLTA)["image"] in rooms["toolchain"]
    assert "make engines" in page and "Fits: 6 requests of MAX_SEQ_LEN 4096" in page
    assert max(map(len, lines)) <= 140


@pytest.mark.parametrize("version", contracts.versions())
def test_the_command_lines_are_taken_by_that_versions_parser(version: str) -> None:
    programs = plan.programs(planned(ASSUME_GPU=H100S, TOOLCHAIN=version))
    parser = contracts.flag_parser("trtllm-build", contracts.flags("trtllm-build", version))
    asked = parser.parse_args(programs["engines"][1:])
    assert (asked.max_batch_size, asked.max_input_len, asked.max_num_tokens) == (8, 2048, 8192)
    assert programs["serve"].count("--model-repository=model_repo") == 2


def test_stages_and_quantization_change_the_hungriest_rooms() -> None:
    staged = {row.room: row for row in plan.rows(planned(ASSUME_GPU=H100S, TP="1", PP="2"))}
    # the first stage: 16 layers of 404766720 bytes and the embedding; 3 x 6.74 + 3 GB
    assert staged["engines"].host_memory_bytes == 3 * (16 * 404_766_720 + 262_144_000 + 8192) + 3_000_000_000
    quantized = {row.room: row for row in plan.rows(planned(ASSUME_GPU=H100S, QUANT="fp8"))}
    assert (
        quantized["checkpoint"].disk_bytes == quantized["engines"].disk_bytes
        and quantized["checkpoint"].time == "not known"
    )
    assert (quantized["checkpoint"].host_memory_bytes or 0) > 13_476_831_232  # the whole model


def test_tight_says_so_and_names_what_is_safe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BAKE_SETTINGS", f"MODEL=llama-2-13b-chat\nENGINE=tensorrt\nASSUME_GPU={V100S}")
    page = plan.words(planned(MODEL="llama-2-13b-chat", ASSUME_GPU=V100S))
    assert "Tight: " in page
    assert "make plan MODEL=llama-2-13b-chat ENGINE=tensorrt ASSUME_GPU='4x V100-SXM2-16GB' TP=4" in page


def test_the_torch_engine_is_planned_for_gpus_and_for_none() -> None:
    on_gpus = planned(ENGINE="torch", ASSUME_GPU=A100S)
    # it takes the whole KV cache at start: 8 x 4096 tokens
    assert on_gpus.fit and on_gpus.fit.needed_tokens == 32_768 and on_gpus.fit.verdict == "fits"
    with pytest.raises(reports.Problem, match="does not fit"):
        planned(ENGINE="torch", ASSUME_GPU="1x V100-SXM2-16GB", TP="1")
    asked = choice(ENGINE="torch")
    on_cpu = plan.journey_of(asked, plan.model_of(asked), [])
    # float32: 2 x (2 x 6.87 GB + 32768 tokens x 2 x 262144)
    programs = (512 + 2 * 384) << 20
    assert plan.serve_bytes(on_cpu) == 2 * (2 * 6_869_753_856 + 32_768 * 524_288) + programs
    assert {row.room: row.disk_bytes for row in plan.rows(on_cpu)}["engines"] == 0  # links


def test_without_a_gpu_the_plan_says_what_a_rank_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "here", list)
    page = plan.words(planned())
    assert "(the GPU will decide)" in page and "weights: 6.4 GiB" in page and "ASSUME_GPU=" in page


def test_several_kinds_of_gpus_are_judged_by_the_smallest_that_is_used() -> None:
    asked = choice()
    mixed = [*gpus.assumed("1x A100-80GB"), *gpus.assumed("1x A100-40GB")]
    journey = plan.journey_of(asked, plan.model_of(asked), mixed)
    assert journey.fit and journey.fit.gpu_bytes == mixed[1].memory_bytes


# --- models that are not presets ---


def test_a_folder_says_its_own_shape(tmp_path: Path) -> None:
    folder = tmp_path / "meta"
    shutil.copytree(ROOT / "models/stories", folder)
    params = json.loads((folder / "params.json").read_text())
    (folder / "params.json").write_text(json.dumps({**params, "vocab_size": -1}))  # as in Meta's Llama 2
    found = plan.model_of(choice(MODEL=str(folder), WEIGHTS=str(folder), CONTEXT=""))
    assert (found.form, found.dtype, found.context) == ("meta", "float16", 4096)
    assert found.shape == LlamaShape(256, 704, 5, 8, 4, 2048)

    config = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 77, "max_position_embeddings": 123, "torch_dtype": "bfloat16",
    }  # fmt: skip
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/config.json").write_text(json.dumps(config))
    found = plan.model_of(choice(MODEL=str(tmp_path / "hf"), WEIGHTS=str(tmp_path / "hf"), CONTEXT=""))
    assert (found.form, found.dtype, found.context) == ("hf", "bfloat16", 123)
    assert found.shape == LlamaShape(64, 96, 3, 4, 2, 77)
    with pytest.raises(reports.Problem, match="no such folder"):
        plan.model_of(choice(MODEL="/nowhere/model", WEIGHTS="/nowhere/model"))


CONFIG = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 77, "max_position_embeddings": 123,
    "torch_dtype": "float32",
}  # fmt: skip


def config_room(folder: Path) -> Path:
    """The room config of a GGUF file, as make leaves it."""
    folder.mkdir(parents=True)
    for name, content in {"config.json": CONFIG, "manifest.json": {}, "args": {}}.items():
        (folder / name).write_text(json.dumps(content))
    return folder


def test_a_gguf_file_has_the_shape_that_the_room_config_says(tmp_path: Path) -> None:
    folder = tmp_path / "small"
    folder.mkdir()
    (folder / "small.gguf").write_bytes(bytes(2_500_000))
    asked = choice(MODEL=str(folder), WEIGHTS=str(folder), CONTEXT="", CONFIG=str(tmp_path / "config"))
    with pytest.raises(reports.NotYet, match="shape is not known yet") as raised:
        plan.model_of(asked)
    assert "small.gguf, 2.5 MB" in raised.value.seen and raised.value.command.startswith("make config")
    config_room(tmp_path / "config")
    found = plan.model_of(asked)
    assert (found.form, found.dtype, found.context, found.stored_bytes) == ("gguf", "float32", 123, 2_500_000)
    assert found.shape == LlamaShape(64, 96, 3, 4, 2, 77)
    preset = choice(MODEL="smollm2-135m", WEIGHTS=str(folder), CONFIG=str(tmp_path / "none"))
    assert plan.model_of(preset).form == "table"  # a preset's shape is known
    (folder / "small.gguf").unlink()  # the room of a model that is gone
    with pytest.raises(reports.Problem, match="no model in this folder"):
        plan.model_of(asked)


# --- as it is typed ---


def files_below(tree: Path) -> list[Path]:
    return sorted(path for path in tree.rglob("*") if "__pycache__" not in path.parts)


@pytest.fixture
def laptop(tmp_path: Path) -> Path:
    """A PATH without docker, GPU or anything that was installed."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for program in PROGRAMS.split():
        (folder / program).symlink_to(shutil.which(program) or f"/usr/bin/{program}")
    return folder


def type_make(tree: Path, path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": str(path), "HOME": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        ["make", *words], cwd=tree, env=environment, capture_output=True, text=True, timeout=60, check=False
    )


def advised(refused: subprocess.CompletedProcess[str]) -> list[str]:
    """The words of the command that a report ends in."""
    return shlex.split(re.findall(r"^    (make .*)$", refused.stderr, re.MULTILINE)[-1])


def test_a_laptop_plans_and_nothing_is_written(own_tree: Path, laptop: Path) -> None:
    # isolated and without site-packages: nothing but the standard library
    on_path(laptop, "python3", f'exec "{sys.executable}" -S "$@"\n')
    before = files_below(own_tree)
    for words in ([], ["MODEL=llama-2-70b", "ENGINE=tensorrt", "TP=2", f"ASSUME_GPU={A100S}"]):
        done = type_make(own_tree, laptop, "plan", *words)
        assert done.returncode == 0 and "checkpoint" in done.stdout, done.stdout + done.stderr
    as_json = json.loads(type_make(own_tree, laptop, "plan", *words, "JSON=1").stdout)
    assert as_json["fit"]["verdict"] == "fits" and as_json["fit"]["weights_bytes"] == 69_240_111_104
    assert as_json["toolchain"] == NEWEST and [room["room"] for room in as_json["rooms"]][1:5] == [
        "weights",
        "config",
        "hf",
        "checkpoint",
    ]
    refused = type_make(own_tree, laptop, "plan", *words, "TP=1")
    assert refused.returncode != 0 and "-- LLAMA-2-70B DOES NOT FIT -" in refused.stderr and not refused.stdout
    slip = type_make(own_tree, laptop, "plan", "MODEL=llama-2-8b")
    assert slip.returncode != 0 and "-- NO MODEL NAMED LLAMA-2-8B -" in slip.stderr
    assert files_below(own_tree) == before


def test_a_folder_with_a_gguf_file_or_nothing_says_what_to_type_next(own_tree: Path, laptop: Path) -> None:
    on_path(laptop, "python3", f'exec "{sys.executable}" -S "$@"\n')
    folder = own_tree / "weights/small"
    folder.mkdir(parents=True)
    words = ["plan", f"MODEL={folder}", "ENGINE=tensorrt", "TP=2", f"ASSUME_GPU={A100S}"]
    empty = type_make(own_tree, laptop, *words)
    assert "-- NO MODEL IN THIS FOLDER -" in empty.stderr and "Here is: none" in empty.stderr
    assert set(advised(empty)) == {"make", "plan", "MODEL=/path/to/folder", *words[2:]}
    (folder / "small.gguf").write_bytes(bytes(2_500_000))
    before = files_below(own_tree)
    unknown = type_make(own_tree, laptop, *words)
    assert unknown.returncode != 0 and "-- THE MODEL'S SHAPE IS NOT KNOWN YET -" in unknown.stderr
    # GPUs that are only assumed make no room, and this one needs none
    assert advised(unknown) == ["make", "config", f"MODEL={folder}"]
    assert files_below(own_tree) == before
    config_room(own_tree / "build" / name_of(str(folder)) / "config")
    done = json.loads(type_make(own_tree, laptop, *words, "JSON=1").stdout)
    assert done["asked"]["shape"]["vocab_size"] == 77 and done["fit"]["verdict"] == "fits"


def test_here_means_what_nvidia_smi_says(own_tree: Path, laptop: Path) -> None:
    on_path(laptop, "python3", f'exec "{sys.executable}" -S "$@"\n')
    nvidia_smi(laptop, ["NVIDIA A100-SXM4-80GB, 81920, 8.0, 550.54.15"] * 2, links="NV12")
    done = type_make(own_tree, laptop, "plan", "MODEL=llama-2-7b", "ENGINE=tensorrt", f"TOOLCHAIN={OLDEST}")
    assert "on 2x NVIDIA A100-SXM4-80GB (here)" in done.stdout, done.stderr
    assert "--use_custom_all_reduce enable" in " ".join(done.stdout.split())


def test_the_fraction_and_the_block_are_those_that_are_served_and_built() -> None:
    source = (ROOT / "scripts/build_model_repo.py").read_text()
    assert f'"kv_cache_free_gpu_mem_fraction": "{memory.KV_FRACTION}"' in source
    fit = planned(ASSUME_GPU=V100S).fit
    assert fit and fit.block_tokens == trtllm_build.TOKENS_PER_BLOCK


def test_plan_as_a_user_types_it_in_a_tree(tree: Path) -> None:
    done = make(tree, "plan")
    assert done.returncode == 0 and done.stdout.startswith("stories by the torch engine in float16, TP 2, on "), (
        done.stderr
    )
    assert os.path.relpath("models/stories") in done.stdout
