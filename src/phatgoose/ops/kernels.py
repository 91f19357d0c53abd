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


@triton.jit
def scores_kernel(
    x,  # [T, I]
    signatures,  # [M, I], M >= pieces * N: the pieces of a signature add up to it
    partial,  # out, fp32 [splits, T, M]: x @ signatures.T over a split of the features
    counts,  # out, int32: set to zero, for `choose_kernel`
    tokens,
    columns,  # M
    features,
    split_features,
    groups,  # length of counts
    PRECISION: tl.constexpr,
    EVEN: tl.constexpr,  # BLOCK_I divides split_features, which divides features
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """Nothing but the product may use a tile here: Triton 3.6 let one be overwritten too soon."""
    column_block, row_block, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if column_block + split == 0:
        for start in range(row_block * BLOCK_T, groups, tl.num_programs(1) * BLOCK_T):
            group = start + tl.arange(0, BLOCK_T)
            tl.store(counts + group, tl.zeros((BLOCK_T,), tl.int32), mask=group < groups)
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
def _moments(x, rows, row_mask, features, BLOCK_T: tl.constexpr, BLOCK_I: tl.constexpr):
    """Mean and variance of `rows` of x, about a value near the mean so that nothing cancels."""
    at = tl.arange(0, BLOCK_I)
    x_rows = x + rows[:, None].to(tl.int64) * features
    mask = row_mask[:, None] & (at < features)[None, :]
    u = tl.load(x_rows + at[None, :], mask=mask, other=0.0).to(tl.float32)
    pivot = tl.sum(u, 1) / tl.minimum(features, BLOCK_I)
    moved = tl.zeros((BLOCK_T, BLOCK_I), tl.float32)
    squared = tl.zeros((BLOCK_T, BLOCK_I), tl.float32)
    for start in range(0, features, BLOCK_I):
        mask = row_mask[:, None] & (start + at < features)[None, :]
        u = tl.load(x_rows + start + at[None, :], mask=mask, other=0.0).to(tl.float32)
        step = tl.where(mask, u - pivot[:, None], 0.0)
        moved += step
        squared += step * step
    shift = tl.sum(moved, 1) / features
    return pivot + shift, tl.sum(squared, 1) / features - shift * shift


@triton.jit
def _scores(
    x,
    partial,
    sums,  # fp32 [N]: of each signature, over its features
    rows,
    row_mask,
    part,
    tokens,
    slots,
    columns,  # N
    stride,
    features,
    eps,
    PIECES: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    """Scores [BLOCK_T, BLOCK_C] of `rows` at a part: x standardised, dot signature, / sqrt(I)."""
    mean, variance = _moments(x, rows, row_mask, features, BLOCK_T, BLOCK_X)
    slot = tl.arange(0, BLOCK_C)
    column = part * slots + slot
    mask = row_mask[:, None] & (slot < slots)[None, :]
    scores = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for split in tl.static_range(SPLITS):
        for piece in tl.static_range(PIECES):
            at = (split * tokens + rows).to(tl.int64) * stride + piece * columns
            scores += tl.load(partial + at[:, None] + column[None, :], mask=mask, other=0.0)
    scores -= mean[:, None] * tl.load(sums + column, mask=slot < slots, other=0.0)[None, :]
    return scores * tl.rsqrt((variance + eps) * features)[:, None]


@triton.jit
def _choose(
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
def choose_kernel(
    x,  # [T, I]
    partial,
    sums,
    open_slots,
    experts,  # out, int64 [T, S, K]
    weights,  # out, fp32 [T, S, K]
    counts,  # in (zeros) and out, int32 [S*K*C]
    members,  # out, int32 [S*K*C, T]
    tokens,
    slots,
    columns,  # N
    stride,  # M, of a row of partial
    features,
    eps,
    temperature,
    null_score,
    HAS_NULL: tl.constexpr,
    UNIT: tl.constexpr,
    PIECES: tl.constexpr,
    SPLITS: tl.constexpr,
    S: tl.constexpr,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    part = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    row_mask = rows < tokens
    scores = _scores(
        x,
        partial,
        sums,
        rows,
        row_mask,
        part,
        tokens,
        slots,
        columns,
        stride,
        features,
        eps,
        PIECES,
        SPLITS,
        BLOCK_T,
        BLOCK_C,
        BLOCK_X,
    )
    chosen, shares = _choose(
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
    group = (part * K + nth[None, :]) * slots + chosen
    taken = mask & (chosen >= 0)
    position = tl.atomic_add(counts + group, 1, mask=taken)
    at = group.to(tl.int64) * tokens + position
    tl.store(members + at, tl.broadcast_to(rows[:, None], (BLOCK_T, BLOCK_K)), mask=taken)


@triton.jit
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


@triton.jit
def down_kernel(
    x,  # [T, I]
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
            total = tl.dot(u.to(v.dtype), v, total, input_precision=PRECISION)
        place = token.to(tl.int64) * (S * K) + pile
        weight = tl.load(weights + place, mask=mask, other=0.0)
        tl.store(
            z + place[:, None] * rank + r[None, :],
            total * weight[:, None],
            mask=mask[:, None] & (r < rank)[None, :],
        )


@triton.jit
def up_kernel(
    z,  # fp32 [T, S, K, R]
    b,  # [C, O, R] of one part
    output,  # in and out, [T, O]
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
        y_rows = output + token[:, None].to(tl.int64) * outputs
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
def few_down_kernel(
    x,  # [T, I]
    a,  # [S, C, R, I]
    partial,
    sums,
    open_slots,
    experts,  # int64 [T, S, K]: out where CHOOSE, else in
    weights,  # fp32 [T, S, K], likewise
    z,  # out, fp32 [splits, T, S, K, R]
    tokens,
    slots,
    columns,
    stride,
    features,
    rank,
    split_features,
    eps,
    temperature,
    null_score,
    CHOOSE: tl.constexpr,
    HAS_NULL: tl.constexpr,
    UNIT: tl.constexpr,
    PIECES: tl.constexpr,
    SPLITS: tl.constexpr,
    S: tl.constexpr,
    K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    """One token at one part, over a split of the features: choose, then project, ungrouped."""
    token = tl.program_id(0)
    part = tl.program_id(1)
    split = tl.program_id(2)
    nth = tl.arange(0, BLOCK_K)
    place = (token.to(tl.int64) * S + part) * K
    if CHOOSE:
        rows = token + tl.arange(0, 1)
        scores = _scores(
            x,
            partial,
            sums,
            rows,
            rows < tokens,
            part,
            tokens,
            slots,
            columns,
            stride,
            features,
            eps,
            PIECES,
            SPLITS,
            1,
            BLOCK_C,
            BLOCK_X,
        )
        chosen, shares = _choose(
            scores,
            open_slots,
            part,
            slots,
            temperature,
            null_score,
            HAS_NULL,
            UNIT,
            K,
            1,
            BLOCK_C,
            BLOCK_K,
        )
        chosen, shares = tl.reshape(chosen, (BLOCK_K,)), tl.reshape(shares, (BLOCK_K,))
        if split == 0:
            tl.store(experts + place + nth, chosen.to(tl.int64), mask=nth < K)
            tl.store(weights + place + nth, shares, mask=nth < K)
    else:
        chosen = tl.load(experts + place + nth, mask=nth < K, other=-1).to(tl.int32)
        shares = tl.load(weights + place + nth, mask=nth < K, other=0.0)
    r = tl.arange(0, BLOCK_R)
    first = split * split_features
    last = tl.minimum(first + split_features, features)
    for k in tl.static_range(K):
        slot = tl.sum(tl.where(nth == k, chosen, 0), 0)
        share = tl.sum(tl.where(nth == k, shares, 0.0), 0)
        total = tl.zeros((BLOCK_R,), tl.float32)
        if slot >= 0:
            a_rows = a + ((part * slots + slot).to(tl.int64) * rank + r[:, None]) * features
            products = tl.zeros((BLOCK_R, BLOCK_I), tl.float32)
            for start in range(first, last, BLOCK_I):
                at = start + tl.arange(0, BLOCK_I)
                inside = at < last
                u = tl.load(x + token.to(tl.int64) * features + at, mask=inside, other=0.0)
                v = tl.load(
                    a_rows + at[None, :], mask=(r < rank)[:, None] & inside[None, :], other=0.0
                )
                products += v.to(tl.float32) * u.to(tl.float32)[None, :]
            total = tl.sum(products, 1) * share
        at_z = ((split * tokens + token).to(tl.int64) * S + part) * K + k
        tl.store(z + at_z * rank + r, total, mask=r < rank)


@triton.jit
def few_up_kernel(
    z,  # fp32 [splits, T, S, K, R]
    b,  # [C, O, R] of one part
    experts,  # int64 [T, S, K]
    output,  # in and out, [T, O]
    part,
    tokens,
    outputs,
    rank,
    SPLITS: tl.constexpr,
    S: tl.constexpr,
    K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """output += the sum over k of z B.T, one token and some of its outputs a program."""
    token = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    r = tl.arange(0, BLOCK_R)
    inside = at < outputs
    y_at = output + token * outputs + at
    y = tl.load(y_at, mask=inside, other=0.0).to(tl.float32)
    place = (token * S + part) * K
    for k in tl.static_range(K):
        slot = tl.load(experts + place + k)
        if slot >= 0:
            low = tl.zeros((BLOCK_R,), tl.float32)
            for split in tl.static_range(SPLITS):
                row = (split * tokens) * (S * K) + place + k
                low += tl.load(z + row * rank + r, mask=r < rank, other=0.0)
            v = tl.load(
                b + (slot * outputs + at[:, None]) * rank + r[None, :],
                mask=inside[:, None] & (r < rank)[None, :],
                other=0.0,
            )
            y += tl.sum(v.to(tl.float32) * low[None, :], 1)
    tl.store(y_at, y.to(output.dtype.element_ty), mask=inside)
