"""Kernels of the engine on NVIDIA GPUs, in the Triton language: the compiler that PyTorch brings, not NVIDIA's server.

A step of one token for each of a few requests is bound by memory. So every weight is read once, there are few kernels,
and each reads its operands once. On GPUs since Hopper a kernel starts to load its weights while the one before it ends
(PDL, "programmatic dependent launch" in the CUDA programming guide). Accumulations are float32.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

# positions in one block of the key/value cache: one tile of `attend`
BLOCK_TOKENS = 64


@triton.jit
def _begin(PDL: tl.constexpr):
    """Lets the next kernel of the stream start, and waits for what the one before it wrote."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def _meet(signals, epochs, row, RANK: tl.constexpr, WORLD: tl.constexpr):
    """Waits until this program of every rank has come here; what each rank's kernels wrote before is then visible to
    all.

    signals: int64 addresses of each rank's int32 (rows, WORLD); epochs: int32 (rows), how often this rank has met the
    others. The numbers only grow, so they need no reset and cross NVLink in one direction only. They may wrap.
    """
    epoch = tl.load(epochs + row) + 1
    tl.store(epochs + row, epoch)
    for peer in tl.static_range(WORLD):
        if peer != RANK:
            theirs = tl.load(signals + peer).to(tl.pointer_type(tl.int32))
            tl.atomic_xchg(theirs + row * WORLD + RANK, epoch, sem="release", scope="sys")
    mine = tl.load(signals + RANK).to(tl.pointer_type(tl.int32)) + row * WORLD
    for peer in tl.static_range(WORLD):
        if peer != RANK:
            while tl.atomic_add(mine + peer, 0, sem="acquire", scope="sys") - epoch < 0:
                pass


@triton.jit
def _normed(x, gain, column, live, width, epsilon):
    """RMSNorm of one row, float32; `gain` points to the weights."""
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / width + epsilon)
    return x * scale * tl.load(gain + column, mask=live, other=0.0).to(tl.float32)


