"""Triton kernels that choose experts by scores; sizes as in `lora_kernels`.

All that a knob of the choice changes on a GPU is here: the arithmetic, and how the launchers hand
the knobs over.
"""

import triton
import triton.language as tl

from phatgoose.ops.backends.triton.gate_kernels import gate_scores
from phatgoose.ops.choose import Choosing

CHOSEN_ELSEWHERE = Choosing(top_k=1, temperature=1.0, unit=False, null_score=None)


def numbers_of(choosing: Choosing) -> tuple[float, ...]:
    """The knobs that are arguments of the kernels below, in their order."""
    return choosing.temperature, choosing.null_score or 0.0


def constants_of(choosing: Choosing) -> dict[str, bool]:
    """The knobs that the kernels below are compiled for."""
    return {"HAS_NULL": choosing.null_score is not None, "UNIT": choosing.unit}


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


@triton.jit(do_not_specialize=["tokens"])
def few_down_kernel(
    x,  # [T, I]
    a,  # [S, C, R, I]
    partial,
    moments,
    sums,
    open_slots,
    prior,
    experts,  # int64 [T, S, K]: out where CHOOSE, else in
    weights,  # fp32 [T, S, K], likewise
    tally,  # in and out where CHOOSE and HAS_TALLY, fp32 [>= T, >= 1 + C]; see `add_to_tally`
    tally_stride,
    z,  # out, fp32 [splits, T, S, K, R]
    tokens,
    slots,
    columns,
    stride,
    features,
    rank,
    split_features,
    temperature,
    null_score,
    CHOOSE: tl.constexpr,
    HAS_PRIOR: tl.constexpr,
    HAS_NULL: tl.constexpr,
    HAS_TALLY: tl.constexpr,
    UNIT: tl.constexpr,
    PIECES: tl.constexpr,
    SPLITS: tl.constexpr,
    S: tl.constexpr,
    K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """One token at one part, over a split of the features: choose, then project, ungrouped."""
    token = tl.program_id(0)
    part = tl.program_id(1)
    split = tl.program_id(2)
    nth = tl.arange(0, BLOCK_K)
    place = (token.to(tl.int64) * S + part) * K
    if CHOOSE:
        rows = token + tl.arange(0, 1)
        scores = gate_scores(
            partial,
            moments,
            sums,
            prior,
            rows,
            rows < tokens,
            part,
            tokens,
            slots,
            columns,
            stride,
            HAS_PRIOR,
            PIECES,
            SPLITS,
            1,
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
            1,
            BLOCK_C,
            BLOCK_K,
        )
        chosen, shares = tl.reshape(chosen, (BLOCK_K,)), tl.reshape(shares, (BLOCK_K,))
        if split == 0:
            tl.store(experts + place + nth, chosen.to(tl.int64), mask=nth < K)
            tl.store(weights + place + nth, shares, mask=nth < K)
            if HAS_TALLY:
                add_to_tally(tally + token.to(tl.int64) * tally_stride, chosen, shares, nth < K)
    else:
        chosen = tl.load(experts + place + nth, mask=nth < K, other=-1).to(tl.int32)
        shares = tl.load(weights + place + nth, mask=nth < K, other=0.0)
    # All K experts at once, a row for each of their ranks: more loads are under way together.
    row = tl.arange(0, BLOCK_K * BLOCK_R)
    kth, r = row // BLOCK_R, row % BLOCK_R
    mine = kth[:, None] == nth[None, :]
    slot = tl.sum(tl.where(mine, chosen[None, :], 0), 1)
    share = tl.sum(tl.where(mine, shares[None, :], 0.0), 1)
    real = (kth < K) & (r < rank)
    taken = real & (slot >= 0)
    a_rows = a + ((part * slots + slot).to(tl.int64) * rank + r) * features
    first = split * split_features
    last = tl.minimum(first + split_features, features)
    # A thread reads 8 features of a row at once, and adds these up before it takes more registers.
    products = tl.zeros((BLOCK_K * BLOCK_R, BLOCK_I // 8), tl.float32)
    for start in range(first, last, BLOCK_I):
        at = start + tl.arange(0, BLOCK_I)
        inside = at < last
        u = tl.load(x + token.to(tl.int64) * features + at, mask=inside, other=0.0)
        v_at = a_rows[:, None] + at[None, :]
        v = tl.load(v_at, mask=taken[:, None] & inside[None, :], other=0.0)
        product = v.to(tl.float32) * u.to(tl.float32)[None, :]
        products += tl.sum(tl.reshape(product, (BLOCK_K * BLOCK_R, BLOCK_I // 8, 8)), 2)
    at_z = ((split * tokens + token).to(tl.int64) * S + part) * K + kth
    tl.store(z + at_z * rank + r, tl.sum(products, 1) * share, mask=real)
