"""Every kernel of the torch engine in Triton's interpreter, on the CPU, against plain PyTorch.
Run by test_gpu_kernels.py."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are defined
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "model_repo_template" / "tensorrt_llm" / "1"))

import gpu_kernels as kernels  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn import functional as F  # noqa: E402

BLOCK = kernels.BLOCK_TOKENS


def close(found: Tensor, expected: Tensor, atol: float = 1e-4, rtol: float = 1e-5) -> None:
    torch.testing.assert_close(found.float(), expected.float(), rtol=rtol, atol=atol)


def gated(x: Tensor, weight: Tensor) -> Tensor:
    low, high = (x @ weight.T).chunk(2, dim=-1)
    return F.silu(low) * high


def check_linear(n_out: int, n_in: int) -> None:
    plain, both = torch.randn(n_out, n_in), torch.randn(2 * n_out, n_in)
    for rows in (1, 5):
        x, out = torch.randn(rows, n_in), torch.empty(rows, n_out)
        for weight, expected in ((plain, x @ plain.T), (both, gated(x, both))):
            if rows == 1:
                kernels.matvec_kernel[(-(-n_out // 4),)](
                    x, weight, out, n_out, n_in, GATED=weight is both, ROWS=4, COLUMNS=32, PDL=False
                )
            else:
                kernels.rows_kernel[(-(-n_out // 16),)](
                    x, weight, out, rows, n_out, n_in, n_out, GATED=weight is both, ROWS=16, OUTS=16, COLUMNS=32,
                    PRECISION="ieee", PDL=False,
                )  # fmt: skip
            close(out, expected)
    out = torch.empty(3, n_out)
    halves = torch.randn(3, 2 * n_out)
    kernels.gate_kernel[(3, 2)](halves, out, n_out, BLOCK=32, PDL=False)
    close(out, F.silu(halves[:, :n_out]) * halves[:, n_out:])


def turned(x: Tensor, cos: Tensor, sin: Tensor, position: int) -> Tensor:
    low, high = x.chunk(2, -1)
    return x * cos[position] + torch.cat((-high, low), -1) * sin[position]


def check_attention(group: int, kv_heads: int, size: int, splits: int) -> None:
    """Slots out of order, none, few and many tokens before; a head that is not a power of two."""
    rows, longest, padded, heads = 4, 400, 16, group * kv_heads
    per_slot = -(-longest // BLOCK)
    keys = torch.randn(4 * per_slot + 1, kv_heads, BLOCK, size)
    values = torch.randn_like(keys)
    tables = torch.randperm(4 * per_slot).view(4, per_slot).int() + 1
    slots, positions = torch.tensor([2, 0, 3, 1]).int(), torch.tensor([0, 64, 200, 330]).int()
    angles = torch.arange(longest)[:, None] * torch.rand(size // 2)
    angles = torch.cat((angles, angles), -1)
    cos, sin = angles.cos(), angles.sin()
    qkv, out = torch.randn(rows, (heads + 2 * kv_heads) * size), torch.empty(rows, heads * size)
    partial = torch.empty(rows * kv_heads * splits, 16, padded)
    tops, sums = torch.empty(rows * kv_heads * splits, 16), torch.empty(rows * kv_heads * splits, 16)
    arrived = torch.zeros(rows, kv_heads, dtype=torch.int32)
    old_keys, old_values = keys.clone(), values.clone()
    kernels.attend_kernel[(rows, kv_heads, splits)](
        qkv, out, keys, values, tables, slots, positions, cos, sin, partial, tops, sums, arrived, per_slot, size**-0.5, GROUP=group,
        GROUP_PADDED=16, KV_HEADS=kv_heads, SIZE=size, SIZE_PADDED=padded, BLOCK=BLOCK, SPLITS=splits, PRECISION="ieee", PDL=False,
    )  # fmt: skip
    for row, slot in enumerate(slots.tolist()):
        position = int(positions[slot])
        q, k, v = qkv[row].view(-1, size).split((heads, kv_heads, kv_heads))
        blocks = tables[slot].long()

        def seen(cache: Tensor, new: Tensor, blocks: Tensor = blocks, position: int = position) -> Tensor:
            return torch.cat((cache[blocks].transpose(0, 1).reshape(kv_heads, -1, size)[:, :position], new[:, None]), 1)

        k = turned(k, cos, sin, position)
        grouped = turned(q, cos, sin, position).view(kv_heads, group, size)
        expected = F.scaled_dot_product_attention(grouped, seen(old_keys, k), seen(old_values, v))
        close(out[row], expected.reshape(-1), atol=1e-3)
        close(keys[blocks[position // BLOCK], :, position % BLOCK], k)
        close(values[blocks[position // BLOCK], :, position % BLOCK], v)
    assert not arrived.any()

    packed = torch.randn(4, heads + 2 * kv_heads, size)
    was, of_slots, at = packed.clone(), torch.tensor([1, 1, 2, 2]).int(), torch.tensor([63, 64, 0, 1]).int()
    kernels.turn_kernel[(4, -(-(heads + 2 * kv_heads) // 4))](
        packed, keys, values, tables, of_slots, at, cos, sin, per_slot, HEADS=heads, KV_HEADS=kv_heads, SIZE=size,
        SIZE_PADDED=padded, BLOCK=BLOCK, TOGETHER=4,
    )  # fmt: skip
    for token, position in enumerate(at.tolist()):
        block = int(tables[of_slots[token], position // BLOCK])
        close(packed[token, : heads + kv_heads], turned(was[token, : heads + kv_heads], cos, sin, position))
        close(keys[block, :, position % BLOCK], packed[token, heads : heads + kv_heads])
        close(values[block, :, position % BLOCK], was[token, heads + kv_heads :])


def check_prompt_attention(group: int, kv_heads: int, size: int) -> None:
    """Pieces of three sequences: a whole prompt, one that goes on inside a block, one token;
    what was never written is NaN."""
    rows, padded, heads, per_slot = 32, 16, group * kv_heads, 6
    pieces = [(2, 0, 70), (0, 100, 33), (1, 64, 1)]  # slot, start, tokens
    keys = torch.full((4 * per_slot + 1, kv_heads, BLOCK, size), float("nan"))
    values = keys.clone()
    tables = torch.randperm(4 * per_slot).view(4, per_slot).int() + 1
    total = sum(tokens for _, _, tokens in pieces)
    qkv, out = torch.randn(total, (heads + 2 * kv_heads) * size), torch.full((total, heads * size), 7.0)
    work, expected, begin = [], [], 0
    for slot, start, tokens in pieces:
        k, v = torch.randn(2, start + tokens, kv_heads, size)
        for position in range(start + tokens):
            block = int(tables[slot, position // BLOCK])
            keys[block, :, position % BLOCK], values[block, :, position % BLOCK] = k[position], v[position]
        q = qkv[begin : begin + tokens].view(tokens, -1, size)[:, :heads].transpose(0, 1)
        causal = torch.ones(tokens, start + tokens, dtype=torch.bool).tril(start)
        old_k, old_v = (part.transpose(0, 1).repeat_interleave(group, 0) for part in (k, v))
        expected.append(F.scaled_dot_product_attention(q, old_k, old_v, attn_mask=causal).transpose(0, 1).flatten(1))
        work += [(begin + n, min(rows, tokens - n), slot, start + n) for n in range(0, tokens, rows)]
        begin += tokens
    work.insert(1, (0, 0, 0, 0))  # nothing to do
    kernels.prompt_attend_kernel[(len(work), heads)](
        qkv, out, keys, values, tables, torch.tensor(work).int(), per_slot, size**-0.5, GROUP=group, KV_HEADS=kv_heads, SIZE=size,
        SIZE_PADDED=padded, BLOCK=BLOCK, ROWS=rows, PRECISION="ieee",
    )  # fmt: skip
    close(out, torch.cat(expected), atol=1e-3)


def check_push(kind: torch.dtype, world: int) -> None:
    """Each rank's kernel in turn, with what the others push laid into its memory;
    what it pushes itself is held against that."""
    width, rows, most, epsilon = 50, 3, 4, 1e-5
    words = width * kind.itemsize // 4
    x, gain = torch.randn(rows, width).to(kind), torch.rand(width).to(kind)
    parts = torch.randn(world, rows, width).to(kind)
    whole = x.float()
    for part in parts:
        whole = whole + part.float()
    whole = whole.to(kind)
    for rank in range(world):
        inboxes = [torch.zeros(2, world, most, words, dtype=torch.int64) for _ in range(world)]
        epochs = torch.full((most,), 41, dtype=torch.int32)

        def told(sender: int) -> Tensor:
            return (42 << 32) | (parts[sender].view(torch.int32).long() & 0xFFFFFFFF)

        for sender in range(world):
            inboxes[rank][1, sender, :rows] = told(sender)
        mine, normed = x.clone(), torch.empty_like(x)
        kernels.push_kernel[(rows,)](
            mine, parts[rank], torch.tensor([inbox.data_ptr() for inbox in inboxes]), epochs, world * most * words, gain, normed, width,
            words, epsilon, KIND=kernels.kind(kind), ROWS=most, BLOCK=64, RANK=rank, WORLD=world, PDL=False,
        )  # fmt: skip
        assert epochs.tolist() == [42, 42, 42, 41]
        ulp = 2 * torch.finfo(kind).eps  # the interpreter cuts where a GPU rounds
        close(mine, whole, rtol=ulp)
        close(normed, F.rms_norm(whole.float(), (width,), gain.float(), epsilon), rtol=3 * ulp)
        for other in set(range(world)) - {rank}:
            assert torch.equal(inboxes[other][1, rank, :rows], told(rank))
            assert inboxes[other].count_nonzero() == rows * words


def check_ends() -> None:
    """Embedding, norms, the join of one rank, and the choice: ties, a padded vocabulary, the idle slot."""
    nowhere = torch.zeros(1, dtype=torch.int64)
    logits = torch.randn(3, 101)
    logits[0, 7] = logits[0, 50] = logits[:, 99] = 9.0
    slots = torch.tensor([1, 0, 3]).int()
    tokens, positions, chosen = (torch.zeros(n, dtype=torch.int32) for n in (4, 4, 3))
    held = torch.full((4, 5), -1, dtype=torch.int32)
    kernels.choose_kernel[(3,)](
        logits, slots, tokens, positions, held, chosen, nowhere, nowhere, chosen, 101, 97, 3, 1, BLOCK=32, RANK=0, WORLD=1, PDL=False
    )  # fmt: skip
    assert chosen.tolist() == logits[:, :97].argmax(-1).tolist() and chosen[0] == 7
    # an end token that may not be chosen yet: of slot 1 while it has fewer than 5 tokens, of slot 0 no longer
    best = chosen.tolist()
    held[1, :3], held[0, :2], again = torch.tensor([5, 3, best[0]]), torch.tensor([1, best[1]]), positions.clone()
    kernels.choose_kernel[(3,)](
        logits, slots, tokens.clone(), again, held, chosen, nowhere, nowhere, chosen, 101, 97, 3, 1, BLOCK=32, RANK=0, WORLD=1, PDL=False
    )  # fmt: skip
    assert chosen[0] == 50 and chosen.tolist()[1:] == best[1:]
    chosen.copy_(torch.tensor(best))
    assert positions.tolist() == [1, 1, 0, 0] and tokens[slots.long()].tolist() == chosen.tolist()
    table, gain, x, normed = torch.randn(101, 50), torch.rand(50), torch.empty(3, 50), torch.empty(3, 50)
    kernels.embed_kernel[(3,)](tokens, slots, table, gain, x, normed, 50, 1e-5, BLOCK=64, PDL=False)
    close(x, table[chosen.long()])
    close(normed, F.rms_norm(x, (50,), gain, 1e-5))
    part, before = torch.randn(3, 50), x.clone()
    kernels.join_kernel[(2,)](
        x, torch.tensor([part.data_ptr()]), nowhere, chosen, 0, gain, normed, 3, 50, 1e-5, BLOCK=64, RANK=0, WORLD=1, PDL=False
    )  # fmt: skip
    close(x, before + part)
    close(normed, F.rms_norm(x, (50,), gain, 1e-5))
    kernels.norm_kernel[(3,)](before, gain, normed, 50, 1e-5, BLOCK=64)
    close(normed, F.rms_norm(before, (50,), gain, 1e-5))


def main() -> None:
    torch.manual_seed(0)
    check_linear(10, 48)
    check_linear(33, 100)
    for shape in ((1, 3, 10, 4), (4, 2, 16, 1), (2, 2, 10, 8)):
        check_attention(*shape)
        check_prompt_attention(*shape[:3])
    for kind in (torch.float32, torch.float16, torch.bfloat16):
        check_push(kind, world=2)
        check_push(kind, world=4)
    check_ends()
    print("all kernels agree")


if __name__ == "__main__":
    main()
