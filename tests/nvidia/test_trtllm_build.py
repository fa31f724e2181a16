"""The version's own parser takes every command line for trtllm-build,
and no default that versions differ in is left open."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from scripts import reports
from scripts.nvidia import contracts, gpus, trtllm_build
from scripts.nvidia.trtllm_build import Intent

VERSIONS = contracts.versions()
AMPERE = Intent("float16", 2, 1, 8.0, 8, 1024, 3072, 4096, timing_cache="model.cache")
OLD, VOLTA_LAST, NEW = "0.8.0", "0.14.0", VERSIONS[-1]


FLAGS = {version: contracts.flags("trtllm-build", version) for version in VERSIONS}
PARSERS = {version: contracts.flag_parser("trtllm-build", flags) for version, flags in FLAGS.items()}


def command(version: str, intent: Intent) -> list[str]:
    return trtllm_build.argv(intent, FLAGS[version], "checkpoint", "engines")


def said(version: str, intent: Intent) -> dict[str, Any]:
    """What the version's parser understands of the command line."""
    return vars(PARSERS[version].parse_args(command(version, intent)[1:]))


@pytest.mark.parametrize("version", VERSIONS)
def test_every_command_line_is_taken_by_the_versions_own_parser(version: str) -> None:
    for dtype, (tp, pp), capability, quant, shared, (batch, inp, seq), workers in itertools.product(
        ("float16", "bfloat16", "float32"),
        ((1, 1), (2, 1), (8, 1), (2, 2)),
        (7.0, 9.0),
        (None, "FP8", "W4A16_AWQ"),
        (False, True),
        ((1, 1, 2), (64, 2048, 4096)),
        (1, 4),
    ):
        intent = Intent(dtype, tp, pp, capability, batch, inp, seq, 8192, shared, quant, workers, "model.cache")
        understood = said(version, intent)
        assert understood["gpt_attention_plugin"] == understood["gemm_plugin"] == dtype
        assert understood["max_batch_size"] == batch and understood["max_input_len"] == inp
        assert understood.get("max_seq_len", inp + understood.get("max_output_len", 0)) == seq
        assert understood["max_beam_width"] == 1 and understood["workers"] == workers


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    "wrong", [["--max_batch"], ["--gemm_plugin", "float61"], ["--max_batch_size", "many"], ["--paged"]]
)
def test_the_parser_that_judges_refuses_what_the_real_one_refuses(version: str, wrong: list[str]) -> None:
    with pytest.raises(SystemExit):
        PARSERS[version].parse_args([*command(version, AMPERE)[1:], *wrong])


def differing() -> list[tuple[str, str]]:
    """(flag, version) for every flag that two supported versions have with different defaults."""
    found = []
    for flag in sorted(set().union(*FLAGS.values())):
        defaults = {str(table[flag]["default"] or None) for table in FLAGS.values() if flag in table}
        if len(defaults) > 1:
            found += [(flag, version) for version, table in FLAGS.items() if flag in table]
    return found


def test_flags_are_known_to_differ() -> None:
    known = {"--max_batch_size", "--max_num_tokens", "--tokens_per_block", "--gemm_plugin", "--use_paged_context_fmha"}
    assert known < {flag for flag, _ in differing()}


@pytest.mark.parametrize("flag, version", differing())
def test_no_version_decides_by_a_default_that_another_has_otherwise(flag: str, version: str) -> None:
    if FLAGS[version][flag]["type"].startswith(
        "flag"
    ):  # a switch is said by leaving it away; that it was thought of shows here
        assert flag[2:] in trtllm_build.wishes(AMPERE, FLAGS[version])
    else:
        newer = f"--{trtllm_build.SUPERSEDED.get(flag[2:])}"
        assert (newer if newer in FLAGS[version] else flag) in command(version, AMPERE)