@triton.jit
def embed_kernel(tokens, slots, table, gain, x, normed, width, epsilon, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """x (rows, width): the embedding of each slot's last token; normed: its RMSNorm. One program per row."""
    _begin(PDL)
    row = tl.program_id(0)
    token = tl.load(tokens + tl.load(slots + row)).to(tl.int64)
    column = tl.arange(0, BLOCK)
    live = column < width
    value = tl.load(table + token * width + column, mask=live, other=0.0)
    tl.store(x + row * width + column, value, mask=live)
    out = _normed(value.to(tl.float32), gain, column, live, width, epsilon)
    tl.store(normed + row * width + column, out.to(normed.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["n_rows"])  # any number of rows, without compiling again while a request waits
def join_kernel(
    x, parts, signals, epochs, at, gain, normed, n_rows, width, epsilon,
    BLOCK: tl.constexpr, RANK: tl.constexpr, WORLD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """x (n_rows, width) += the sum of all ranks' parts (all-reduce); normed: RMSNorm of the new x.

    parts: int64 addresses of each rank's buffer; `at`: where in it this product begins. Every rank adds in the order of
    the ranks, so that all hold the same x to the bit. Two buffers in turn are enough: a rank that arrives the second
    time knows that all ranks have arrived once. Each program meets the same program of the other ranks once; all must
    run at the same time.
    """
    _begin(PDL)
    column = tl.arange(0, BLOCK)
    live = column < width
    if WORLD > 1:
        _meet(signals, epochs, tl.program_id(0), RANK, WORLD)
    for row in range(tl.program_id(0), n_rows, tl.num_programs(0)):
        start = row * width
        value = tl.load(x + start + column, mask=live, other=0.0).to(tl.float32)
        for peer in tl.static_range(WORLD):
            # The compiler does not know how a loaded address is aligned: without the hint it reads element by element,
            # at 40 GB/s. The load skips the first-level cache, because _meet has ordered it after what the peer wrote.
            part = tl.multiple_of(tl.load(parts + peer).to(tl.pointer_type(x.dtype.element_ty)), 16) + at + start
            value += tl.load(part + column, mask=live, other=0.0, cache_modifier=".cg").to(tl.float32)
        value = value.to(x.dtype.element_ty)
        tl.store(x + start + column, value, mask=live)
        out = _normed(value.to(tl.float32), gain, column, live, width, epsilon)
        tl.store(normed + start + column, out.to(normed.dtype.element_ty), mask=live)


@triton.jit
def _pair(words, KIND: tl.constexpr):
    """The two 16-bit numbers of each 32-bit word, low one first, as float32; a float32 word is one number, and the
    second is 0."""
    if tl.float32 == KIND:
        low = words.to(tl.float32, bitcast=True)
        high = tl.zeros_like(low)
    else:
        low = (words & 0xFFFF).to(tl.int16).to(KIND, bitcast=True).to(tl.float32)
        high = ((words >> 16) & 0xFFFF).to(tl.int16).to(KIND, bitcast=True).to(tl.float32)
    return low, high


@triton.jit
def _word(low, high, KIND: tl.constexpr):
    """The reverse of _pair: float32 to int32 words."""
    if tl.float32 == KIND:
        word = low.to(tl.int32, bitcast=True)
    else:
        first = low.to(KIND).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        word = first | (high.to(KIND).to(tl.int16, bitcast=True).to(tl.int32) << 16)
    return word


@triton.jit
def push_kernel(
    x, part, inboxes, epochs, at, gain, normed, width, words, epsilon,
    KIND: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, RANK: tl.constexpr, WORLD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """join_kernel for a few rows: each rank writes its part into the others' memory, and waits only for its own.

    Every 32-bit word of a row travels in one 64-bit store together with the number of this meeting, so a reader that
    sees the number has the word (NCCL's protocol LL). That is one way over NVLink, where join_kernel takes three
    (signal, request, answer). It sends twice the bytes, so it is for few rows.

    x, normed (rows, width) and gain (width) are read as `words` int32 words a row; part (rows, width): this rank's
    product.
    inboxes: int64 addresses of each rank's int64 (2, WORLD, ROWS, words); `at`: the first word of one of the two. They
    are used in turn: when a rank arrives here, every other rank has read what was sent two meetings ago. epochs: int32
    (ROWS). One program per row.
    """
    _begin(PDL)
    row = tl.program_id(0)
    epoch = tl.load(epochs + row) + 1
    tl.store(epochs + row, epoch)
    column = tl.arange(0, BLOCK)
    live = column < words
    start = row * words + column
    mine = tl.load(part.to(tl.pointer_type(tl.int32)) + start, mask=live, other=0)
    told = (epoch.to(tl.int64) << 32) | (mine.to(tl.int64) & 0xFFFFFFFF)
    for peer in tl.static_range(WORLD):
        if peer != RANK:
            theirs = tl.multiple_of(tl.load(inboxes + peer).to(tl.pointer_type(tl.int64)), 16) + at
            tl.store(theirs + (RANK * ROWS + row) * words + column, told, mask=live)
    low, high = _pair(tl.load(x.to(tl.pointer_type(tl.int32)) + start, mask=live, other=0), KIND)
    inbox = tl.multiple_of(tl.load(inboxes + RANK).to(tl.pointer_type(tl.int64)), 16) + at + row * words + column
    for peer in tl.static_range(WORLD):
        if peer == RANK:
            word = mine
        else:
            came = tl.load(inbox + peer * ROWS * words, mask=live, other=0, volatile=True)
            while tl.sum((live & ((came >> 32).to(tl.int32) != epoch)).to(tl.int32), axis=0) > 0:
                came = tl.load(inbox + peer * ROWS * words, mask=live, other=0, volatile=True)
            word = came.to(tl.int32)
        its_low, its_high = _pair(word, KIND)
        low += its_low
        high += its_high
    value = _word(low, high, KIND)
    tl.store(x.to(tl.pointer_type(tl.int32)) + start, value, mask=live)
    low, high = _pair(value, KIND)
    scale = tl.rsqrt(tl.sum(low * low + high * high, axis=0) / width + epsilon)
    gain_low, gain_high = _pair(tl.load(gain.to(tl.pointer_type(tl.int32)) + column, mask=live, other=0), KIND)
    out = _word(low * scale * gain_low, high * scale * gain_high, KIND)
    tl.store(normed.to(tl.pointer_type(tl.int32)) + start, out, mask=live)


@triton.jit
def norm_kernel(x, gain, out, width, epsilon, BLOCK: tl.constexpr):
    """out = RMSNorm of x (rows, width). One program per row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    live = column < width
    value = tl.load(x + row * width + column, mask=live, other=0.0).to(tl.float32)
    value = _normed(value, gain, column, live, width, epsilon)
    tl.store(out + row * width + column, value.to(out.dtype.element_ty), mask=live)


@triton.jit
def matvec_kernel(
    x, weight, out, n_out, n_in, GATED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PDL: tl.constexpr
):
    """out (n_out) = weight (n_out, n_in) @ x (n_in). GATED: weight is (2 * n_out, n_in), out = silu(first half @ x) *
    (second @ x)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    here = weight + row.to(tl.int64)[:, None] * n_in + column[None, :]
    live = (row < n_out)[:, None] & (column < n_in)[None, :]
    # weights depend on no kernel, so the load of the first tile starts before the wait
    tile = tl.load(here, mask=live, other=0.0, eviction_policy="evict_first")
    if GATED:
        up_here = here + n_out.to(tl.int64) * n_in
        up_tile = tl.load(up_here, mask=live, other=0.0, eviction_policy="evict_first")
    _begin(PDL)
    value = tl.load(x + column, mask=column < n_in, other=0.0).to(tl.float32)[None, :]
    sums = tile.to(tl.float32) * value
    if GATED:
        up_sums = up_tile.to(tl.float32) * value
    for begin in range(COLUMNS, n_in, COLUMNS):
        live = (row < n_out)[:, None] & (begin + column < n_in)[None, :]
        value = tl.load(x + begin + column, mask=begin + column < n_in, other=0.0).to(tl.float32)[None, :]
        sums += tl.load(here + begin, mask=live, other=0.0, eviction_policy="evict_first").to(tl.float32) * value
        if GATED:
            up = tl.load(up_here + begin, mask=live, other=0.0, eviction_policy="evict_first")
            up_sums += up.to(tl.float32) * value
    result = tl.sum(sums, axis=1)
    if GATED:
        result = result * tl.sigmoid(result) * tl.sum(up_sums, axis=1)
    tl.store(out + row, result.to(out.dtype.element_ty), mask=row < n_out)


@triton.jit(do_not_specialize=["n_rows"])  # any number of rows, without compiling again while a request waits
def rows_kernel(
    x, weight, out, n_rows, n_out, n_in, out_stride,
    GATED: tl.constexpr, ROWS: tl.constexpr, OUTS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The same for a few rows: out (n_rows, n_out) = x (n_rows, n_in) @ weight.T; the rows fit one tile, the weights
    are read once."""
    line = tl.program_id(0) * OUTS + tl.arange(0, OUTS)
    row = tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    _begin(PDL)
    sums = tl.zeros((ROWS, OUTS), dtype=tl.float32)
    up_sums = tl.zeros((ROWS, OUTS), dtype=tl.float32)
    here = weight + line.to(tl.int64)[None, :] * n_in
    for begin in range(0, n_in, COLUMNS):
        at = begin + column
        value = tl.load(
            x + row[:, None] * n_in + at[None, :], mask=(row < n_rows)[:, None] & (at < n_in)[None, :], other=0.0
        )
        live = (line < n_out)[None, :] & (at < n_in)[:, None]
        tile = tl.load(here + at[:, None], mask=live, other=0.0, eviction_policy="evict_first")
        sums = tl.dot(value, tile, sums, input_precision=PRECISION)
        if GATED:
            tile = tl.load(
                here + n_out.to(tl.int64) * n_in + at[:, None], mask=live, other=0.0, eviction_policy="evict_first"
            )
            up_sums = tl.dot(value, tile, up_sums, input_precision=PRECISION)
    if GATED:
        sums = sums * tl.sigmoid(sums) * up_sums
    live = (row < n_rows)[:, None] & (line < n_out)[None, :]
    tl.store(out + row.to(tl.int64)[:, None] * out_stride + line[None, :], sums.to(out.dtype.element_ty), mask=live)


@triton.jit
def gate_kernel(both, out, inner, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """out (rows, inner) = silu(both[:, :inner]) * both[:, inner:]. Programs: (rows, blocks of a row)."""
    _begin(PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = column < inner
    gate = tl.load(both + row * 2 * inner + column, mask=live, other=0.0).to(tl.float32)
    up = tl.load(both + row * 2 * inner + inner + column, mask=live, other=0.0).to(tl.float32)
    tl.store(out + row * inner + column, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=live)


@triton.jit
def _turned(start, cos, sin, position, offset, live, SIZE: tl.constexpr):
    """A head's values at `start` + offset, rotated by its position (the halves of Hugging Face); float32. offset:
    elements of the head."""
    half: tl.constexpr = SIZE // 2
    partner = tl.where(offset < half, offset + half, offset - half)
    sign = tl.where(offset < half, -1.0, 1.0)
    value = tl.load(start + offset, mask=live, other=0.0).to(tl.float32)
    other = tl.load(start + partner, mask=live, other=0.0).to(tl.float32)
    angle = position * SIZE + offset
    return value * tl.load(cos + angle, mask=live, other=0.0) + sign * other * tl.load(
        sin + angle, mask=live, other=0.0
    )


@triton.jit
def turn_kernel(
    qkv, keys, values, tables, slots, positions, cos, sin, table_stride,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, SIZE: tl.constexpr, SIZE_PADDED: tl.constexpr, BLOCK: tl.constexpr,
    TOGETHER: tl.constexpr,
):  # fmt: skip
    """For prompts: rotates queries and keys of qkv (tokens, HEADS + 2 KV_HEADS, SIZE) in place; keys and values also go
    to the cache.

    Programs: (tokens, groups of TOGETHER heads).
    """
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * TOGETHER + tl.arange(0, TOGETHER)[:, None]
    position = tl.load(positions + token)
    offset = tl.arange(0, SIZE_PADDED)[None, :]
    live = (offset < SIZE) & (head < HEADS + 2 * KV_HEADS)
    start = qkv + (token * (HEADS + 2 * KV_HEADS) + head) * SIZE
    plain = tl.load(start + offset, mask=live, other=0.0)
    turns = live & (head < HEADS + KV_HEADS)
    turned = _turned(start, cos, sin, position, offset, turns, SIZE).to(qkv.dtype.element_ty)
    tl.debug_barrier()  # all of it is read before any of it is written
    tl.store(start + offset, turned, mask=turns)
    block = tl.load(tables + tl.load(slots + token) * table_stride + position // BLOCK).to(tl.int64)
    place = ((block * KV_HEADS + (head - HEADS) % KV_HEADS) * BLOCK + position % BLOCK) * SIZE + offset
    tl.store(keys + place, turned, mask=turns & (head >= HEADS))
    tl.store(values + place, plain, mask=live & (head >= HEADS + KV_HEADS))


@triton.jit
def prompt_attend_kernel(
    qkv, out, keys, values, tables, work, table_stride, scale,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, SIZE: tl.constexpr, SIZE_PADDED: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Causal attention of pieces of prompts to all that their sequences have in the cache, themselves included.

    qkv (tokens, KV_HEADS * (GROUP + 2), SIZE), rotated; out (tokens, KV_HEADS * GROUP, SIZE); keys, values and tables
    as in attend_kernel. work (tiles, 4): first row, rows (at most ROWS; 0: nothing to do), slot, position of the
    first row in its sequence.
    Programs: (tiles, KV_HEADS * GROUP).
    """
    tile, head = tl.program_id(0), tl.program_id(1)
    first, n_rows = tl.load(work + 4 * tile), tl.load(work + 4 * tile + 1)
    if n_rows == 0:
        return
    slot, position = tl.load(work + 4 * tile + 2), tl.load(work + 4 * tile + 3)
    heads: tl.constexpr = KV_HEADS * (GROUP + 2)
    kind = qkv.dtype.element_ty
    offset, line, inner = tl.arange(0, SIZE_PADDED), tl.arange(0, ROWS), tl.arange(0, BLOCK)
    inside = offset < SIZE
    live = (line < n_rows)[:, None] & inside[None, :]
    token = (first + line).to(tl.int64)[:, None]
    query = tl.load(qkv + (token * heads + head) * SIZE + offset[None, :], mask=live, other=0.0)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS, SIZE_PADDED), tl.float32)
    table = tables + slot * table_stride
    place = inner[:, None] * SIZE + offset[None, :]
    to_log2 = scale * 1.4426950408889634
    n_whole = (position + 1) // BLOCK  # blocks that every row sees whole
    for index in range(0, n_whole):
        block = (tl.load(table + index).to(tl.int64) * KV_HEADS + head // GROUP) * BLOCK * SIZE
        seen = tl.load(keys + block + place, mask=inside[None, :], other=0.0)
        score = tl.dot(query, tl.trans(seen), input_precision=PRECISION) * to_log2
        new_top = tl.maximum(top, tl.max(score, axis=1))
        weight = tl.exp2(score - new_top[:, None])
        keep = tl.exp2(top - new_top)
        total = total * keep + tl.sum(weight, axis=1)
        seen = tl.load(values + block + place, mask=inside[None, :], other=0.0)
        mixed = tl.dot(weight.to(kind), seen, mixed * keep[:, None], input_precision=PRECISION)
        top = new_top
    for index in range(n_whole, (position + n_rows + BLOCK - 1) // BLOCK):
        block = (tl.load(table + index).to(tl.int64) * KV_HEADS + head // GROUP) * BLOCK * SIZE
        seen = tl.load(keys + block + place, mask=inside[None, :], other=0.0)
        score = tl.dot(query, tl.trans(seen), input_precision=PRECISION) * to_log2
        at = index * BLOCK + inner
        score = tl.where(at[None, :] <= (position + line)[:, None], score, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, axis=1))
        weight = tl.exp2(score - new_top[:, None])
        keep = tl.exp2(top - new_top)
        total = total * keep + tl.sum(weight, axis=1)
        # a position that was never written may hold anything, also NaN
        seen = tl.load(values + block + place, mask=inside[None, :] & (at < position + n_rows)[:, None], other=0.0)
        mixed = tl.dot(weight.to(kind), seen, mixed * keep[:, None], input_precision=PRECISION)
        top = new_top
    answer = out + (token * KV_HEADS * GROUP + head) * SIZE + offset[None, :]
    tl.store(answer, (mixed / total[:, None]).to(kind), mask=live)


@triton.jit
def attend_kernel(
    qkv, out, keys, values, tables, slots, positions, cos, sin, partial, partial_max, partial_sum, arrived, table_stride, scale,
    GROUP: tl.constexpr, GROUP_PADDED: tl.constexpr, KV_HEADS: tl.constexpr, SIZE: tl.constexpr, SIZE_PADDED: tl.constexpr,
    BLOCK: tl.constexpr, SPLITS: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One new token for each row: rotates its query and key, remembers its key and value, attends to all its positions.

    qkv (rows, KV_HEADS * (GROUP + 2), SIZE): queries, keys, values; out (rows, KV_HEADS * GROUP, SIZE); keys, values
    (blocks, KV_HEADS, BLOCK, SIZE); tables (slots, table_stride): blocks of each slot; positions (slots): tokens that a
    slot has in the cache.
    Programs: (rows, KV_HEADS, SPLITS). The splits of a long sequence are joined by the last one to arrive ("flash
    decoding").
    """
    _begin(PDL)
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    slot = tl.load(slots + row)
    length = tl.load(positions + slot)
    n_blocks = (length + BLOCK - 1) // BLOCK
    each = tl.maximum((n_blocks + SPLITS - 1) // SPLITS, 1)
    used = tl.maximum((n_blocks + each - 1) // each, 1)
    if split >= used:
        return
    heads: tl.constexpr = KV_HEADS * (GROUP + 2)
    kind = qkv.dtype.element_ty
    offset = tl.arange(0, SIZE_PADDED)
    member = tl.arange(0, GROUP_PADDED)
    inside = offset < SIZE
    live = (member < GROUP)[:, None] & inside[None, :]
    start = qkv + row * heads * SIZE
    place = (head * GROUP + member)[:, None] * SIZE
    query = _turned(start + place, cos, sin, length, offset[None, :], live, SIZE) * scale  # (GROUP_PADDED, SIZE_PADDED)
    top = tl.full((GROUP_PADDED,), float("-inf"), tl.float32)
    total = tl.zeros((GROUP_PADDED,), tl.float32)
    mixed = tl.zeros((GROUP_PADDED, SIZE_PADDED), tl.float32)
    table = tables + slot * table_stride
    if split == 0:  # the new token itself
        key = _turned(start + (KV_HEADS * GROUP + head) * SIZE, cos, sin, length, offset, inside, SIZE).to(kind)
        value = tl.load(start + (KV_HEADS * GROUP + KV_HEADS + head) * SIZE + offset, mask=inside, other=0.0)
        block = tl.load(table + length // BLOCK).to(tl.int64)
        cached = ((block * KV_HEADS + head) * BLOCK + length % BLOCK) * SIZE + offset
        tl.store(keys + cached, key, mask=inside)
        tl.store(values + cached, value, mask=inside)
        top = tl.sum(query.to(kind).to(tl.float32) * key.to(tl.float32)[None, :], axis=1)
        total = tl.full((GROUP_PADDED,), 1.0, tl.float32)
        mixed = tl.zeros((GROUP_PADDED, SIZE_PADDED), tl.float32) + value.to(tl.float32)[None, :]
    query = query.to(kind)
    inner = tl.arange(0, BLOCK)
    for index in range(split * each, tl.minimum((split + 1) * each, n_blocks)):
        block = tl.load(table + index).to(tl.int64)
        tile = ((block * KV_HEADS + head) * BLOCK + inner)[:, None] * SIZE + offset[None, :]
        seen = tl.load(keys + tile, mask=inside[None, :], other=0.0)  # (BLOCK, SIZE_PADDED)
        score = tl.dot(query, tl.trans(seen), input_precision=PRECISION)
        score = tl.where((index * BLOCK + inner < length)[None, :], score, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, axis=1))
        weight = tl.exp(score - new_top[:, None])
        keep = tl.exp(top - new_top)
        total = total * keep + tl.sum(weight, axis=1)
        # a position that was never written may hold anything, also NaN
        seen = tl.load(values + tile, mask=inside[None, :] & (index * BLOCK + inner < length)[:, None], other=0.0)
        mixed = tl.dot(weight.to(kind), seen, mixed * keep[:, None], input_precision=PRECISION)
        top = new_top
    answer = out + row * KV_HEADS * GROUP * SIZE + place + offset[None, :]
    if used == 1:
        tl.store(answer, (mixed / total[:, None]).to(kind), mask=live)
        return
    group = (row * KV_HEADS + head) * SPLITS
    part = (group + split) * GROUP_PADDED + member
    tl.store(partial + part[:, None] * SIZE_PADDED + offset[None, :], mixed)
    tl.store(partial_max + part, top)
    tl.store(partial_sum + part, total)
    tl.debug_barrier()  # every thread has stored before one of them says so
    before = tl.atomic_add(arrived + row * KV_HEADS + head, 1, sem="acq_rel", scope="gpu")
    if before < used - 1:
        return
    tl.debug_barrier()
    top = tl.full((GROUP_PADDED,), float("-inf"), tl.float32)
    total = tl.zeros((GROUP_PADDED,), tl.float32)
    mixed = tl.zeros((GROUP_PADDED, SIZE_PADDED), tl.float32)
    for other in range(used):
        part = (group + other) * GROUP_PADDED + member
        its_top = tl.load(partial_max + part, volatile=True)
        new_top = tl.maximum(top, its_top)
        keep, take = tl.exp(top - new_top), tl.exp(its_top - new_top)
        total = total * keep + tl.load(partial_sum + part, volatile=True) * take
        its = tl.load(partial + part[:, None] * SIZE_PADDED + offset[None, :], volatile=True)
        mixed = mixed * keep[:, None] + its * take[:, None]
        top = new_top
    tl.store(answer, (mixed / total[:, None]).to(kind), mask=live)
    tl.store(arrived + row * KV_HEADS + head, 0)  # for the next layer


@triton.jit
def choose_kernel(
    logits, slots, tokens, positions, held, chosen, best, signals, epochs, width, vocab_size, idle_slot, advance,
    BLOCK: tl.constexpr, RANK: tl.constexpr, WORLD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Greedy choice over all ranks' logits (rows, width): the first of the best. One program per row.

    chosen (rows) and tokens[slot] become the token; positions[slot] grows by `advance`, except for the idle slot, which
    pads a batch. held (slots, 5): a count, then four tokens (-1: none) that may not be chosen while the sequence has
    fewer tokens.
    best: int64 addresses of each rank's float32 (rows, 2): its best logit and, as bits, that token.
    """
    _begin(PDL)
    row = tl.program_id(0)
    slot = tl.load(slots + row)
    length = tl.load(positions + slot) + advance
    early = length < tl.load(held + 5 * slot)
    first, second = tl.load(held + 5 * slot + 1), tl.load(held + 5 * slot + 2)
    third, fourth = tl.load(held + 5 * slot + 3), tl.load(held + 5 * slot + 4)
    column = tl.arange(0, BLOCK)
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    where = tl.zeros((BLOCK,), tl.int32)
    for begin in range(0, width, BLOCK):
        at = begin + column
        token_at = RANK * width + at
        banned = early & ((token_at == first) | (token_at == second) | (token_at == third) | (token_at == fourth))
        live = (at < width) & (token_at < vocab_size) & (banned == 0)
        value = tl.load(logits + row.to(tl.int64) * width + at, mask=live, other=float("-inf"))
        where = tl.where(value > top, at, where)
        top = tl.maximum(top, value)
    highest = tl.max(top, axis=0)
    token = tl.min(tl.where(top == highest, where, 2147483647), axis=0) + RANK * width
    if WORLD > 1:
        mine = tl.load(best + RANK).to(tl.pointer_type(tl.float32)) + 2 * row
        tl.store(mine, highest)
        tl.store(mine.to(tl.pointer_type(tl.int32)) + 1, token)
        tl.debug_barrier()
        _meet(signals, epochs, row, RANK, WORLD)
        highest = tl.full((), float("-inf"), tl.float32)
        for peer in tl.static_range(WORLD):
            theirs = tl.load(best + peer).to(tl.pointer_type(tl.float32)) + 2 * row
            its = tl.load(theirs, volatile=True)
            its_token = tl.load(theirs.to(tl.pointer_type(tl.int32)) + 1, volatile=True)
            token = tl.where(its > highest, its_token, token)
            highest = tl.maximum(highest, its)
    tl.store(chosen + row, token)
    tl.store(tokens + slot, token)
    if slot != idle_slot:
        tl.store(positions + slot, length)


def power_of_2(number: int) -> int:
    return int(triton.next_power_of_2(number))


def precision(dtype: Any) -> str:
    """float32 products stay float32 (not tf32), because float32 is for exact results."""
    return "ieee" if str(dtype) == "torch.float32" else "tf32"


def kind(dtype: Any) -> Any:
    """PyTorch's dtype in the Triton language."""
    return {"torch.float32": tl.float32, "torch.float16": tl.float16, "torch.bfloat16": tl.bfloat16}[str(dtype)]
