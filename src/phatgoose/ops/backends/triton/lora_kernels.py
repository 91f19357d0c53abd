"""Triton kernels of the routed LoRA, for NVIDIA GPUs; on a CPU under TRITON_INTERPRET=1.

Sizes: T tokens, S parts (layers that share x), C slots of a part, N = S * C, K chosen per token and
part, R rank, I input and O output features.

Many tokens are grouped by (part, k, slot): each token-expert pair is appended to its group's row of
`members` [S*K*C, T] and counted in `counts` [S*K*C], so there is no sort, no host synchronisation
and no shape that depends on the data. A program of a grouped kernel finds its block of pairs from
the counts. The order inside a group is left to chance; no value depends on it.
"""

import triton
import triton.language as tl


# The number of tokens changes from forward to forward: no kernel is compiled anew for it.
@triton.jit(do_not_specialize=["pairs", "tokens"])
def group_kernel(
    experts,  # int64 [T, S, K]
    counts,  # in (zeros) and out, int32 [S*K*C]
    members,  # out, int32 [S*K*C, T]
    pairs,
    tokens,
    slots,
    SK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Groups the pairs of a routing that was chosen elsewhere."""
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    chosen = tl.load(experts + pair, mask=pair < pairs, other=-1).to(tl.int32)
    group = (pair % SK) * slots + chosen
    taken = chosen >= 0
    position = tl.atomic_add(counts + group, 1, mask=taken)
    tl.store(members + group.to(tl.int64) * tokens + position, pair // SK, mask=taken)


@triton.jit
def _find_block(
    counts,
    members,
    pile,
    tokens,
    slots,
    block,
    PILES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The nth block of pairs of the piles (part * K + k) from `pile` on, slot by slot.

    Returns its slot (-1: there is no such block), and for each of its pairs token, pile and mask.
    """
    slot = tl.arange(0, BLOCK_C)
    count = tl.zeros((BLOCK_C,), tl.int32)
    for p in tl.static_range(PILES):
        count += tl.load(counts + (pile + p) * slots + slot, mask=slot < slots, other=0)
    ends = tl.cumsum((count + BLOCK_T - 1) // BLOCK_T, 0)
    before = ends <= block
    found = tl.sum(before.to(tl.int32), 0)
    start = tl.max(tl.where(before, ends, 0), 0)
    position = (block - start) * BLOCK_T + tl.arange(0, BLOCK_T)
    token = tl.zeros((BLOCK_T,), tl.int32)
    mine = tl.zeros((BLOCK_T,), tl.int32)
    mask = position < 0
    for p in tl.static_range(PILES):
        group = (pile + p) * slots + tl.minimum(found, slots - 1)
        size = tl.where(found < slots, tl.load(counts + group), 0)
        here = (position >= 0) & (position < size)
        at = members + group.to(tl.int64) * tokens + position
        token = tl.where(here, tl.load(at, mask=here, other=0), token)
        mine = tl.where(here, pile + p, mine)
        mask = mask | here
        position -= size
    return tl.where(found < slots, found, -1), token, mine, mask


@triton.jit(do_not_specialize=["tokens"])
def down_kernel(
    x,  # [T, I], of a's dtype
    a,  # [S, C, R, I]
    weights,  # fp32 [T, S, K]
    counts,
    members,
    z,  # out, fp32 [T, S, K, R]: weight * A x, where an expert is chosen
    tokens,
    slots,
    features,
    rank,
    S: tl.constexpr,
    K: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN: tl.constexpr,  # BLOCK_I divides features
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    part = tl.program_id(1)
    slot, token, pile, mask = _find_block(
        counts, members, part * K, tokens, slots, tl.program_id(0), K, BLOCK_T, BLOCK_C
    )
    if slot >= 0:
        r = tl.arange(0, BLOCK_R)
        x_rows = x + token[:, None].to(tl.int64) * features
        a_rows = a + ((part * slots + slot).to(tl.int64) * rank + r[None, :]) * features
        total = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
        for start in range(0, features, BLOCK_I):
            at = start + tl.arange(0, BLOCK_I)
            if EVEN:
                u = tl.load(x_rows + at[None, :], mask=mask[:, None], other=0.0)
                v = tl.load(a_rows + at[:, None], mask=(r < rank)[None, :], other=0.0)
            else:
                inside = at < features
                u = tl.load(x_rows + at[None, :], mask=mask[:, None] & inside[None, :], other=0.0)
                v = tl.load(
                    a_rows + at[:, None], mask=inside[:, None] & (r < rank)[None, :], other=0.0
                )
            total = tl.dot(u, v, total, input_precision=PRECISION)
        place = token.to(tl.int64) * (S * K) + pile
        weight = tl.load(weights + place, mask=mask, other=0.0)
        tl.store(
            z + place[:, None] * rank + r[None, :],
            total * weight[:, None],
            mask=mask[:, None] & (r < rank)[None, :],
        )


@triton.jit(do_not_specialize=["tokens"])
def up_kernel(
    z,  # fp32 [T, S, K, R]
    b,  # [C, O, R] of one part
    output,  # in and out, [T, O], its rows `output_stride` apart
    output_stride,
    counts,
    members,
    pile,  # part * K + k
    tokens,
    slots,
    outputs,
    rank,
    first_output,
    SK: tl.constexpr,
    ATOMIC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_O: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """output += z B.T for the kth expert of each token.

    One launch adds to an element at most once, so the sum is the same every time. ATOMIC leaves
    adding to the L2 cache, which saves reading the output.
    """
    slot, token, _, mask = _find_block(
        counts, members, pile, tokens, slots, tl.program_id(1), 1, BLOCK_T, BLOCK_C
    )
    if slot >= 0:
        r = tl.arange(0, BLOCK_R)
        place = token.to(tl.int64) * SK + pile
        low = tl.load(
            z + place[:, None] * rank + r[None, :],
            mask=mask[:, None] & (r < rank)[None, :],
            other=0.0,
        ).to(b.dtype.element_ty)
        b_rows = b + slot.to(tl.int64) * outputs * rank
        y_rows = output + token[:, None].to(tl.int64) * output_stride
        for column in range(COLUMNS):
            o = first_output + (tl.program_id(0) * COLUMNS + column) * BLOCK_O
            at = o + tl.arange(0, BLOCK_O)
            inside = at < outputs
            v = tl.load(
                b_rows + at[None, :] * rank + r[:, None],
                mask=inside[None, :] & (r < rank)[:, None],
                other=0.0,
            )
            y_mask = mask[:, None] & inside[None, :]
            y = tl.dot(low, v, input_precision=PRECISION)
            if ATOMIC:
                y = y.to(output.dtype.element_ty)
                tl.atomic_add(y_rows + at[None, :], y, mask=y_mask, sem="relaxed")
            else:
                y += tl.load(y_rows + at[None, :], mask=y_mask, other=0.0).to(tl.float32)
                tl.store(y_rows + at[None, :], y.to(output.dtype.element_ty), mask=y_mask)


@triton.jit
def _few_up(
    z,
    b,
    experts,
    y_row,
    token,
    part,
    block,
    tokens,
    outputs,
    rank,
    SPLITS: tl.constexpr,
    S: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    nth = tl.arange(0, BLOCK_K)
    r = tl.arange(0, BLOCK_R)
    place = (token * S + part) * K + nth
    slot = tl.load(experts + place, mask=nth < K, other=-1)
    known = (slot >= 0)[:, None] & (r < rank)[None, :]
    low = tl.zeros((BLOCK_K, BLOCK_R), tl.float32)
    for split in tl.static_range(SPLITS):
        row = (split * tokens) * (S * K) + place
        low += tl.load(z + row[:, None] * rank + r[None, :], mask=known, other=0.0)
    b_rows = b + (slot * outputs)[:, None] * rank + r[None, :]
    at = block * BLOCK_O + tl.arange(0, BLOCK_O)
    inside = at < outputs
    # No branch for each expert, so that all loads are under way together.
    v = tl.load(
        b_rows[None, :, :] + at[:, None, None] * rank,
        mask=inside[:, None, None] & known[None, :, :],
        other=0.0,
    )
    y = tl.load(y_row + at, mask=inside, other=0.0).to(tl.float32)
    y += tl.sum(tl.sum(v.to(tl.float32) * low[None, :, :], 2), 1)
    tl.store(y_row + at, y.to(y_row.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def few_up_kernel(
    z,  # fp32 [>= SPLITS, T, S, K, R]
    b0,  # [C, O, R] of the first part that is added; b1 and b2 of the next ones
    b1,
    b2,
    experts,  # int64 [T, S, K]
    output,  # in and out: the outputs of PARTS parts side by side, rows `output_stride` apart
    output_stride,
    part,  # the first that is added
    tokens,
    outputs0,  # O of each of them
    outputs1,
    outputs2,
    rank,
    PARTS: tl.constexpr,  # 1 to 3
    SPLITS: tl.constexpr,
    S: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """output += the sum over k of z B.T, one token and some outputs of one part a program."""
    token = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0)
    y = output + token * output_stride
    next1 = block - tl.cdiv(outputs0, BLOCK_O)
    next2 = next1 - tl.cdiv(outputs1, BLOCK_O)
    if PARTS == 1 or next1 < 0:
        _few_up(
            z, b0, experts, y, token, part, block,
            tokens, outputs0, rank, SPLITS, S, K, BLOCK_K, BLOCK_R, BLOCK_O,
        )  # fmt: skip
    elif PARTS == 2 or next2 < 0:
        _few_up(
            z, b1, experts, y + outputs0, token, part + 1, next1,
            tokens, outputs1, rank, SPLITS, S, K, BLOCK_K, BLOCK_R, BLOCK_O,
        )  # fmt: skip
    else:
        _few_up(
            z, b2, experts, y + outputs0 + outputs1, token, part + 2, next2,
            tokens, outputs2, rank, SPLITS, S, K, BLOCK_K, BLOCK_R, BLOCK_O,
        )  # fmt: skip
