"""Triton kernels that score tokens by gates and choose experts; sizes as in `lora_kernels`."""

import triton
import triton.language as tl


@triton.jit
def _write_moments(x, moments, row, features, eps, BLOCK_X: tl.constexpr):
    """A row's mean, and 1 / (its deviation * sqrt(features)).

    About a value near the mean, so that nothing cancels.
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


@triton.jit
def choose_best(
    scores,
    open_slots,  # [N]; 0 where a slot may not be chosen
    part,
    slots,
    temperature,
    null_score,
    HAS_NULL: tl.constexpr,
    UNIT: tl.constexpr,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Slots (-1: none) and weights [BLOCK_T, BLOCK_K] of the K best candidates of each row."""
    slot = tl.arange(0, BLOCK_C)
    is_open = tl.load(open_slots + part * slots + slot, mask=slot < slots, other=0) != 0
    scores = tl.where(is_open[None, :], scores, float("-inf"))
    if HAS_NULL:
        scores = tl.where((slot == slots)[None, :], null_score, scores)
    nth = tl.arange(0, BLOCK_K)
    kept = tl.full((BLOCK_T, BLOCK_K), float("-inf"), tl.float32)
    chosen = tl.full((BLOCK_T, BLOCK_K), -1, tl.int32)
    for k in tl.static_range(K):
        best = tl.max(scores, 1)
        at = tl.min(tl.where(scores == best[:, None], slot[None, :], BLOCK_C), 1)  # the lowest
        here = (nth == k)[None, :] & (best > float("-inf"))[:, None]
        kept = tl.where(here, best[:, None], kept)
        chosen = tl.where(here & (at < slots)[:, None], at[:, None], chosen)
        scores = tl.where(slot[None, :] == at[:, None], float("-inf"), scores)
    if UNIT:
        weights = tl.where(kept > float("-inf"), 1.0, 0.0)
    else:
        top = tl.max(kept, 1)
        top = tl.where(top > float("-inf"), top, 0.0)
        weights = tl.exp((kept - top[:, None]) / temperature)
        total = tl.sum(weights, 1)
        weights = weights / tl.where(total > 0.0, total, 1.0)[:, None]
    return chosen, weights


@triton.jit
def add_to_tally(at, chosen, shares, mask):
    """Add the shares to a row of the tally; the first column is for "no expert"."""
    tl.atomic_add(at + chosen + 1, shares, mask=mask, sem="relaxed")


@triton.jit(do_not_specialize=["tokens"])
def choose_kernel(
    partial,
    moments,
    sums,
    open_slots,
    prior,
    experts,  # out, int64 [T, S, K]
    weights,  # out, fp32 [T, S, K]
    tally,  # in and out where HAS_TALLY, fp32 [>= T, >= 1 + C]
    tally_stride,
    counts,  # in (zeros) and out, int32 [S*K*C]
    members,  # out, int32 [S*K*C, T]
    tokens,
    slots,
    columns,  # N
    stride,  # M, of a row of partial
    temperature,
    null_score,
    HAS_PRIOR: tl.constexpr,
    HAS_NULL: tl.constexpr,
    HAS_TALLY: tl.constexpr,
    UNIT: tl.constexpr,
    PIECES: tl.constexpr,
    SPLITS: tl.constexpr,
    S: tl.constexpr,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    part = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    row_mask = rows < tokens
    scores = gate_scores(
        partial,
        moments,
        sums,
        prior,
        rows,
        row_mask,
        part,
        tokens,
        slots,
        columns,
        stride,
        HAS_PRIOR,
        PIECES,
        SPLITS,
        BLOCK_T,
        BLOCK_C,
    )
    chosen, shares = choose_best(
        scores,
        open_slots,
        part,
        slots,
        temperature,
        null_score,
        HAS_NULL,
        UNIT,
        K,
        BLOCK_T,
        BLOCK_C,
        BLOCK_K,
    )
    nth = tl.arange(0, BLOCK_K)
    mask = row_mask[:, None] & (nth < K)[None, :]
    place = (rows[:, None].to(tl.int64) * S + part) * K + nth[None, :]
    tl.store(experts + place, chosen.to(tl.int64), mask=mask)
    tl.store(weights + place, shares, mask=mask)
    if HAS_TALLY:
        add_to_tally(tally + rows[:, None].to(tl.int64) * tally_stride, chosen, shares, mask)
    group = (part * K + nth[None, :]) * slots + chosen
    taken = mask & (chosen >= 0)
    position = tl.atomic_add(counts + group, 1, mask=taken)
    at = group.to(tl.int64) * tokens + position
    tl.store(members + at, tl.broadcast_to(rows[:, None], (BLOCK_T, BLOCK_K)), mask=taken)