def test_the_command_lines_for_llama_2_on_two_gpus_read_so() -> None:
    same = "trtllm-build --checkpoint_dir checkpoint --output_dir engines --max_batch_size 8 --max_input_len 1024"
    plugins = "--max_num_tokens 4096 --max_beam_width 1 --gpt_attention_plugin float16 --gemm_plugin float16 --remove_input_padding enable"
    assert " ".join(command(OLD, replace(AMPERE, capability=7.0, custom_all_reduce=True))) == (
        f"{same} --max_output_len 2048 {plugins} --paged_kv_cache enable --tokens_per_block 64 "
        "--bert_attention_plugin float16 --lookup_plugin disable --lora_plugin disable --context_fmha enable "
        "--context_fmha_fp32_acc disable --attention_qk_half_accumulation disable --use_context_fmha_for_generation "
        "disable --use_paged_context_fmha disable --enable_xqa enable --multi_block_mode disable "
        "--use_custom_all_reduce enable --workers 1 --log_level info"
    )
    assert " ".join(command(VOLTA_LAST, replace(AMPERE, capability=7.0))) == (
        f"{same} --max_seq_len 3072 {plugins} --kv_cache_type paged --tokens_per_block 64 --nccl_plugin auto "
        "--bert_attention_plugin auto --lookup_plugin disable --lora_plugin disable --context_fmha enable "
        "--use_paged_context_fmha disable --use_fp8_context_fmha disable --enable_xqa enable --use_fused_mlp enable "
        "--reduce_fusion disable --multiple_profiles disable --input_timing_cache model.cache --output_timing_cache "
        "model.cache --workers 1 --log_level info"
    )
    assert " ".join(command(NEW, AMPERE)) == (
        f"{same} --max_seq_len 3072 {plugins} --kv_cache_type paged --tokens_per_block 64 --nccl_plugin auto "
        "--bert_attention_plugin auto --lora_plugin disable --context_fmha enable --use_paged_context_fmha enable "
        "--use_fp8_context_fmha disable --use_fused_mlp enable --reduce_fusion disable --user_buffer disable "
        "--multiple_profiles disable --input_timing_cache model.cache --output_timing_cache model.cache --workers 1 "
        "--log_level info"
    )


@pytest.mark.parametrize("version", VERSIONS)
def test_dead_and_superseded_flags_are_not_used(version: str) -> None:
    words = command(version, AMPERE)
    assert "--timing_cache" not in words
    assert ("--paged_kv_cache" in words) != ("--kv_cache_type" in words)
    assert ("--max_output_len" in words) != ("--max_seq_len" in words)


def test_custom_all_reduce_is_asked_for_only_between_ranks_that_reach_each_other() -> None:
    assert said(OLD, replace(AMPERE, custom_all_reduce=True))["use_custom_all_reduce"] == "enable"
    assert said(OLD, AMPERE)["use_custom_all_reduce"] == "disable"
    assert (
        said(OLD, replace(AMPERE, tp_size=1, pp_size=2, custom_all_reduce=True))["use_custom_all_reduce"] == "disable"
    )


@pytest.mark.parametrize("version", VERSIONS)
def test_volta_and_float32_get_no_attention_that_they_cannot_run(version: str) -> None:
    assert said(version, replace(AMPERE, capability=7.0))["use_paged_context_fmha"] == "disable"
    assert said(version, replace(AMPERE, capability=7.0)).get("context_fmha_fp32_acc", "disable") == "disable"
    single = said(version, replace(AMPERE, dtype="float32"))
    assert single["context_fmha"] == single["use_paged_context_fmha"] == "disable"


def test_fp8_is_strongly_typed_where_that_can_be_chosen() -> None:
    assert said(OLD, replace(AMPERE, quant_algo="FP8"))["strongly_typed"] is True
    assert said(OLD, AMPERE)["strongly_typed"] is False


def test_a_word_that_the_version_lacks_is_a_fault_of_ours() -> None:
    with pytest.raises(ValueError, match="float16.*not int8"):
        contracts.spell(FLAGS[OLD]["--gemm_plugin"], "int8")


def test_workers_are_as_many_as_memory_gpus_and_ranks_allow() -> None:
    seven_b_half = 6_869_753_856  # rank file of Llama-2-7B, float16, TP=2 (docker/contracts/rank-tensors)
    # one needs 3 x 6.87 + 3 = 23.6 GB; four fifths of 64 GB are 51 GB
    assert trtllm_build.workers_that_fit(2, 2, seven_b_half, 64 * 10**9) == 2
    assert trtllm_build.workers_that_fit(2, 1, seven_b_half, 64 * 10**9) == 1
    assert trtllm_build.workers_that_fit(2, 8, seven_b_half, 48 * 10**9) == 1
    assert trtllm_build.workers_that_fit(2, 8, seven_b_half, 1 * 10**9) == 1
    assert trtllm_build.workers_that_fit(8, 8, seven_b_half, 2000 * 10**9) == 8


def refused(gpu: str, version: str, dtype: str = "float16", quant: str | None = None) -> reports.Problem | None:
    toolchains = {name: contracts.toolchain(name) for name in VERSIONS}
    return trtllm_build.refusal(gpus.assumed(gpu)[0], dtype, quant, version, toolchains)


