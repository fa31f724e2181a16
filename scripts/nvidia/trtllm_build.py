"""The command line of `trtllm-build`: one description of intent is spelled by the flag table of any version.

No version is named here: a flag is used if the version's table (docker/contracts/trtllm-build) has it. If a version has
no flag for something, it either has no choice (XQA in later versions) or decides at run time (multi-block mode in later
versions).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Mapping, Sequence

from scripts import reports
from scripts.limits import limits_of
from scripts.nvidia.contracts import Flags, Wish, spell
from scripts.nvidia.gpus import Gpu

# Tokens of a block of the paged KV cache. Upstream's default was 128 (0.8), 64 (0.10), then 32 (1.x). The attention
# kernels of all these versions take 64, and with one value the arithmetic of memory is the same.
TOKENS_PER_BLOCK = 64
# the lowest compute capability with such kernels: not Volta
PAGED_CONTEXT_FMHA = 8.0
# If a newer flag means the same as an older one, the newer one is used.
SUPERSEDED = {"max_output_len": "max_seq_len", "paged_kv_cache": "kv_cache_type"}
# Host memory of one building process: weights in torch, a copy in numpy, the serialized engine, and the builder's
# libraries (from reading the code of 0.8.0, not measured). A fifth of the memory stays free.
BUILDER_COPIES, BUILDER_BYTES, MEMORY_USED = 3, 3_000_000_000, 0.8


@dataclass(frozen=True)
class Intent:
    """What engines are built for. Lengths in tokens.

    capability: of the GPU that builds and will serve; custom_all_reduce: the ranks' GPUs read each other's memory;
    quant_algo: the checkpoint's word for its quantization ('FP8', 'W8A16', ...), None for none; workers: processes that
    build at the same time; timing_cache: measured kernel times are read from and written to this file,
    if the version can do that.
    """

    dtype: str
    tp_size: int
    pp_size: int
    capability: float
    max_batch_size: int
    max_input_len: int
    max_seq_len: int
    max_num_tokens: int
    custom_all_reduce: bool = False
    quant_algo: str | None = None
    workers: int = 1
    timing_cache: str | None = None

    @property
    def world_size(self) -> int:
        return self.tp_size * self.pp_size


def wishes(intent: Intent, flags: Flags) -> dict[str, Wish]:
    """Every decision, by the name of its flag without dashes. True and False: on and off,
    in any version's spelling; None: leave out.

    All flags whose default differs between supported versions are here, so that no version decides by itself.
    """
    dtype, half = intent.dtype, intent.dtype != "float32"
    several = intent.world_size > 1
    return {
        "max_batch_size": intent.max_batch_size,
        "max_input_len": intent.max_input_len,
        "max_seq_len": intent.max_seq_len,
        "max_output_len": intent.max_seq_len - intent.max_input_len,
        # tokens of one packed step; upstream (0.8 on) raises it to a block and cuts it to a full batch,
        # each with a warning
        "max_num_tokens": max(intent.max_num_tokens, TOKENS_PER_BLOCK),
        "max_beam_width": 1,
        # In-flight batching stands on these four: attention plugin, packed input, paged KV cache, and GEMMs by
        # cuBLASLt, without which builds were seen to ask for excessive GPU memory (TensorRT-LLM #1543).
        "gpt_attention_plugin": dtype,
        "gemm_plugin": dtype,
        "remove_input_padding": True,
        "paged_kv_cache": True,
        "kv_cache_type": "paged",
        "tokens_per_block": TOKENS_PER_BLOCK,
        # 0.8 has no flag for it: it uses NCCL if there is more than one rank
        "nccl_plugin": _auto(flags, "--nccl_plugin", dtype) if several else "disable",
        # parts of other models
        "bert_attention_plugin": _auto(flags, "--bert_attention_plugin", dtype),
        "lookup_plugin": "disable",
        "lora_plugin": "disable",
        # Fused attention is for 16 bits. FP32 accumulation is an assertion failure on Volta (0.8:
        # gptAttentionCommon.cpp).
        "context_fmha": half,
        "context_fmha_fp32_acc": False,
        "attention_qk_half_accumulation": False,
        "use_context_fmha_for_generation": False,
        # KV cache reuse and chunked context need it. It is on in versions whose default is on: 0.8 was seen to answer
        # worse with it (TensorRT-LLM #1216). It is an assertion failure on Volta (fmhaRunner.cpp, #1671).
        "use_paged_context_fmha": half
        and intent.capability >= PAGED_CONTEXT_FMHA
        and _own(flags, "--use_paged_context_fmha"),
        # on by default in 1.x; only FP8 models with an FP8 KV cache gain,
        # and broken outputs were reported (#1539, #2447)
        "use_fp8_context_fmha": False,
        "enable_xqa": True,
        "multi_block_mode": False,
        # one GEMM for gate and up: a switch that is off in 0.8, what every model gets from 0.13 on
        "use_fused_mlp": _own(flags, "--use_fused_mlp"),
        "reduce_fusion": False,
        "user_buffer": False,
        "multiple_profiles": False,
        "use_custom_all_reduce": intent.tp_size > 1 and intent.custom_all_reduce,
        # FP8 needs it in versions that still have the choice (examples/llama/README.md of 0.8)
        "strongly_typed": intent.quant_algo is not None and intent.quant_algo.startswith("FP8"),
        "input_timing_cache": intent.timing_cache,
        "output_timing_cache": intent.timing_cache,
        "workers": intent.workers,
        "log_level": "info",
    }


def argv(intent: Intent, flags: Flags, checkpoint: str, output: str) -> list[str]:
    """The command line of `trtllm-build` for the version whose flag table is given."""
    asked = wishes(intent, flags)
    command = ["trtllm-build", "--checkpoint_dir", checkpoint, "--output_dir", output]
    for name, wish in asked.items():
        if f"--{name}" in flags and f"--{SUPERSEDED.get(name)}" not in flags:
            command += spell(flags[f"--{name}"], wish)
    return command


def workers_that_fit(world_size: int, gpus: int, rank_file_bytes: int, free_bytes: int) -> int:
    """How many ranks are built at the same time:
    each needs its own GPU and BUILDER_COPIES of its rank file in host memory.

    It is one if memory is short: then ranks are built one after another on the first GPU.
    """
    one = BUILDER_COPIES * rank_file_bytes + BUILDER_BYTES
    return max(1, min(world_size, gpus, int(free_bytes * MEMORY_USED) // one))


def _auto(flags: Flags, flag: str, dtype: str) -> str:
    """'auto' (the model's own type) if the version has the word."""
    return "auto" if "auto" in (flags.get(flag, {}).get("choices") or []) else dtype


def _own(flags: Flags, flag: str) -> bool:
    """The version's default, to spell it out."""
    return flags.get(flag, {}).get("default") in (True, "enable")


# --- what cannot work ---

# Compute capability that each needs, and why. Sources: the precision tables of TensorRT-LLM 0.8.0's README (SM70: FP32,
# FP16, INT8 but no SmoothQuant, INT4 but no AWQ, no BF16, no FP8) and of its later support matrix.
NEEDS = {
    "bfloat16": (8.0, "Volta and Turing have no bfloat16 arithmetic."),
    "FP8": (8.9, "FP8 arithmetic came with Ada and Hopper."),
    "W4A16_AWQ": (8.0, "TensorRT-LLM has no AWQ kernels for Volta."),
    "W8A8_SQ": (8.0, "TensorRT-LLM has no SmoothQuant kernels for Volta."),
}


def refusal(
    gpu: Gpu, dtype: str, quant_algo: str | None, version: str, toolchains: Mapping[str, Mapping[str, Any]]
) -> reports.Problem | None:
    """Why engines of this kind cannot be built or run on this GPU by this version; None if nothing speaks against it.

    toolchains: docker/toolchains.json; its `architectures` are the compute capabilities a version has kernels for.
    """
    fitting = [name for name, row in toolchains.items() if gpu.compute_capability in row["architectures"]]
    if version not in fitting:
        return reports.nvidia.gpu_not_in_toolchain(
            version, toolchains[version]["architectures"], gpu.name, gpu.compute_capability, fitting
        )
    for word, change in ((dtype, {"DTYPE": "float16"}), (quant_algo or "", {"QUANT": ""})):
        for kind, (needed, reason) in NEEDS.items():
            if word.startswith(kind) and gpu.capability < needed:
                command = reports.make("engines", **change)
                return reports.nvidia.gpu_cannot(kind, str(needed), gpu.name, gpu.compute_capability, reason, command)
    return None


def no_kv_reuse(gpu: Gpu) -> reports.Problem | None:
    """Why engines for this GPU cannot share the KV cache of requests that begin alike; None if they can."""
    if gpu.capability >= PAGED_CONTEXT_FMHA:
        return None
    reason = "It needs paged-context FMHA, which is an assertion failure there (fmhaRunner.cpp, TensorRT-LLM #1671)."
    command = reports.make("engines", KV_REUSE="off")
    return reports.nvidia.gpu_cannot(
        "KV cache reuse", str(PAGED_CONTEXT_FMHA), gpu.name, gpu.compute_capability, reason, command
    )


# --- what came out ---


def difference(config: Mapping[str, Any], intent: Intent, version: str) -> tuple[str, Any, Any] | None:
    """The first difference between the engines' config.json and the intent: (what, asked, built);
    None if there is none.

    Only values that serving depends on count. Upstream itself may make max_num_tokens larger (a block) or cut it to a
    full batch.
    """
    pretrained, build = config["pretrained_config"], config["build_config"]
    mapping = pretrained["mapping"]
    max_seq_len = limits_of(config).max_seq_len
    least_tokens = min(intent.max_num_tokens, intent.max_batch_size * intent.max_input_len)
    asked_and_built = (
        ("version", version, config.get("version")),
        ("tp_size", intent.tp_size, mapping["tp_size"]),
        ("pp_size", intent.pp_size, mapping["pp_size"]),
        ("dtype", intent.dtype, pretrained["dtype"]),
        ("quant_algo", intent.quant_algo, pretrained["quantization"]["quant_algo"]),
        ("max_batch_size", intent.max_batch_size, build["max_batch_size"]),
        ("max_input_len", intent.max_input_len, build["max_input_len"]),
        ("max_seq_len", intent.max_seq_len, max_seq_len),
        ("max_num_tokens", least_tokens, min(least_tokens, build["max_num_tokens"] or least_tokens)),
    )
    return next((found for found in asked_and_built if found[1] != found[2]), None)


@dataclass(frozen=True)
class Cause:
    """A known reason why trtllm-build fails: how the log shows it, what it means, and the make command that helps.

    halve, double: settings that the command changes.
    """

    shows: str
    means: str
    advice: str
    target: str = "engines"
    halve: Sequence[str] = ()
    double: Sequence[str] = ()


MORE_RANKS = "A rank takes three times its file and 3 GB of host memory; more ranks make each smaller:"
CAUSES = (
    Cause(
        r"[Oo]ut of memory|OutOfMemory|cudaErrorMemoryAllocation|Requested amount of GPU memory",
        "The GPU has not enough memory for building with these limits.",
        "See with nvidia-smi who else uses it, or ask for smaller steps:",
        halve=("MAX_NUM_TOKENS", "MAX_BATCH_SIZE"),
    ),
    Cause(
        r"MemoryError|bad_alloc|Cannot allocate memory",
        "The host has not enough memory for building.",
        MORE_RANKS,
        double=("TP",),
    ),
    Cause(
        r"Version tag does not match|expecting library version|not compatible with this version of TensorRT",
        "Two versions of TensorRT are mixed: the Python package and the library are not of one release.",
        "Use the toolchain's image as it is, and install nothing else in it:",
    ),
    Cause(
        r"no CUDA-capable device|CUDA driver version is insufficient|Found no NVIDIA driver|libcuda\.so\.1|libnvidia-ml\.so\.1",
        "The driver gave it no GPU.",
        "Look at the driver, the GPUs and docker's NVIDIA runtime together:",
        "doctor",
    ),
    Cause(
        r"unrecognized arguments|invalid choice|expected one argument|invalid \w+ value",
        "It does not take a flag that docker/contracts/trtllm-build says it takes: another version is installed, or "
        "the table is wrong.",
        "Compare with trtllm-build --help in the container; with the version that TOOLCHAIN names:",
    ),
    Cause(
        r"Required but not provided tensors|Provided but not (?:expected|required) tensors",
        "The checkpoint's tensors are not those that this version wants.",
        "Make the checkpoint again for this toolchain:",
        "checkpoint",
    ),
    Cause(r"No space left on device", "The disk is full.", "Make room. This says what the journey takes:", "doctor"),
)
KILLED = Cause(
    "", "It was killed. Usually the kernel does that because the host's memory ran out.", MORE_RANKS, double=("TP",)
)
UNKNOWN = Cause("", "Its log shows none of the reasons that we know.", "Read its log; then, when that is fixed:")


def cause_of(status: int, lines: Sequence[str]) -> Cause:
    """The known reason that the log shows, from its last line upwards: the first lines are often mere warnings."""
    if status in (-9, 137):
        return KILLED
    for line in reversed(lines):
        for cause in CAUSES:
            if re.search(cause.shows, line):
                return cause
    return UNKNOWN


def failure(log: Path, status: int, lines: Sequence[str], intent: Intent, last: int = 12) -> reports.Problem:
    """The report of a trtllm-build that ended with `status`; lines: the end of its log."""
    cause = cause_of(status, lines)
    settings = {
        "TP": intent.tp_size,
        "MAX_BATCH_SIZE": intent.max_batch_size,
        "MAX_NUM_TOKENS": intent.max_num_tokens,
    }
    changes = {**{n: max(1, settings[n] // 2) for n in cause.halve}, **{n: settings[n] * 2 for n in cause.double}}
    command = reports.make(cause.target, **changes)
    return reports.nvidia.trtllm_build_failed(log, status, lines[-last:], cause.means, cause.advice, command)
