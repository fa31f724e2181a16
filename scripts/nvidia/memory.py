"""How much memory and disk the journey takes: arithmetic from the model's shape, before anything is built.

Core only: numbers in, numbers out. A byte count is exact if the format is ours (files of weights, KV cache), and a pair
of bounds if TensorRT decides (activations, CUDA, NCCL). The measurements that the bounds must contain
(tests/test_plan.py):
  [memory]  docs/source/reference/memory.md of TensorRT-LLM, the log of a Llama-2-7B in FP8 on an H100
  [1188]    TensorRT-LLM issue 1188, two logs of a Qwen2.5-0.5B in INT8 on an A4000
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from scripts.weights.shape import LlamaShape

MIB = 1 << 20
ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
# Bytes of a linear layer's weight, and of its scales for each row of the output. AWQ: a scale of 2 bytes for each group
# of 128 weights, 0.5 + 2 / 128 a weight. lm_head and the embedding stay as they are (exclude_modules of NVIDIA's
# quantize.py).
QUANT_BYTES = {"int8_wo": (1.0, 2), "int4_awq": (0.5 + 2 / 128, 0), "fp8": (1.0, 0), "sq": (1.0, 4)}

# kv_cache_free_gpu_mem_fraction, as scripts/build_model_repo.py fills it in:
# a share of what is free once the engine is loaded.
KV_FRACTION = 0.85
# cuBLASLt's workspace: the 32 MiB by which 43.26 MiB at 512 tokens [1188] exceed the tensors alive in the feed-forward
# part.
WORKSPACE_BYTES = 32 * MIB
# Buffers of the runtime and of the sampler, in copies of (batch, vocabulary) float32:
# 2.66 + 5.76 GB at 2048 x 151936 [1188] are 6.8, 43.29 + 180.30 MB at 256 x 32000 [memory] are 6.8.
SAMPLING_COPIES = 7
# CUDA's context with the kernels' code: 79.10 - 70.48 GiB taken, less 6678 and 1134 MiB and 224 MB, leave 0.85 GB
# [memory]. Older GPUs and fewer kernels take less: 0.5 GB is a lower bound (590 MiB in issue 3058, for a
# process that only opened the GPU).
CUDA_BYTES = (500_000_000, 850_000_000)
# NCCL's channels and code, and the two buffers of custom all-reduce (2 x 16 MB; none without peers). ASSUMED, never
# measured by us.
PEER_BYTES = (100_000_000, 400_000_000)

# Host memory of programs, without the model: supervisor, endpoint, Triton, text models, and for each rank tritonserver
# with the engine's Python and its step. Measured: 594 MiB for the bundled model's image with 2 ranks, of which 60 MiB
# are weights and KV cache. Twice that is counted.
PROGRAM_BYTES, RANK_BYTES = 512 * MIB, 384 * MIB
# On a GPU: a rank's CUDA context on the host, and PyTorch's or TensorRT's libraries. ASSUMED, never measured by us.
GPU_RANK_BYTES = 2048 * MIB

# Conversion streams by rows (make bench-convert measures its anonymous memory): less than this, whatever the model.
CONVERSION_BYTES = 1 << 30


@dataclass(frozen=True)
class Engine:
    """What engines to build. quant: '' or a key of QUANT_BYTES; the limits are in tokens, except max_batch_size."""

    shape: LlamaShape
    dtype: str
    tp_size: int
    max_batch_size: int
    max_input_len: int
    max_seq_len: int
    max_num_tokens: int
    pp_size: int = 1
    quant: str = ""

    @property
    def world_size(self) -> int:
        return self.tp_size * self.pp_size

    @property
    def item_bytes(self) -> int:
        return ITEM_BYTES[self.dtype]


def parameters(shape: LlamaShape) -> int:
    """How many numbers a model has: 6738415616 for Llama 2 7B."""
    return sum(math.prod(tensor) for tensor in shape.hf_tensors().values())


def stage_bytes(engine: Engine) -> list[int]:
    """Bytes of the weights of one rank, for each pipeline stage. Its checkpoint file has them, and so has its engine.

    Every rank has the embedding (first stage) and the norms. TP divides the rest: lm_head (last stage, padded), and of
    each layer qkv, dense, fc, gate, proj. At TP=2 in float16: 7B 6869753856, 13B 13180119040, 70B 69240111104
    (docker/contracts/rank-tensors).
    """
    shape, tp_size, item = engine.shape, engine.tp_size, engine.item_bytes
    weight_bytes, scale_bytes = QUANT_BYTES.get(engine.quant, (float(item), 0))
    hidden, wide = shape.hidden_size, shape.intermediate_size // tp_size
    heads, kv_heads = shape.n_heads // tp_size, kv_heads_per_rank(engine)
    linear: list[tuple[int, int]] = [  # (output, input)
        ((heads + 2 * kv_heads) * shape.head_size, hidden),
        (hidden, heads * shape.head_size),
        (wide, hidden),
        (wide, hidden),
        (hidden, wide),
    ]
    layer = sum(rows * columns * weight_bytes + rows * scale_bytes for rows, columns in linear) + 2 * hidden * item
    # biases: of qkv and dense together (the latter zeros for a Qwen2), of all three of the feed-forward part
    layer += sum(rows for rows, _ in linear[:2]) * item if shape.attention_bias else 0
    layer += sum(rows for rows, _ in linear[2:]) * item if shape.mlp_bias else 0
    stages = [int(layer * layers) for layers in _layers(engine)]
    stages[0] += shape.vocab_size * hidden * item
    stages[-1] += (-(-shape.vocab_size // tp_size) + 1) * hidden * item  # lm_head, ln_f
    return stages


def checkpoint_bytes(engine: Engine) -> int:
    """Bytes of all rank files together."""
    return engine.tp_size * sum(stage_bytes(engine))


def kv_heads_per_rank(engine: Engine) -> int:
    """Key/value heads of a rank. If there are more ranks than heads, several ranks hold the same head."""
    return max(1, engine.shape.n_kv_heads // engine.tp_size)


def kv_bytes_per_token(engine: Engine) -> int:
    """KV cache of one token on one rank: key and value, of each layer of the longest stage, in the model's type.

    7B at TP=1: 2 * 32 layers * 32 heads * 128 * 2 bytes = 524288. (An FP8 cache would be half; not assumed.)
    """
    return 2 * max(_layers(engine)) * kv_heads_per_rank(engine) * engine.shape.head_size * engine.item_bytes


def activation_bytes(engine: Engine) -> tuple[int, int]:
    """Bytes that TensorRT sets aside for one step of max_num_tokens: (at least, at most).

    At least: what is alive at once in the feed-forward part, namely residual and normed input (hidden each), fc and
    gate (intermediate / TP each). At most: every tensor of a layer without any reuse, the workspace and the logits. The
    tensors of a layer are 7 of hidden size (input, norm, dense, its all-reduced sum, residual, norm, proj), qkv,
    attention's output, fc, gate and their product.
    """
    shape, item = engine.shape, engine.item_bytes
    hidden, wide = shape.hidden_size, shape.intermediate_size // engine.tp_size
    attention = shape.n_heads // engine.tp_size * shape.head_size
    qkv = attention + 2 * kv_heads_per_rank(engine) * shape.head_size
    logits = engine.max_batch_size * shape.vocab_size * item
    least = engine.max_num_tokens * item * (2 * hidden + 2 * wide)
    most = engine.max_num_tokens * item * (7 * hidden + qkv + attention + 3 * wide)
    return least, most + WORKSPACE_BYTES + logits


@dataclass(frozen=True)
class Fit:
    """What a rank takes of one GPU, in bytes; pairs are (at least, at most). The KV cache gets kv_fraction of the rest.

    needed_tokens: what the KV cache must hold, or the engine does not start; block_tokens: tokens of one block.
    """

    gpu_bytes: int
    weights_bytes: int
    activation_bytes: tuple[int, int]
    other_bytes: tuple[int, int]
    kv_bytes_per_token: int
    max_batch_size: int
    max_seq_len: int
    needed_tokens: int
    kv_fraction: float = 1.0
    block_tokens: int = 1

    @property
    def kv_tokens(self) -> tuple[int, int]:
        """Tokens that the KV cache holds, in whole blocks: (at least, at most)."""
        least, most = (
            max(0, self.gpu_bytes - self.weights_bytes - activation - other)
            for activation, other in zip(self.activation_bytes[::-1], self.other_bytes[::-1])
        )
        return self._tokens(least), self._tokens(most)

    def _tokens(self, free_bytes: int) -> int:
        blocks = int(free_bytes * self.kv_fraction) // (self.kv_bytes_per_token * self.block_tokens)
        return blocks * self.block_tokens

    @property
    def batch(self) -> int:
        """Requests of max_seq_len that surely run at once, up to the engine's limit."""
        return min(self.max_batch_size, self.kv_tokens[0] // self.max_seq_len)

    @property
    def verdict(self) -> str:
        """Whether needed_tokens have room: 'fits' surely, 'tight' at best, 'no' not even then."""
        least, most = self.kv_tokens
        return "fits" if least >= self.needed_tokens else "tight" if most >= self.needed_tokens else "no"

    def numbers(self) -> dict[str, object]:
        """Everything above, for --json."""
        return {**vars(self), "kv_tokens": self.kv_tokens, "batch": self.batch, "verdict": self.verdict}


def fit(engine: Engine, gpu_bytes: int, block_tokens: int) -> Fit:
    """The fullest rank of TensorRT engines on a GPU of `gpu_bytes`; block_tokens: tokens_per_block.

    TensorRT-LLM refuses to load when the KV cache cannot take one sequence to its end (tensorrtllm_backend issue 59).
    """
    peers = PEER_BYTES if engine.world_size > 1 else (0, 0)
    sampling = SAMPLING_COPIES * engine.max_batch_size * engine.shape.vocab_size * 4
    return Fit(
        gpu_bytes=gpu_bytes,
        weights_bytes=max(stage_bytes(engine)),
        activation_bytes=activation_bytes(engine),
        other_bytes=(CUDA_BYTES[0] + peers[0] + sampling, CUDA_BYTES[1] + peers[1] + sampling),
        kv_bytes_per_token=kv_bytes_per_token(engine),
        max_batch_size=engine.max_batch_size,
        max_seq_len=engine.max_seq_len,
        needed_tokens=engine.max_seq_len,
        kv_fraction=KV_FRACTION,
        block_tokens=block_tokens,
    )


def torch_fit(engine: Engine, gpu_bytes: int) -> Fit:
    """The same for the torch engine, if all its requests run at once: max_batch_size rows of max_seq_len.

    Without its kernels it takes all that memory at start. With them it starts with what fits, and requests wait.
    """
    rows = engine.max_batch_size * engine.max_seq_len
    return dataclasses.replace(fit(engine, gpu_bytes, 1), needed_tokens=rows, kv_fraction=1.0)


def torch_host_bytes(engine: Engine) -> int:
    """Weights and KV cache of all ranks of the torch engine on a CPU, which computes in float32 whatever the dtype."""
    single = dataclasses.replace(engine, dtype="float32")
    cache = engine.max_batch_size * engine.max_seq_len * kv_bytes_per_token(single)
    return engine.world_size * (max(stage_bytes(single)) + cache)


def serve_bytes(engine: Engine, on_gpus: bool) -> int:
    """Host memory that a model takes. With GPUs every rank's file passes through it while loading;
    on a CPU all of it stays."""
    return checkpoint_bytes(engine) if on_gpus else torch_host_bytes(engine)


def program_bytes(world_size: int, on_gpus: bool) -> int:
    """Host memory of a server's programs, beside what `serve_bytes` says of the model."""
    return PROGRAM_BYTES + world_size * (RANK_BYTES + (GPU_RANK_BYTES if on_gpus else 0))


def _layers(engine: Engine) -> list[int]:
    """Layers of each pipeline stage; scripts/plan.py refuses a PP that does not divide them."""
    return [engine.shape.n_layers // engine.pp_size] * engine.pp_size