@pytest.mark.parametrize(
    "gpu, version, dtype, quant, seen, command",
    [
        ("V100-SXM2-16GB", NEW, "float16", None, ("7.0", NEW), f"TOOLCHAIN={VOLTA_LAST}"),
        ("B200", VOLTA_LAST, "float16", None, ("10.0", VOLTA_LAST), f"TOOLCHAIN={NEW}"),
        ("V100-SXM2-16GB", VOLTA_LAST, "bfloat16", None, ("bfloat16", "8.0", "7.0"), "DTYPE=float16"),
        ("V100-SXM2-16GB", OLD, "float16", "W4A16_AWQ", ("AWQ", "8.0", "7.0"), "QUANT="),
        ("V100-SXM2-16GB", OLD, "float16", "W8A8_SQ_PER_CHANNEL", ("SmoothQuant", "7.0"), "QUANT="),
        ("A100-80GB", NEW, "bfloat16", "FP8", ("FP8", "8.9", "8.0"), "QUANT="),
        ("T4", VOLTA_LAST, "float16", None, ("7.5",), "ENGINE=torch"),
    ],
)
def test_what_a_gpu_cannot_do_is_refused_with_both_values(
    gpu: str, version: str, dtype: str, quant: str | None, seen: tuple[str, ...], command: str
) -> None:
    problem = refused(gpu, version, dtype, quant)
    assert problem is not None and command in problem.command
    assert not [word for word in seen if word not in problem.report()]


@pytest.mark.parametrize(
    "gpu, version, dtype, quant",
    [
        ("V100-SXM2-16GB", OLD, "float16", None),
        ("V100-SXM2-16GB", VOLTA_LAST, "float32", "W8A16"),
        ("A100-80GB", NEW, "bfloat16", "W4A16_AWQ"),
        ("H100-80GB", OLD, "bfloat16", "FP8"),
        ("L4", NEW, "float16", "FP8"),
    ],
)
def test_what_a_gpu_can_do_is_not_refused(gpu: str, version: str, dtype: str, quant: str | None) -> None:
    assert refused(gpu, version, dtype, quant) is None


@pytest.mark.parametrize(
    "status, line, title, command",
    [
        (
            1,
            "[TRT] [E] 2: [virtualMemoryBuffer.cpp::resizePhysical::140] Error Code 2: OutOfMemory",
            "GPU",
            "MAX_NUM_TOKENS=2048",
        ),
        (1, "torch.cuda.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", "GPU", "MAX_BATCH_SIZE=4"),
        (-9, "", "memory ran out", "TP=4"),
        (1, "numpy.core._exceptions.MemoryError: Unable to allocate", "host", "TP=4"),
        (
            1,
            "[E] 6: Version tag does not match. Note: Current Version: 228, Serialized: 226",
            "TensorRT are mixed",
            "make engines",
        ),
        (1, "RuntimeError: Found no NVIDIA driver on your system.", "gave it no GPU", "make doctor"),
        (2, "trtllm-build: error: unrecognized arguments: --use_xqa", "docker/contracts/trtllm-build", "make engines"),
        (1, "RuntimeError: Provided but not expected tensors: {'rotary_inv_freq'}", "checkpoint", "make checkpoint"),
        (1, "OSError: [Errno 28] No space left on device", "disk", "make doctor"),
        (1, "AssertionError: something new", "none of the reasons that we know", "make engines"),
    ],
)
def test_a_failure_that_is_known_is_named(status: int, line: str, title: str, command: str) -> None:
    log = ["[TRT-LLM] [I] Set dtype to float16.", line, "Traceback (most recent call last):"]
    problem = trtllm_build.failure(Path("trtllm-build.log"), status, log, AMPERE)
    assert title in problem.report() and command in problem.command
    assert line in problem.report()


def test_the_last_known_words_of_a_log_count_not_a_warning_before() -> None:
    log = ["[W] Version tag does not match", "CUDA out of memory", "done"]
    assert "enough memory" in trtllm_build.cause_of(1, log).means


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    "part, key, value, what",
    [
        ("build_config", "max_batch_size", 4, "max_batch_size"),
        ("build_config", "max_input_len", 512, "max_input_len"),
        ("build_config", "max_num_tokens", 512, "max_num_tokens"),
        ("pretrained_config", "dtype", "float32", "dtype"),
        ("pretrained_config", "mapping", {"tp_size": 1, "pp_size": 2}, "tp_size"),
        ("pretrained_config", "quantization", {"quant_algo": "FP8"}, "quant_algo"),
    ],
)
def test_an_engine_that_is_not_as_asked_is_noticed(version: str, part: str, key: str, value: Any, what: str) -> None:
    built_by = contracts.reported(version)
    config = contracts.table("engine-config", version)  # batch 8, input 1024, 2048 in all, 8192 tokens, TP=2
    asked = replace(AMPERE, max_seq_len=2048, max_num_tokens=8192)
    assert trtllm_build.difference(config, asked, built_by) is None
    # upstream raises it to a block and cuts it to a full batch (8 x 1024)
    assert trtllm_build.difference(config, replace(asked, max_num_tokens=10_000), built_by) is None
    config[part][key] = value
    found = trtllm_build.difference(config, asked, built_by)
    assert found is not None and found[0] == what and found[1] != found[2]
    other = trtllm_build.difference(contracts.table("engine-config", version), asked, "0.9.0")
    assert other == ("version", "0.9.0", built_by)
