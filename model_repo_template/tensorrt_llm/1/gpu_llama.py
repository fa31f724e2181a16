"""The Llama network of one rank on an NVIDIA GPU: prompts as they come, decode steps as CUDA graphs, a key/value cache in blocks.

Nothing here waits for the GPU but `Started.wait`: a step's tokens stay on the GPU for the next step, so that rank 0 can launch
it before it has read them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import gpu_kernels as kernels
import torch
from engine_config import EngineConfig
from gpu_kernels import BLOCK_TOKENS, power_of_2
from llama import rotary_frequencies
from ranks import GpuRanks
from step import ON_DEVICE, Choice, Chooser, Chunk, Step
from torch import Tensor
from torch.nn import functional as F

log = logging.getLogger("torch engine")

# Rows of a decode step that has a graph of its own; others take the next larger one.
GRAPH_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
# Tokens of a step of whole prompts that has a graph; others take the next larger one, and beyond the last they are launched one by one:
# that takes the host some 20 ms at 32 layers, whatever the number of tokens.
PROMPT_SIZES = (64, 128, 256, 512, 1024)
# Prompts that such a step may have, and rows of logits
PROMPTS = 64
# Up to so many rows one kernel for gate and up, or with float32 results, beats cuBLAS and a kernel after it (an H100, 7B's shapes:
# 34 to 37 us against 36 to 40 for gate and up at TP=2). Without such an end cuBLAS is as good.
FEW_ROWS = 64
# Programs that add up the ranks' parts: they wait for each other over all ranks, so all must fit on the GPU at once.
JOIN_PROGRAMS = 128
# Programs that keep an H100 (132 multiprocessors) busy while attending
ATTEND_PROGRAMS = 264
MAX_SPLITS = 16
# Of the memory that is free once the weights are there, what the cache leaves to graphs, libraries and fragmentation
SPARE_BYTES = 1 << 30


class OutOfMemory(ValueError):
    """The GPU cannot hold the engine; the message has the numbers and the setting to lower."""


def flash_attention(q: Tensor, k: Tensor, v: Tensor, begins: Tensor, longest: int) -> Tensor:
    """Causal attention of packed sequences (tokens, heads, size); the n-th goes from begins[n] to begins[n + 1], at most `longest`."""
    return torch.ops.aten._flash_attention_forward(q, k, v, begins, begins, longest, longest, 0.0, True, False)[0]


class Started:
    """A launched step: its tokens are on their way to the CPU."""

    def __init__(self, choice: Choice | None, logits: Tensor | None) -> None:
        self.logits = logits
        self._choice = None
        if choice is not None:
            self._choice = Choice(*(None if part is None else part.to("cpu", non_blocking=True) for part in choice))
        self._done = torch.cuda.Event(blocking=True)
        self._done.record()

    def wait(self) -> Choice:
        self._done.synchronize()
        assert self._choice is not None
        return self._choice


class GpuLlama:
    """One rank's share of the network. All ranks `launch` the same steps; rank 0 brings `choose` for those with logits."""

    lookahead, whole_prompts = 1, True
    block_tokens = BLOCK_TOKENS
    # 512 tokens of a 7B prompt take two H100 about 12 ms: that is what a stream waits longer
    prompt_tokens_beside_streams = 512

    def __init__(self, config: EngineConfig, weights: dict[str, Tensor], ranks: GpuRanks) -> None:
        self.config, self.weights, self.ranks, self.device = config, weights, ranks, ranks.device
        self.dtype = weights["lm_head.weight"].dtype
        self.pdl = torch.cuda.get_device_capability(self.device) >= (9, 0)
        self.precision = kernels.precision(self.dtype)
        self.heads, self.kv_heads, self.size = config.heads_per_rank, config.kv_heads_per_rank, config.head_size
        self.inner = config.intermediate_size // config.tp_size
        self.vocab_rows = config.padded_vocab_size // config.tp_size
        angles = torch.arange(config.max_seq_len, dtype=torch.float32)[:, None] * rotary_frequencies(config)
        angles = torch.cat((angles, angles), dim=-1).to(self.device)  # (max_seq_len, head_size)
        self.cos, self.sin = angles.cos(), angles.sin()
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.prompt_graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._make_batch()
        self._make_cache()
        self._warm()

    def launch(self, step: Step, choose: Chooser | None = None) -> Started:
        torch.cuda.set_device(self.device)  # a thread begins with the first GPU
        for slot, blocks in step.tables:
            self.tables[slot, : len(blocks)] = self._upload(blocks)
        decode = [chunk for chunk in step.chunks if chunk.token_ids[0] == ON_DEVICE]
        prompts = [chunk for chunk in step.chunks if chunk.token_ids[0] != ON_DEVICE]
        logits, chosen = [], []
        with torch.inference_mode():
            if decode:
                logits.append(self._decode([chunk.slot for chunk in decode]))
                chosen.append(self.chosen[: len(decode)])
            if prompts:
                rows = self._prompts(prompts)
                logits.append(rows)
                chosen.append(self._choose_prompts(prompts, rows) if len(rows) else self.chosen[:0])
            if not step.with_logits:
                return Started(Choice(torch.cat(chosen)), None)
            return self._chosen_by_leader(
                [chunk.slot for chunk in (*decode, *prompts) if chunk.n_logits], torch.cat(logits), choose
            )

    def _chosen_by_leader(self, choosing: list[int], rows: Tensor, choose: Chooser | None) -> Started:
        """Rank 0 chooses from all ranks' logits, and tells the others what."""
        if not len(rows):
            return Started(Choice(self.chosen[:0]), None)
        whole = self.ranks.gather(rows)
        choice = None
        if whole is not None:
            whole = whole[:, : self.config.vocab_size]
            choice = choose(whole) if choose else Choice(whole.argmax(-1))
        slots = self._upload(choosing)
        tokens = (
            torch.zeros(len(slots), dtype=torch.int32, device=self.device) if choice is None else choice.tokens.int()
        )
        self.ranks.broadcast(tokens)
        self.tokens[slots] = tokens.clamp(min=0)
        return Started(choice, whole)

    # --- memory ---

    def _make_batch(self) -> None:
        """What graphs read and write: it stays where it is."""
        config, rows = self.config, self.config.max_batch_size
        most_rows = max(rows, config.max_num_tokens)  # of a step of prompts
        self.sizes = sorted({min(size, rows) for size in GRAPH_SIZES} | {rows})
        # the idle slot fills up a batch that is smaller than its graph
        self.idle_slot, blocks = rows, -(-config.max_seq_len // BLOCK_TOKENS)

        def numbers(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=self.device)

        def values(*shape: int, dtype: torch.dtype = self.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=self.device)

        self.tables, self.tokens, self.positions = numbers(rows + 1, blocks), numbers(rows + 1), numbers(rows + 1)
        self.slots, self.chosen, self.chosen_ends = numbers(rows), numbers(rows), numbers(rows)
        self.slots_now: list[int] = []
        # a step of whole prompts: tokens, positions, slots, where prompts begin (the last number is where they end), rows with logits
        self.packed = numbers(3 * PROMPT_SIZES[-1] + 2 * PROMPTS + 1)
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
        # What the ranks' kernels read of each other: two products in turn, the best tokens, and who has come how far.
        world, item = self.ranks.size, self.x.element_size()
        sizes = (2 * most_rows * hidden * item, 8 * rows, 4 * JOIN_PROGRAMS * world, 4 * rows * world)
        starts = [sum(-(-size // 256) * 256 for size in sizes[:index]) for index in range(len(sizes) + 1)]
        shared, addresses = self.ranks.shared_memory(starts[-1])
        parts = shared[: sizes[0]].view(self.dtype).view(2, most_rows, hidden)
        self.parts = [parts[0], parts[1]]

        def everywhere(index: int) -> Tensor:
            return torch.tensor([base + starts[index] for base in addresses], dtype=torch.int64, device=self.device)

        self.all_parts, self.all_best, self.join_signals, self.choose_signals = (everywhere(n) for n in range(4))
        self.join_epochs, self.choose_epochs = numbers(JOIN_PROGRAMS), numbers(rows)

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
        working = SPARE_BYTES + max(config.max_num_tokens, config.max_batch_size) * per_token
        fit = self.ranks.least((free - working) // block_bytes - 1)
        if fit < self.tables.shape[1]:
            weights = sum(tensor.nbytes for tensor in self.weights.values())
            name, one_request = torch.cuda.get_device_name(self.device), (self.tables.shape[1] + 1) * block_bytes
            raise OutOfMemory(
                f"out of GPU memory: {name} has {total / 1e9:.1f} GB, {weights / 1e9:.1f} GB of them weights, {free / 1e9:.1f} GB free;"
                f" a step of MAX_NUM_TOKENS={config.max_num_tokens} takes {working / 1e9:.1f} GB, the cache of one request of"
                f" MAX_SEQ_LEN={config.max_seq_len} {one_request / 1e9:.1f} GB: lower MAX_NUM_TOKENS or MAX_SEQ_LEN, or raise TP"
            )
        self.n_blocks = min(wanted, fit)
        shape = (config.num_hidden_layers, 2, self.n_blocks + 1, self.kv_heads, BLOCK_TOKENS, self.size)
        self.cache = torch.zeros(shape, dtype=self.dtype, device=self.device)
        log.info("key/value cache: %d tokens, %.1f GB", self.n_blocks * BLOCK_TOKENS, self.cache.nbytes / 1e9)

    def _upload(self, numbers: Sequence[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int32).pin_memory().to(self.device, non_blocking=True)

    # --- decode ---

    def _warm(self) -> None:
        """Compiles every kernel and captures the graphs; the idle slot is all that runs."""
        with torch.inference_mode():
            some = min(self.config.max_num_tokens, self.config.max_seq_len - 1, 1024)
            for start, tokens in ((0, some), (1, 1)):
                chunk = Chunk(self.idle_slot, start, (0,) * tokens, 1)
                self._choose_prompts([chunk], self._prompts([chunk]))
            self.slots.fill_(self.idle_slot)
            self.slots_now = [self.idle_slot] * len(self.slots)
            self.pool, self.capturing = None, torch.cuda.Stream(self.device)
            self.graphs = {size: self._captured(self._decode_eagerly, size) for size in reversed(self.sizes)}
            if self._packs_prompts():
                sizes = [size for size in PROMPT_SIZES if size <= self.config.max_num_tokens]
                self.packed.zero_()  # no prompt at all
                self.prompt_graphs = {size: self._captured(self._packed_prompts, size) for size in reversed(sizes)}
            torch.cuda.synchronize(self.device)

    def _packs_prompts(self) -> bool:
        """PyTorch's flash attention, which takes packed prompts, is for half precision and GPUs since Ampere."""
        return self.x.element_size() == 2 and torch.cuda.get_device_capability(self.device) >= (8, 0)

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
        """One token more for each slot: this rank's logits, float32 (slots, vocab_rows); `chosen` has the best tokens."""
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
            kernels.attend_kernel[(rows, self.kv_heads, splits)](
                self.qkv, self.mixed, self.cache[index, 0], self.cache[index, 1], self.tables, slots, self.positions, self.cos, self.sin,
                self.partial, self.partial_max, self.partial_sum, self.arrived, self.tables.shape[1], self.size**-0.5,
                GROUP=self.heads // self.kv_heads, GROUP_PADDED=self.group_padded, KV_HEADS=self.kv_heads, SIZE=self.size,
                SIZE_PADDED=self.size_padded, BLOCK=BLOCK_TOKENS, SPLITS=splits, PRECISION=self.precision, PDL=pdl, launch_pdl=pdl,
            )  # fmt: skip
            self._linear(self.mixed[:rows], weights[name + "attention.dense.weight"], self.parts[0][:rows])
            self._join(0, x, normed, weights[name + "post_layernorm.weight"])
            self._linear(normed, weights[name + "mlp.both.weight"], self.gated[:rows], gated=True)
            self._linear(self.gated[:rows], weights[name + "mlp.proj.weight"], self.parts[1][:rows])
            self._join(1, x, normed, gains[index + 1])
        self._linear(normed, weights["lm_head.weight"], self.logits[:rows])
        self._choose(self.logits[:rows], slots, self.chosen, 1)

    def _layers(self) -> tuple[list[str], list[Tensor]]:
        """The layers' names, and the norm weights before each of them and after the last."""
        names = [f"transformer.layers.{index}." for index in range(self.config.num_hidden_layers)]
        gains = [self.weights[name + "input_layernorm.weight"] for name in names]
        return names, [*gains, self.weights["transformer.ln_f.weight"]]

    def _join(self, turn: int, x: Tensor, normed: Tensor, gain: Tensor) -> None:
        """Adds all ranks' parts[turn] to x (rows, hidden), and norms it."""
        width = self.config.hidden_size
        kernels.join_kernel[(min(len(x), JOIN_PROGRAMS),)](
            x, self.all_parts, self.join_signals, self.join_epochs, turn * self.parts[0].numel(), gain, normed, len(x), width,
            self.config.norm_epsilon, BLOCK=power_of_2(width), RANK=self.ranks.rank, WORLD=self.ranks.size, PDL=self.pdl,
            launch_pdl=self.pdl, num_warps=8,
        )  # fmt: skip

    def _linear(self, x: Tensor, weight: Tensor, out: Tensor, gated: bool = False) -> None:
        """out = x @ weight.T; gated: silu of the first half of the outputs times the second.

        The tiles are the best of a dozen on an H100: one row reads 2.4 to 3.1 TB/s of weights, where cuBLAS reads 1.9 to 2.6.
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

    def _gate(self, both: Tensor, out: Tensor) -> None:
        kernels.gate_kernel[(len(both), -(-self.inner // 1024))](both, out, self.inner, BLOCK=1024, PDL=False)

    def _choose(self, logits: Tensor, slots: Tensor, chosen: Tensor, advance: int) -> None:
        kernels.choose_kernel[(len(logits),)](
            logits, slots, self.tokens, self.positions, chosen, self.all_best, self.choose_signals, self.choose_epochs,
            self.vocab_rows, self.config.vocab_size, self.idle_slot, advance,
            BLOCK=2048, RANK=self.ranks.rank, WORLD=self.ranks.size, PDL=self.pdl, launch_pdl=self.pdl, num_warps=8,
        )  # fmt: skip

    # --- prompts ---

    def _prompts(self, chunks: Sequence[Chunk]) -> Tensor:
        """Pieces of prompts, packed: this rank's logits, float32 (sum of n_logits, vocab_rows)."""
        spans, begin = [], 0
        for chunk in chunks:
            spans.append((chunk, begin, begin + len(chunk.token_ids)))
            begin = spans[-1][2]
        tokens = [token for chunk in chunks for token in chunk.token_ids]
        positions = [chunk.start + n for chunk in chunks for n in range(len(chunk.token_ids))]
        slots = [chunk.slot for chunk in chunks for _ in chunk.token_ids]
        last = [row for chunk, _, end in spans for row in range(end - chunk.n_logits, end)]
        whole = not any(chunk.start for chunk in chunks) and len(chunks) < PROMPTS and len(last) <= PROMPTS
        if whole and (size := next((size for size in sorted(self.prompt_graphs) if size >= len(tokens)), 0)):
            padding = size - len(tokens)
            begins = [begin for _, begin, _ in spans] + [len(tokens)] + [size] * (PROMPTS - len(spans))
            idle, no_row = [self.idle_slot] * padding, [0] * (PROMPTS - len(last))
            parts = (tokens, [0] * padding, positions, [0] * padding, slots, idle, begins, last, no_row)
            self.packed[: 3 * size + 2 * PROMPTS + 1] = self._upload([number for part in parts for number in part])
            self.prompt_graphs[size].replay()
            return self.prompt_logits[: len(last)]

        def attend(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            mixed = torch.empty(q.shape, dtype=self.dtype, device=self.device)
            for chunk, begin, end in spans:
                mixed[begin:end] = self._attend(chunk, q[begin:end], k[begin:end], v[begin:end], keys, values)
            return mixed

        logits = torch.empty(len(last), self.vocab_rows, dtype=torch.float32, device=self.device)
        self._network(
            self._upload(tokens), self._upload(positions), self._upload(slots), self._upload(last), attend, logits
        )
        return logits

    def _packed_prompts(self, size: int) -> None:
        """Whole prompts of `size` tokens together, as self.packed has them; what fills them up is a prompt too, of the idle slot."""
        sizes = (size, size, size, PROMPTS + 1, PROMPTS)
        tokens, positions, slots, begins, last = self.packed[: sum(sizes)].split(sizes)

        def attend(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            return flash_attention(q, k, v, begins, size)

        self._network(tokens, positions, slots, last, attend, self.prompt_logits)

    def _network(
        self,
        tokens: Tensor,
        positions: Tensor,
        slots: Tensor,
        last: Tensor,
        attend: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor],
        logits: Tensor,
    ) -> None:
        """All layers over packed tokens (tokens,); logits (len(last), vocab_rows) of the rows `last`.

        attend: rotated queries (tokens, heads, size), keys and values of these tokens, and a layer's cache, to (tokens, heads, size).
        """
        config, weights, width = self.config, self.weights, self.config.hidden_size
        heads, kv_heads, size = self.heads, self.kv_heads, self.size
        names, gains = self._layers()
        x = weights["transformer.vocab_embedding.weight"][tokens]  # (tokens, hidden)
        normed = torch.empty_like(x)
        kernels.norm_kernel[(len(x),)](
            x, gains[0], normed, width, config.norm_epsilon, BLOCK=power_of_2(width), num_warps=8
        )
        for index, name in enumerate(names):
            keys, values = self.cache[index]
            qkv = F.linear(normed, weights[name + "attention.qkv.weight"])
            kernels.turn_kernel[(len(x), heads + 2 * kv_heads)](
                qkv, keys, values, self.tables, slots, positions, self.cos, self.sin, self.tables.shape[1],
                HEADS=heads, KV_HEADS=kv_heads, SIZE=size, SIZE_PADDED=self.size_padded, BLOCK=BLOCK_TOKENS, num_warps=1,
            )  # fmt: skip
            mixed = attend(*qkv.view(len(x), -1, size).split((heads, kv_heads, kv_heads), dim=1), keys, values)
            torch.mm(
                mixed.reshape(len(x), -1), weights[name + "attention.dense.weight"].t(), out=self.parts[0][: len(x)]
            )
            self._join(0, x, normed, weights[name + "post_layernorm.weight"])
            inner = torch.empty(len(x), self.inner, dtype=self.dtype, device=self.device)
            self._gate(F.linear(normed, weights[name + "mlp.both.weight"]), inner)
            torch.mm(inner, weights[name + "mlp.proj.weight"].t(), out=self.parts[1][: len(x)])
            self._join(1, x, normed, gains[index + 1])
        if len(last):
            self._linear(normed[last], weights["lm_head.weight"], logits)

    def _attend(self, chunk: Chunk, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """(tokens of the chunk, heads, size); what came before the chunk is in the cache."""
        if chunk.start == 0:
            out = F.scaled_dot_product_attention(
                *(part.transpose(0, 1)[None] for part in (q, k, v)),
                is_causal=True,
                enable_gqa=self.heads > self.kv_heads,
            )
            return out[0].transpose(0, 1)
        length = chunk.start + len(q)
        blocks = self.tables[chunk.slot, : -(-length // BLOCK_TOKENS)]
        # (blocks, kv_heads, BLOCK_TOKENS, size) -> (kv_heads, length, size)
        seen_k, seen_v = (
            cache[blocks].transpose(0, 1).reshape(self.kv_heads, -1, self.size)[:, :length] for cache in (keys, values)
        )
        causal = torch.ones(len(q), length, dtype=torch.bool, device=self.device).tril(chunk.start)
        out = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None], seen_k[None], seen_v[None], attn_mask=causal, enable_gqa=self.heads > self.kv_heads
        )
        return out[0].transpose(0, 1)

    def _choose_prompts(self, chunks: Sequence[Chunk], logits: Tensor) -> Tensor:
        """The best first token of each prompt that ends here; from now on its slot decodes."""
        ends = [chunk for chunk in chunks if chunk.n_logits]
        rows, last = [], -1
        for chunk in ends:
            last += chunk.n_logits
            rows.append(last)
        slots, counts = self._upload([c.slot for c in ends]), self._upload([c.start + len(c.token_ids) for c in ends])
        self.positions[slots] = counts
        best = logits if len(rows) == len(logits) else logits[self._upload(rows)]
        self._choose(best, slots, self.chosen_ends, 0)
        return self.chosen_ends[: len(ends)]
