"""Calls the Triton kernels: computes their grids and makes the tensors that they write into."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from phatgoose.ops.backends.base import Down
from phatgoose.ops.backends.triton import choice_kernels, gate_kernels, lora_kernels, sizes
from phatgoose.ops.backends.triton.choice_kernels import (
    CHOSEN_ELSEWHERE,
    constants_of,
    numbers_of,
)
from phatgoose.ops.backends.triton.kernel import Kernel
from phatgoose.ops.backends.triton.sizes import cdiv, power
from phatgoose.ops.choose import Choosing
from phatgoose.ops.scoring import EPS, Extras, Gates

moments = Kernel(gate_kernels.moments_kernel)
scores = Kernel(gate_kernels.scores_kernel)
choose = Kernel(choice_kernels.choose_kernel)
group = Kernel(lora_kernels.group_kernel)
down = Kernel(lora_kernels.down_kernel)
up = Kernel(lora_kernels.up_kernel)
few_down = Kernel(choice_kernels.few_down_kernel)
few_up = Kernel(lora_kernels.few_up_kernel)

# Constants that the kernel does not read when the experts were chosen elsewhere.
UNREAD = {
    "CHOOSE": False,
    "HAS_PRIOR": False,
    "HAS_TALLY": False,
    **constants_of(CHOSEN_ELSEWHERE),
    "PIECES": 1,
    "SPLITS": 1,
    "BLOCK_C": 1,
}


def gated_down(
    x: Tensor, gates: Gates, a: Tensor, choosing: Choosing, extras: Extras
) -> tuple[Tensor, Tensor, Down]:
    """Score, choose and project down; see `Backend.gated_down`. x has the signatures' dtype."""
    x, a, signatures = x.contiguous(), a.contiguous(), gates.signatures.contiguous()
    sums, open_slots = gates.sums.contiguous(), gates.open.contiguous()
    tokens = x.shape[0]
    parts, slots = a.shape[:2]
    chosen = choosing.count(slots)
    result = empty_down(x, a, chosen)
    partial, mean_and_scale = _scores(x, signatures, result.counts)
    experts = x.new_empty(tokens, parts, chosen, dtype=torch.int64)
    weights = x.new_empty(tokens, parts, chosen, dtype=torch.float32)
    constants = {
        "HAS_PRIOR": extras.prior is not None,
        "HAS_TALLY": extras.tally is not None,
        **constants_of(choosing),
        "PIECES": 1 if x.dtype == torch.float32 else 2,
        "SPLITS": partial.shape[0],
        "S": parts,
        "K": chosen,
        "BLOCK_C": power(choosing.candidates(slots)),
        "BLOCK_K": power(chosen),
    }
    # The kernel wants a tensor for each argument. Where there is none it gets one it does not read.
    prior = sums if extras.prior is None else extras.prior.float().contiguous()
    tally = weights if extras.tally is None else extras.tally
    read = partial, mean_and_scale, sums, open_slots, prior
    numbers = numbers_of(choosing)
    if tokens <= sizes.FEW_TOKENS:
        written = experts, weights, tally, tally.stride(0), result.z
        counted = parts * slots, signatures.shape[0]
        _few_down(x, a, read, written, counted, numbers, {"CHOOSE": True, **constants})
        return experts, weights, result
    block = max(1, min(4, 2048 // constants["BLOCK_C"]))
    choose(
        (cdiv(tokens, block), parts, 1),
        *read,
        experts,
        weights,
        tally,
        tally.stride(0),
        result.counts,
        result.members,
        tokens,
        slots,
        parts * slots,
        signatures.shape[0],
        *numbers,
        BLOCK_T=block,
        **constants,
        num_warps=1 if block * constants["BLOCK_C"] <= 1024 else 4,
    )
    _down(x, a, weights, result)
    return experts, weights, result


def routed_down(x: Tensor, a: Tensor, experts: Tensor, weights: Tensor) -> Down:
    """Project down with experts chosen elsewhere; see `Backend.routed_down`."""
    x, a, experts, weights = (v.contiguous() for v in (x, a, experts, weights))
    tokens, parts, chosen = experts.shape
    result = empty_down(x, a, chosen)
    if tokens <= sizes.FEW_TOKENS:
        constants = {**UNREAD, "S": parts, "K": chosen, "BLOCK_K": power(chosen)}
        unread, unused = (weights,) * 5, numbers_of(CHOSEN_ELSEWHERE)
        written = experts, weights, weights, weights.stride(0), result.z
        _few_down(x, a, unread, written, (parts * a.shape[1], 0), unused, constants)
        return result
    result.counts.zero_()
    pairs = experts.numel()
    group(
        (cdiv(pairs, 256), 1, 1),
        experts,
        result.counts,
        result.members,
        pairs,
        tokens,
        a.shape[1],
        SK=parts * chosen,
        BLOCK=256,
    )
    _down(x, a, weights, result)
    return result


def routed_up_(output: Tensor, b: Tensor, result: Down, experts: Tensor, part: int) -> None:
    """Add the chosen experts' outputs to `output` in place; see `Backend.routed_up_`."""
    b = b.contiguous()
    tokens, parts, chosen = experts.shape
    slots, outputs, rank = b.shape
    if tokens <= sizes.FEW_TOKENS:
        _few_up(output, [b], result.z, experts, part)
        return
    block_r = max(16, power(rank))
    block_t, block_o = sizes.up_blocks(block_r, b.element_size())
    atomic = sizes.adds_in_cache(output)
    columns = block_o * sizes.UP_COLUMNS
    width = max(1, sizes.CACHED_OUTPUT // (tokens * output.element_size() * columns)) * columns
    for first in range(0, outputs, width):
        for k in range(chosen):
            grid = (
                cdiv(min(width, outputs - first), columns),
                sizes.most_blocks(tokens, slots, block_t),
                1,
            )
            up(
                grid,
                result.z,
                b,
                output,
                output.stride(0),
                result.counts,
                result.members,
                part * chosen + k,
                tokens,
                slots,
                outputs,
                rank,
                first,
                SK=parts * chosen,
                ATOMIC=atomic,
                PRECISION=sizes.precision(b),
                BLOCK_T=block_t,
                BLOCK_C=power(slots),
                BLOCK_R=block_r,
                BLOCK_O=block_o,
                COLUMNS=sizes.UP_COLUMNS,
                num_warps=8,
            )


def few_routed_up_all_(output: Tensor, bs: Sequence[Tensor], result: Down, experts: Tensor) -> bool:
    """Add all parts in one launch if tokens are few and parts at most three; whether it did."""
    if len(bs) > 3 or len(output) > sizes.FEW_TOKENS:
        return False
    _few_up(output, bs, result.z, experts, 0)
    return True


def empty_down(x: Tensor, a: Tensor, chosen: int) -> Down:
    """Make room for w A x of every pair, and for groups of pairs. The counts are not yet zero.

    z is [N, S, K, R]. For few tokens N has room for every split, and the pairs are not grouped.
    """
    parts, slots, rank, features = a.shape
    piles = parts * chosen
    more = sizes.FEW_TOKENS * (sizes.few_splits(features, rank, chosen)[1] - 1)
    return Down(
        x.new_empty(x.shape[0] + more, parts, chosen, rank, dtype=torch.float32),
        x.new_empty(piles * slots, dtype=torch.int32),
        x.new_empty(piles * slots, x.shape[0], dtype=torch.int32),
    )


def _scores(x: Tensor, signatures: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Products by split of the features, fp32 [splits, T, M], and moments. Zeroes `counts`."""
    tokens, features = x.shape
    columns = signatures.shape[0]
    found = x.new_empty(tokens, 2, dtype=torch.float32)
    few = tokens <= sizes.FEW_TOKENS
    block_x = min(4096 if few else 1024, power(features))
    if not few:
        groups = counts.numel()
        moments((tokens, 1, 1), x, found, counts, features, groups, EPS, BLOCK_X=block_x)
        if x.is_cuda and x.dtype != torch.float32 and sizes.CUBLAS_GIVES_FP32:
            return torch.mm(x, signatures.T, out_dtype=torch.float32).unsqueeze(0), found
    block_t, block_m, block_i, most_splits, warps, stages = sizes.score_blocks(tokens, x.dtype)
    tiles = cdiv(sizes.rounded(tokens), block_t) * cdiv(columns, block_m)
    wanted = min(sizes.PROGRAMS // max(tiles, 1), features // (2 * block_i), most_splits)
    split = cdiv(cdiv(features, max(1, wanted)), block_i) * block_i
    splits = cdiv(features, split)
    partial = x.new_empty(splits, tokens, columns, dtype=torch.float32)
    if tokens:
        more = cdiv(block_t, splits) if few else 0
        grid = (cdiv(columns, block_m) + more, cdiv(tokens, block_t), splits)
        scores(
            grid,
            x,
            signatures,
            partial,
            found,
            tokens,
            columns,
            features,
            split,
            EPS,
            MOMENTS=few,
            PRECISION=sizes.precision(x),
            EVEN=features % split == 0,
            BLOCK_T=block_t,
            BLOCK_M=block_m,
            BLOCK_I=block_i,
            BLOCK_X=block_x,
            num_warps=warps,
            num_stages=stages,
        )
    return partial, found


def _down(x: Tensor, a: Tensor, weights: Tensor, result: Down) -> None:
    """Write z, group by group.

    x is cast before the kernel. If a product's first operand were cast in the kernel, it would be
    read from registers, and on a Hopper ptxas before CUDA 13.3 may overwrite those while a product
    of another stage still reads them.
    """
    x = x.to(a.dtype)
    tokens, features = x.shape
    _, parts, chosen = weights.shape
    slots, rank = a.shape[1:3]
    block_r = max(16, power(rank))
    block_i = sizes.down_features(block_r, a.element_size())
    down(
        (sizes.most_blocks(tokens * chosen, slots, sizes.DOWN_TOKENS), parts, 1),
        x,
        a,
        weights,
        result.counts,
        result.members,
        result.z,
        tokens,
        slots,
        features,
        rank,
        S=parts,
        K=chosen,
        PRECISION=sizes.precision(a),
        EVEN=features % block_i == 0,
        BLOCK_T=sizes.DOWN_TOKENS,
        BLOCK_C=power(slots),
        BLOCK_R=block_r,
        BLOCK_I=block_i,
        num_warps=4,
        num_stages=sizes.DOWN_STAGES,
    )


def _few_down(
    x: Tensor,
    a: Tensor,
    read: tuple[Tensor, ...],  # partial, moments, sums, open_slots, prior
    written: tuple[Any, ...],  # experts, weights, tally and its stride, z
    counted: tuple[int, int],  # columns, stride
    numbers: tuple[float, ...],
    constants: dict[str, int],
) -> None:
    tokens, features = x.shape
    parts, slots, rank, _ = a.shape
    block_i, most_splits = sizes.few_splits(features, rank, constants["K"])
    splits = sizes.splits_of(tokens, parts, most_splits)
    split = cdiv(cdiv(features, splits), block_i) * block_i
    if tokens:
        few_down(
            (tokens, parts, splits),
            x,
            a,
            *read,
            *written,
            tokens,
            slots,
            *counted,
            features,
            rank,
            split,
            *numbers,
            **constants,
            BLOCK_R=power(rank),
            BLOCK_I=block_i,
            num_warps=4,
        )


def _few_up(output: Tensor, bs: Sequence[Tensor], z: Tensor, experts: Tensor, part: int) -> None:
    """`routed_up_` for few tokens, of up to three parts from `part` on: outputs side by side."""
    tokens, parts, chosen = experts.shape
    rank = z.shape[3]
    if not tokens:
        return
    bs, outputs = [b.contiguous() for b in bs], [b.shape[1] for b in bs]
    block_r, block_k = power(rank), power(chosen)
    block = max(16, 2048 // (block_k * block_r))
    more = (len(z) - tokens) // sizes.FEW_TOKENS
    few_up(
        (sum(cdiv(size, block) for size in outputs), tokens, 1),
        z,
        *(*bs, bs[0], bs[0])[:3],
        experts.contiguous(),
        output,
        output.stride(0),
        part,
        tokens,
        *(*outputs, 0, 0)[:3],
        rank,
        PARTS=len(bs),
        SPLITS=sizes.splits_of(tokens, parts, 1 + more),
        S=parts,
        K=chosen,
        BLOCK_K=block_k,
        BLOCK_R=block_r,
        BLOCK_O=block,
        num_warps=max(1, min(8, block * block_k * block_r // 4096)),
    )
