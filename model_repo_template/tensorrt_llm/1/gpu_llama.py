"""The Llama network of one rank on an NVIDIA GPU: every step is a CUDA graph, the key/value cache lies in blocks.

Only `Started.wait` waits for the GPU. A step's tokens stay on the GPU for the next step, so rank 0 can launch that step
before it has read them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from itertools import accumulate, chain
from typing import Any

import gpu_kernels as kernels
import torch
from engine_config import EngineConfig
from gpu_kernels import BLOCK_TOKENS, power_of_2
from llama import rotary_tables
from ranks import GpuRanks
from step import HELD_IDS, ON_DEVICE, Choice, Chooser, Chunk, Step
from torch import Tensor
from torch.nn import functional as F

log = logging.getLogger("torch engine")

# A decode step with this many rows has its own graph; others take the next larger one.
GRAPH_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
# A step with this many prompt tokens has its own graph; others take the next larger one, and no step has more than the
# largest. The largest keeps an H100 busy with 7B's shape (12 ms for 1,024 tokens at TP=2), and a stream beside it does
# not wait long.
PROMPT_SIZES = (32, 64, 128, 192, 256, 384, 512, 640, 768, 896, 1024, 1280, 1536, 1792, 2048)
# Most prompt tokens in a step that streams wait for (7B's shape, TP=2, H100: 12 ms), unless more than MANY_WAITING
# tokens wait
BESIDE_STREAMS = 1024
MANY_WAITING = 4096
# Pieces of prompts in such a step
PROMPTS = 64
# Up to this many rows, one kernel for gate and up, or with float32 results, beats cuBLAS followed by a second kernel
# (an H100, 7B's shapes: 34 to 37 us against 36 to 40 for gate and up at TP=2). Without that second kernel cuBLAS is as
# good.
FEW_ROWS = 64
# Programs that add up the ranks' parts: they wait for each other over all ranks, so all must fit on the GPU at once
# (four of 128 threads on each of a V100's 80 multiprocessors).
JOIN_PROGRAMS = 256
# How many heads of a token one program rotates
TURN_HEADS = 16
# Up to this many rows the ranks push their parts to each other (gpu_kernels.push_kernel)
PUSH_ROWS = 64
# Programs that keep an H100 (132 multiprocessors) busy while attending
ATTEND_PROGRAMS = 264
MAX_SPLITS = 16
# Once the weights are loaded, the cache leaves so much of the free memory to graphs, libraries and fragmentation
SPARE_BYTES = 1 << 30


class OutOfMemory(ValueError):
    """The GPU cannot hold the engine; the message has the numbers and the setting to lower."""


class Started:
    """A launched step: its tokens are on their way to the CPU, or `later` chooses them."""

    def __init__(
        self, choice: Choice | None, logits: Tensor | None = None, later: Callable[[], Choice] | None = None
    ) -> None:
        self.logits, self._later = logits, later
        self._choice: Choice | None = None
        self._done = torch.cuda.Event(blocking=True)
        if later is None:
            self._send(choice)

    def _send(self, choice: Choice | None) -> None:
        if choice is not None:
            tokens, log_probs = choice
            self._choice = Choice(
                tokens.to("cpu", non_blocking=True),
                None if log_probs is None else log_probs.to("cpu", non_blocking=True),
            )
        self._done.record()

    def choose(self) -> None:
        later, self._later = self._later, None
        if later is not None:
            with torch.inference_mode():
                self._send(later())

    def wait(self) -> Choice:
        self._done.synchronize()
        assert self._choice is not None
        return self._choice


class GpuLlama:
    """One rank's share of the network. All ranks `launch` the same steps; rank 0 brings `choose` for those with
    logits."""

    lookahead = 1
    block_tokens = BLOCK_TOKENS
    most_prompts = PROMPTS

    def __init__(self, config: EngineConfig, weights: dict[str, Tensor], ranks: GpuRanks) -> None:
        self.config, self.weights, self.ranks, self.device = config, weights, ranks, ranks.device
        self.dtype = weights["lm_head.weight"].dtype
        self.pdl = torch.cuda.get_device_capability(self.device) >= (9, 0)
        self.precision = kernels.precision(self.dtype)
        self.heads, self.kv_heads, self.size = config.heads_per_rank, config.kv_heads_per_rank, config.head_size
        self.inner = config.intermediate_size // config.tp_size
        self.vocab_rows = config.padded_vocab_size // config.tp_size
        self.cos, self.sin = (table.to(self.device) for table in rotary_tables(config))
        self.most_prompt_tokens = min(config.max_num_tokens, PROMPT_SIZES[-1])
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.prompt_graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._make_batch()
        self._make_cache()
        self._warm()

    def prompt_tokens_beside_streams(self, waiting: int) -> int:
        """When many tokens wait, larger steps finish all of them sooner, because each step also runs a decode step."""
        return self.most_prompt_tokens if waiting > MANY_WAITING else min(BESIDE_STREAMS, self.most_prompt_tokens)

    def launch(self, step: Step, choose: Chooser | None = None) -> Started:
        torch.cuda.set_device(self.device)  # a thread begins with the first GPU
        for slot, blocks in step.tables:
            self.tables[slot, : len(blocks)] = self._upload(blocks)
        if step.held:
            held = self._upload([*chain(*step.held)]).view(len(step.held), -1)  # (slots, 2 + HELD_IDS)
            self.held[held[:, 0]] = held[:, 1:]
        decode = [chunk for chunk in step.chunks if chunk.token_ids[0] == ON_DEVICE]
        prompts = [chunk for chunk in step.chunks if chunk.token_ids[0] != ON_DEVICE]
        logits, chosen = [], []
        with torch.inference_mode():
            if decode:
                logits.append(self._decode([chunk.slot for chunk in decode]))
                chosen.append(self.chosen[: len(decode)])
            if prompts:
                logits.append(self._prompts(prompts))
                chosen.append(self.chosen_ends[: sum(chunk.n_logits > 0 for chunk in prompts)])
            if not step.with_logits:
                return Started(Choice(torch.cat(chosen)))
            return self._chosen_by_leader(
                [chunk.slot for chunk in (*decode, *prompts) if chunk.n_logits], torch.cat(logits), choose
            )

    def _chosen_by_leader(self, choosing: list[int], rows: Tensor, choose: Chooser | None) -> Started:
        """Rank 0 chooses from all ranks' logits and sends its choice to the others.

        It chooses in `Started.choose`. The network is launched before that, so the GPU is busy while rank 0 reads the
        tokens of the step before and computes what may follow them.
        """
        if not len(rows):
            return Started(Choice(self.chosen[:0]))
        slots, whole = self._upload(choosing), self.ranks.gather(rows)
        if whole is None:
            self._spread(slots, torch.zeros(len(slots), dtype=torch.int32, device=self.device))
            return Started(None)
        logits = whole[:, : self.config.vocab_size]

        def later() -> Choice:
            choice = choose(logits) if choose else Choice(logits.argmax(-1))
            self._spread(slots, choice.tokens.int())
            return choice

        return Started(None, logits, later)

    def _spread(self, slots: Tensor, tokens: Tensor) -> None:
        """Rank 0's tokens, int32, become the slots' tokens on every rank."""
        self.ranks.broadcast(tokens)
        self.tokens[slots] = tokens.clamp(min=0)

    # --- memory ---

    def _make_batch(self) -> None:
        """The tensors that graphs read and write; their addresses never change."""
        config, rows = self.config, self.config.max_batch_size
        most_rows = max(rows, self.most_prompt_tokens)
        self.sizes = sorted({min(size, rows) for size in GRAPH_SIZES} | {rows})
        # the idle slot fills up a batch that is smaller than its graph
        self.idle_slot, blocks = rows, -(-config.max_seq_len // BLOCK_TOKENS)

        def numbers(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=self.device)

        def values(*shape: int, dtype: torch.dtype = self.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=self.device)

        self.tables, self.tokens, self.positions = numbers(rows + 1, blocks), numbers(rows + 1), numbers(rows + 1)
        # for each slot: tokens that may not be chosen while it has fewer tokens than the first number
        self.held = torch.full((rows + 1, 1 + HELD_IDS), -1, dtype=torch.int32, device=self.device)
        self.slots, self.chosen, self.chosen_ends = numbers(rows), numbers(rows), numbers(PROMPTS)
        self.slots_now: list[int] = []
        # rows of a tile of attention; float32 tiles are twice as large
        self.tile = 64 if self.dtype.itemsize == 2 else 32
        self.packed = numbers(sum(self._packed_sizes(self.most_prompt_tokens)))
        self.prompt_normed = values(self.most_prompt_tokens, config.hidden_size)
        hidden, mixed = config.hidden_size, self.heads * self.size
        self.x, self.normed = values(rows, hidden), values(rows, hidden)
        self.qkv = values(rows, (self.heads + 2 * self.kv_heads) * self.size)
        self.mixed, self.gated = values(rows, mixed), values(rows, self.inner)
        self.logits = values(rows, self.vocab_rows, dtype=torch.float32)
        self.prompt_logits = values(PROMPTS, self.vocab_rows, dtype=torch.float32)
        self.group_padded = max(16, power_of_2(self.heads // self.kv_heads))
        self.size_padded = max(16, power_of_2(self.size))
        most = max(size * self.kv_heads * self._splits(size) for size in self.sizes)
        self.partial = values(most, self.group_padded, self.size_padded, dtype=torch.float32)
        self.partial_max = values(most, self.group_padded, dtype=torch.float32)
        self.partial_sum = values(most, self.group_padded, dtype=torch.float32)
        self.arrived = numbers(rows, self.kv_heads)
        # What the ranks' kernels read from each other: two products in turn, the best tokens, the progress of each
        # rank, and what is pushed.
        world, item = self.ranks.size, self.x.element_size()
        most_choices, self.words = max(rows, PROMPTS), hidden * item // 4
        sizes = (
            2 * most_rows * hidden * item,
            8 * most_choices,
            4 * JOIN_PROGRAMS * world,
            4 * most_choices * world,
            2 * world * PUSH_ROWS * self.words * 8 if world > 1 else 0,
        )
        starts = [sum(-(-size // 256) * 256 for size in sizes[:index]) for index in range(len(sizes) + 1)]
        shared, addresses = self.ranks.shared_memory(starts[-1])
        parts = shared[: sizes[0]].view(self.dtype).view(2, most_rows, hidden)
        self.parts = [parts[0], parts[1]]

        def everywhere(index: int) -> Tensor:
            return torch.tensor([base + starts[index] for base in addresses], dtype=torch.int64, device=self.device)

        self.all_parts, self.all_best, self.join_signals, self.choose_signals, self.inboxes = map(everywhere, range(5))
        self.join_epochs, self.choose_epochs, self.push_epochs = (
            numbers(JOIN_PROGRAMS),
            numbers(most_choices),
            numbers(PUSH_ROWS),
        )

    def _make_cache(self) -> None:
        """As many blocks as all requests may need, or as fit; the first one belongs to the idle slot."""
        config = self.config
        block_bytes = 2 * config.num_hidden_layers * self.kv_heads * BLOCK_TOKENS * self.size * self.x.element_size()
        wanted = config.max_batch_size * self.tables.shape[1]
        free, total = torch.cuda.mem_get_info(self.device)
        # a prompt's step: residual, norm, qkv, attention, gate and up, their product, and what SDPA and all-reduce copy
        per_token = (
            2
            * self.x.element_size()
            * (4 * config.hidden_size + self.qkv.shape[1] + self.mixed.shape[1] + 3 * self.inner)
        )
        working = SPARE_BYTES + max(self.most_prompt_tokens, config.max_batch_size) * per_token
        fit = self.ranks.least((free - working) // block_bytes - 1)
        if fit < self.tables.shape[1]:
            weights = sum(tensor.nbytes for tensor in self.weights.values())
            name, one_request = torch.cuda.get_device_name(self.device), (self.tables.shape[1] + 1) * block_bytes
            raise OutOfMemory(
                f"out of GPU memory: {name} has {total / 1e9:.1f} GB, {weights / 1e9:.1f} GB of them weights, "
                f"{free / 1e9:.1f} GB free;"
                f" a step of {self.most_prompt_tokens} tokens (MAX_NUM_TOKENS={config.max_num_tokens}) takes"
                f" {working / 1e9:.1f} GB, the cache of one request of"
                f" MAX_SEQ_LEN={config.max_seq_len} {one_request / 1e9:.1f} GB: lower MAX_NUM_TOKENS or MAX_SEQ_LEN, "
                "or raise TP"
            )
        self.n_blocks = min(wanted, fit)
        shape = (config.num_hidden_layers, 2, self.n_blocks + 1, self.kv_heads, BLOCK_TOKENS, self.size)
        self.cache = torch.zeros(shape, dtype=self.dtype, device=self.device)
        log.info("key/value cache: %d tokens, %.1f GB", self.n_blocks * BLOCK_TOKENS, self.cache.nbytes / 1e9)

    def _upload(self, numbers: Sequence[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int32).pin_memory().to(self.device, non_blocking=True)

    # --- decode ---

    def _warm(self) -> None:
        """Compiles every kernel and captures every graph: nothing is compiled or loaded later, while a request
        waits."""
        with torch.inference_mode():
            self.slots.fill_(self.idle_slot)
            self.slots_now = [self.idle_slot] * len(self.slots)
            self.pool: Any = None  # memory that the graphs share
            self.capturing = torch.cuda.Stream(self.device)
            sizes = sorted(
                {size for size in PROMPT_SIZES if size < self.most_prompt_tokens} | {self.most_prompt_tokens}
            )
            for size in reversed(sizes):
                # the longest prompt, so that all code for prompts runs once; then no prompt at all
                length = min(size, self.config.max_seq_len - 1)
                self._pack([Chunk(self.idle_slot, 0, (0,) * length, 1)], size)
                self.prompt_graphs[size] = self._captured(self._packed_prompts, size)
            self._prompts([Chunk(self.idle_slot, 0, (0,), 1)])
            self.graphs = {size: self._captured(self._decode_eagerly, size) for size in reversed(self.sizes)}
            torch.cuda.synchronize(self.device)

    def _captured(self, run: Callable[[int], None], size: int) -> torch.cuda.CUDAGraph:
        """run(size) as a graph, after it ran once."""
        self.capturing.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.capturing):
            run(size)
        torch.cuda.current_stream().wait_stream(self.capturing)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.capturing, capture_error_mode="thread_local"):
            run(size)
        self.pool = graph.pool()
        return graph

    def _decode(self, slots: list[int]) -> Tensor:
        """One more token for each slot: this rank's logits, float32 (slots, vocab_rows); `chosen` has the best
        tokens."""
        size = next(size for size in self.sizes if size >= len(slots))
        padded = slots + [self.idle_slot] * (size - len(slots))
        if self.slots_now[:size] != padded:
            self.slots[:size].copy_(self._upload(padded))
            self.slots_now[:size] = padded
        self.graphs[size].replay()
        return self.logits[: len(slots)]

    def _splits(self, rows: int) -> int:
        return max(1, min(MAX_SPLITS, power_of_2(ATTEND_PROGRAMS // (rows * self.kv_heads) or 1)))

    def _decode_eagerly(self, rows: int) -> None:
        config, weights, pdl = self.config, self.weights, self.pdl
        width, block, epsilon = config.hidden_size, power_of_2(config.hidden_size), config.norm_epsilon
        x, normed, slots = self.x[:rows], self.normed[:rows], self.slots[:rows]
        splits = self._splits(rows)
        names, gains = self._layers()
        kernels.embed_kernel[(rows,)](
            self.tokens, slots, weights["transformer.vocab_embedding.weight"], gains[0], x, normed, width, epsilon,
            BLOCK=block, PDL=pdl, launch_pdl=pdl, num_warps=8,
        )  # fmt: skip
        for index, name in enumerate(names):
            self._linear(normed, weights[name + "attention.qkv.weight"], self.qkv[:rows])
            self._add_bias(self.qkv[:rows], name + "attention.qkv")
            kernels.attend_kernel[(rows, self.kv_heads, splits)](
                self.qkv, self.mixed, self.cache[index, 0], self.cache[index, 1], self.tables, slots, self.positions, self.cos, self.sin,
                self.partial, self.partial_max, self.partial_sum, self.arrived, self.tables.shape[1], self.size**-0.5,
                GROUP=self.heads // self.kv_heads, GROUP_PADDED=self.group_padded, KV_HEADS=self.kv_heads, SIZE=self.size,
                SIZE_PADDED=self.size_padded, BLOCK=BLOCK_TOKENS, SPLITS=splits, PRECISION=self.precision, PDL=pdl, launch_pdl=pdl,
            )  # fmt: skip
            self._linear(self.mixed[:rows], weights[name + "attention.dense.weight"], self.parts[0][:rows])
            self._add_bias(self.parts[0][:rows], name + "attention.dense", once=True)
            self._join(0, x, normed, weights[name + "post_layernorm.weight"])
            if config.mlp_bias:
                self._gate(self._biased(normed, name + "mlp.both"), self.gated[:rows])
            else:
                self._linear(normed, weights[name + "mlp.both.weight"], self.gated[:rows], gated=True)
            self._linear(self.gated[:rows], weights[name + "mlp.proj.weight"], self.parts[1][:rows])
            self._add_bias(self.parts[1][:rows], name + "mlp.proj", once=True)
            self._join(1, x, normed, gains[index + 1])
        self._linear(normed, weights["lm_head.weight"], self.logits[:rows])
        self._choose(self.logits[:rows], slots, self.chosen, 1)

    def _layers(self) -> tuple[list[str], list[Tensor]]:
        """The layers' names, and the norm weights before each layer and after the last one."""
        names = [f"transformer.layers.{index}." for index in range(self.config.num_hidden_layers)]
        gains = [self.weights[name + "input_layernorm.weight"] for name in names]
        return names, [*gains, self.weights["transformer.ln_f.weight"]]

    def _join(self, turn: int, x: Tensor, normed: Tensor, gain: Tensor) -> None:
        """Adds all ranks' parts[turn] to x (rows, hidden), and norms it."""
        rows, (width, epsilon) = len(x), (self.config.hidden_size, self.config.norm_epsilon)
        shared = {"RANK": self.ranks.rank, "WORLD": self.ranks.size, "PDL": self.pdl, "launch_pdl": self.pdl}
        if self.ranks.size > 1 and rows <= PUSH_ROWS:
            kernels.push_kernel[(rows,)](
                x, self.parts[turn], self.inboxes, self.push_epochs, turn * self.ranks.size * PUSH_ROWS * self.words, gain, normed, width,
                self.words, epsilon, KIND=kernels.kind(self.dtype), ROWS=PUSH_ROWS, BLOCK=power_of_2(self.words), num_warps=8, **shared,
            )  # fmt: skip
            return
        kernels.join_kernel[(min(rows, JOIN_PROGRAMS),)](
            x, self.all_parts, self.join_signals, self.join_epochs, turn * self.parts[0].numel(), gain, normed, rows, width, epsilon,
            BLOCK=power_of_2(width), num_warps=max(4, power_of_2(width) // 1024), **shared,
        )  # fmt: skip

    def _linear(self, x: Tensor, weight: Tensor, out: Tensor, gated: bool = False) -> None:
        """out = x @ weight.T; gated: silu of the first half of the outputs times the second.

        The tiles are the best of a dozen on an H100: one row reads 2.4 to 3.1 TB/s of weights, where cuBLAS reads 1.9
        to 2.6.
        """
        rows, (n_out, n_in) = len(x), weight.shape
        n_out //= 2 if gated else 1
        pdl = {"PDL": self.pdl, "launch_pdl": self.pdl}
        if rows == 1:
            lines, columns = 2 if gated else 1, min(2048, power_of_2(n_in))
            kernels.matvec_kernel[(-(-n_out // lines),)](
                x, weight, out, n_out, n_in, GATED=gated, ROWS=lines, COLUMNS=columns, num_warps=4, **pdl
            )
        elif rows <= FEW_ROWS and (gated or out.dtype != x.dtype):
            # float32 tiles are twice as large
            lines, columns, stages = (64, 128, 4) if x.element_size() == 2 else (32, 64, 3)
            kernels.rows_kernel[(-(-n_out // lines),)](
                x, weight, out, rows, n_out, n_in, out.stride(0), GATED=gated, ROWS=max(16, power_of_2(rows)), OUTS=lines,
                COLUMNS=columns, PRECISION=self.precision, num_warps=4, num_stages=stages, **pdl,
            )  # fmt: skip
        elif gated:
            self._gate(F.linear(x, weight), out)
        elif out.dtype == x.dtype:
            torch.mm(x, weight.t(), out=out)
        else:
            out.copy_(F.linear(x, weight))

    def _add_bias(self, out: Tensor, name: str, once: bool = False) -> None:
        """Adds a layer's bias, if it has one, to its outputs. once: the ranks' outputs are summed later, so only rank 0
        adds it."""
        bias = self.weights.get(name + ".bias")
        if bias is not None and not (once and self.ranks.rank):
            out += bias

    def _biased(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.weights[name + ".weight"], self.weights.get(name + ".bias"))

    def _gate(self, both: Tensor, out: Tensor) -> None:
        kernels.gate_kernel[(len(both), -(-self.inner // 1024))](both, out, self.inner, BLOCK=1024, PDL=False)

    def _choose(self, logits: Tensor, slots: Tensor, chosen: Tensor, advance: int) -> None:
        kernels.choose_kernel[(len(logits),)](
            logits, slots, self.tokens, self.positions, self.held, chosen, self.all_best, self.choose_signals, self.choose_epochs,
            self.vocab_rows, self.config.vocab_size, self.idle_slot, advance,
            BLOCK=2048, RANK=self.ranks.rank, WORLD=self.ranks.size, PDL=self.pdl, launch_pdl=self.pdl, num_warps=8,
        )  # fmt: skip

    # --- prompts ---

    def _packed_sizes(self, size: int) -> tuple[int, ...]:
        """How many numbers each part of `packed` has, for a graph of `size` tokens: tokens, positions, slots; for each
        piece with logits its last row, its slot and the tokens of its sequence so far; tiles of attention, four numbers
        each."""
        return size, size, size, PROMPTS, PROMPTS, PROMPTS, 4 * (size // self.tile + PROMPTS)

    def _pack(self, chunks: Sequence[Chunk], size: int) -> None:
        """Writes the chunks to self.packed as a graph of `size` tokens reads it. Padding belongs to the idle slot."""
        ends = list(accumulate(len(chunk.token_ids) for chunk in chunks))
        packed = torch.zeros(sum(self._packed_sizes(size)), dtype=torch.int32).pin_memory()
        tokens, positions, slots, last, end_slots, counts, tiles = (
            part.numpy() for part in packed.split(self._packed_sizes(size))
        )
        slots[:] = end_slots[:] = self.idle_slot
        work: list[tuple[int, int, int, int]] = []
        for chunk, end in zip(chunks, ends, strict=True):
            begin, length = end - len(chunk.token_ids), len(chunk.token_ids)
            tokens[begin:end], slots[begin:end] = chunk.token_ids, chunk.slot
            positions[begin:end] = range(chunk.start, chunk.start + length)
            work += [
                (begin + first, min(self.tile, length - first), chunk.slot, chunk.start + first)
                for first in range(0, length, self.tile)
            ]
        # the longest first: short ones fill the gaps at the end
        work.sort(key=lambda tile: -tile[3])
        tiles[: 4 * len(work)] = [number for tile in work for number in tile]
        choosing = [(chunk, end) for chunk, end in zip(chunks, ends, strict=True) if chunk.n_logits]
        last[: len(choosing)] = [end - 1 for _, end in choosing]
        end_slots[: len(choosing)] = [chunk.slot for chunk, _ in choosing]
        counts[: len(choosing)] = [chunk.start + len(chunk.token_ids) for chunk, _ in choosing]
        self.packed[: len(packed)].copy_(packed, non_blocking=True)

    def _prompts(self, chunks: Sequence[Chunk]) -> Tensor:
        """Pieces of prompts: this rank's logits, float32 (sum of n_logits, vocab_rows). `chosen_ends` has the best
        token after each piece with logits; from now on its slot decodes."""
        n_tokens = sum(len(chunk.token_ids) for chunk in chunks)
        size = min(size for size in self.prompt_graphs if size >= n_tokens)
        self._pack(chunks, size)
        self.prompt_graphs[size].replay()
        if all(chunk.n_logits <= 1 for chunk in chunks):
            return self.prompt_logits[: sum(chunk.n_logits for chunk in chunks)]
        ends = accumulate(len(chunk.token_ids) for chunk in chunks)
        rows = [row for chunk, end in zip(chunks, ends, strict=True) for row in range(end - chunk.n_logits, end)]
        return F.linear(self.prompt_normed[self._upload(rows)], self.weights["lm_head.weight"]).float()

    def _packed_prompts(self, n_tokens: int) -> None:
        """All layers over the pieces of prompts in self.packed, in a graph of n_tokens."""
        config, weights, width = self.config, self.weights, self.config.hidden_size
        heads, kv_heads, size = self.heads, self.kv_heads, self.size
        sizes = self._packed_sizes(n_tokens)
        tokens, positions, slots, last, end_slots, counts, tiles = self.packed[: sum(sizes)].split(sizes)
        names, gains = self._layers()
        x = weights["transformer.vocab_embedding.weight"][tokens]  # (tokens, hidden)
        normed = self.prompt_normed[:n_tokens]
        kernels.norm_kernel[(len(x),)](
            x, gains[0], normed, width, config.norm_epsilon, BLOCK=power_of_2(width), num_warps=8
        )
        mixed = torch.empty(n_tokens, heads * size, dtype=self.dtype, device=self.device)
        inner = torch.empty(n_tokens, self.inner, dtype=self.dtype, device=self.device)
        for index, name in enumerate(names):
            keys, values = self.cache[index]
            qkv = self._biased(normed, name + "attention.qkv")
            kernels.turn_kernel[(len(x), -(-(heads + 2 * kv_heads) // TURN_HEADS))](
                qkv, keys, values, self.tables, slots, positions, self.cos, self.sin, self.tables.shape[1],
                HEADS=heads, KV_HEADS=kv_heads, SIZE=size, SIZE_PADDED=self.size_padded, BLOCK=BLOCK_TOKENS, TOGETHER=TURN_HEADS,
                num_warps=4,
            )  # fmt: skip
            kernels.prompt_attend_kernel[(len(tiles) // 4, heads)](
                qkv, mixed, keys, values, self.tables, tiles, self.tables.shape[1], size**-0.5, GROUP=heads // kv_heads,
                KV_HEADS=kv_heads, SIZE=size, SIZE_PADDED=self.size_padded, BLOCK=BLOCK_TOKENS, ROWS=self.tile,
                PRECISION=self.precision, num_warps=4, num_stages=3 if self.dtype.itemsize == 2 else 1,
            )  # fmt: skip
            torch.mm(mixed, weights[name + "attention.dense.weight"].t(), out=self.parts[0][:n_tokens])
            self._add_bias(self.parts[0][:n_tokens], name + "attention.dense", once=True)
            self._join(0, x, normed, weights[name + "post_layernorm.weight"])
            self._gate(self._biased(normed, name + "mlp.both"), inner)
            torch.mm(inner, weights[name + "mlp.proj.weight"].t(), out=self.parts[1][:n_tokens])
            self._add_bias(self.parts[1][:n_tokens], name + "mlp.proj", once=True)
            self._join(1, x, normed, gains[index + 1])
        self._linear(normed[last], weights["lm_head.weight"], self.prompt_logits)
        self.positions[end_slots] = counts
        self._choose(self.prompt_logits, end_slots, self.chosen_ends, 0)
