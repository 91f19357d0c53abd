"""Triton kernels that score tokens by gates; sizes as in `lora_kernels`."""

import triton
import triton.language as tl


@triton.jit
def _write_moments(x, moments, row, features, eps, BLOCK_X: tl.constexpr):
    """Write a row's mean, and 1 / (its deviation * sqrt(features)).

    It takes both about a value near the mean, so that nothing cancels.
    """
    at = tl.arange(0, BLOCK_X)
    x_row = x + row.to(tl.int64) * features
    u = tl.load(x_row + at, mask=at < features, other=0.0).to(tl.float32)
    pivot = tl.sum(u, 0) / tl.minimum(features, BLOCK_X)
    moved = tl.where(at < features, u - pivot, 0.0)
    squared = moved * moved
    for start in range(BLOCK_X, features, BLOCK_X):
        mask = start + at < features
        u = tl.load(x_row + start + at, mask=mask, other=0.0).to(tl.float32)
        step = tl.where(mask, u - pivot, 0.0)
        moved += step
        squared += step * step
    shift = tl.sum(moved, 0) / features
    variance = tl.sum(squared, 0) / features - shift * shift
    tl.store(moments + row * 2, pivot + shift)
    tl.store(moments + row * 2 + 1, tl.rsqrt((variance + eps) * features))


@triton.jit
def moments_kernel(
    x,  # [T, I]
    moments,  # out, fp32 [T, 2]; see `_write_moments`
    counts,  # out, int32: set to zero
    features,
    groups,  # length of counts
    eps,
    BLOCK_X: tl.constexpr,
):
    row = tl.program_id(0)
    for start in range(row * BLOCK_X, groups, tl.num_programs(0) * BLOCK_X):
        group = start + tl.arange(0, BLOCK_X)
        tl.store(counts + group, tl.zeros((BLOCK_X,), tl.int32), mask=group < groups)
    _write_moments(x, moments, row, features, eps, BLOCK_X)


# The number of tokens changes from forward to forward: no kernel is compiled anew for it.
@triton.jit(do_not_specialize=["tokens"])
def scores_kernel(
    x,  # [T, I]
    signatures,  # [M, I], M >= pieces * N: the pieces of a signature add up to it
    partial,  # out, fp32 [splits, T, M]: x @ signatures.T over a split of the features
    moments,  # out where MOMENTS, fp32 [T, 2]
    tokens,
    columns,  # M
    features,
    split_features,
    eps,
    MOMENTS: tl.constexpr,  # whether some programs more write moments, a row each
    PRECISION: tl.constexpr,
    EVEN: tl.constexpr,  # BLOCK_I divides split_features, which divides features
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    """Nothing but the product may use a tile here: Triton 3.6 let one be overwritten too soon."""
    column_block, row_block, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if MOMENTS:
        nth = (column_block - tl.cdiv(columns, BLOCK_M)) * tl.num_programs(2) + split
        row = row_block * BLOCK_T + nth
        if nth >= 0:
            if nth < BLOCK_T and row < tokens:
                _write_moments(x, moments, row, features, eps, BLOCK_X)
            return
    rows = row_block * BLOCK_T + tl.arange(0, BLOCK_T)
    cols = column_block * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask, col_mask = rows < tokens, cols < columns
    x_rows = x + rows[:, None].to(tl.int64) * features
    v_rows = signatures + cols[None, :].to(tl.int64) * features
    first = split * split_features
    last = tl.minimum(first + split_features, features)
    total = tl.zeros((BLOCK_T, BLOCK_M), tl.float32)
    for start in range(first, last, BLOCK_I):
        at = start + tl.arange(0, BLOCK_I)
        if EVEN:
            u = tl.load(x_rows + at[None, :], mask=row_mask[:, None], other=0.0)
            v = tl.load(v_rows + at[:, None], mask=col_mask[None, :], other=0.0)
        else:
            inside = at < last
            u = tl.load(x_rows + at[None, :], mask=row_mask[:, None] & inside[None, :], other=0.0)
            v = tl.load(v_rows + at[:, None], mask=inside[:, None] & col_mask[None, :], other=0.0)
        total = tl.dot(u, v, total, input_precision=PRECISION)
    place = split.to(tl.int64) * tokens + rows
    tl.store(
        partial + place[:, None] * columns + cols[None, :],
        total,
        mask=row_mask[:, None] & col_mask[None, :],
    )


@triton.jit
def gate_scores(
    partial,
    moments,
    sums,  # fp32 [N]: of each signature, over its features
    prior,  # fp32 [T, C]: added to the scores of every part
    rows,
    row_mask,
    part,
    tokens,
    slots,
    columns,  # N
    stride,
    HAS_PRIOR: tl.constexpr,
    PIECES: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Scores [BLOCK_T, BLOCK_C] of `rows` at a part: x standardised, dot signature, / sqrt(I).

    And the prior of the token, if there is one.
    """
    mean = tl.load(moments + rows * 2, mask=row_mask, other=0.0)
    scale = tl.load(moments + rows * 2 + 1, mask=row_mask, other=0.0)
    slot = tl.arange(0, BLOCK_C)
    column = part * slots + slot
    mask = row_mask[:, None] & (slot < slots)[None, :]
    scores = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for split in tl.static_range(SPLITS):
        for piece in tl.static_range(PIECES):
            at = (split * tokens + rows).to(tl.int64) * stride + piece * columns
            scores += tl.load(partial + at[:, None] + column[None, :], mask=mask, other=0.0)
    scores -= mean[:, None] * tl.load(sums + column, mask=slot < slots, other=0.0)[None, :]
    scores = scores * scale[:, None]
    if HAS_PRIOR:
        at = rows.to(tl.int64) * slots
        scores += tl.load(prior + at[:, None] + slot[None, :], mask=mask, other=0.0)
    return scores
