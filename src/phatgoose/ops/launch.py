"""Calls the Triton kernels: block sizes, grids, and the tensors they write into."""

from collections.abc import Sequence

import torch
from torch import Tensor

from phatgoose.ops import gate_kernels, lora_kernels
from phatgoose.ops.kernel import Kernel

FEW_TOKENS = 256  # up to here every pair reads its own factors; beyond, pairs are grouped by expert
PROGRAMS = 132  # about one a multiprocessor; more splits than this win nothing
FEW_PROGRAMS = 512  # of a projection of few tokens, where there is work for so many
# Bytes of output that stay in the L2 cache from one expert of a token to the next.
CACHED_OUTPUT = 32 << 20
CUBLAS_GIVES_FP32 = "dtype" in torch.ops.aten.mm.overloads()  # of half-precision factors

SHARED_MEMORY = 96 << 10  # bytes that a program may have on any GPU since Ampere
DOWN_TOKENS = 64  # of a block
DOWN_STAGES = 5
UP_COLUMNS = 4  # blocks of outputs that a program walks through

Plan = tuple[Tensor, Tensor]  # counts and members of the groups; not written for few tokens


moments = Kernel(gate_kernels.moments_kernel)
scores = Kernel(gate_kernels.scores_kernel)
choose = Kernel(gate_kernels.choose_kernel)
group = Kernel(lora_kernels.group_kernel)
down = Kernel(lora_kernels.down_kernel)
up = Kernel(lora_kernels.up_kernel)
few_down = Kernel(lora_kernels.few_down_kernel)
few_up = Kernel(lora_kernels.few_up_kernel)


def gated_down(
    x: Tensor,
    signatures: Tensor,
    sums: Tensor,
    open_slots: Tensor,
    a: Tensor,
    *,
    top_k: int,
    temperature: float,
    unit: bool,
    null_score: float | None,
    prior: Tensor | None,
    eps: float,
    tally: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Scores, choice and down-projection; see `library._gated_down`."""
    x, signatures, a = x.contiguous(), signatures.contiguous(), a.contiguous()
    sums, open_slots = sums.contiguous(), open_slots.contiguous()
    tokens = x.shape[0]
    parts, slots = a.shape[:2]
    columns, stride = parts * slots, signatures.shape[0]
    chosen = min(top_k, slots + (null_score is not None))
    counts, members = make_plan(x, parts * chosen, slots)
    partial, mean_and_scale = _scores(x, signatures, counts, eps)
    experts = x.new_empty(tokens, parts, chosen, dtype=torch.int64)
    weights = x.new_empty(tokens, parts, chosen, dtype=torch.float32)
    shared = {
        "HAS_PRIOR": prior is not None,
        "HAS_NULL": null_score is not None,
        "HAS_TALLY": tally is not None,
        "UNIT": unit,
        "PIECES": 1 if x.dtype == torch.float32 else 2,
        "SPLITS": partial.shape[0],
        "S": parts,
        "K": chosen,
        "BLOCK_C": _power(slots + (null_score is not None)),
        "BLOCK_K": _power(chosen),
    }
    null = 0.0 if null_score is None else null_score
    prior = sums if prior is None else prior.float().contiguous()  # one that is not read
    tally = weights if tally is None else tally  # likewise
    if tokens <= FEW_TOKENS:
        z = _few_down(
            x,
            a,
            (partial, mean_and_scale, sums, open_slots, prior),
            experts,
            weights,
            tally,
            stride=stride,
            numbers=(temperature, null),
            constants={"CHOOSE": True, **shared},
        )
        return experts, weights, z, counts, members
    block = max(1, min(4, 2048 // shared["BLOCK_C"]))
    choose(
        (_cdiv(tokens, block), parts, 1),
        partial,
        mean_and_scale,
        sums,
        open_slots,
        prior,
        experts,
        weights,
        tally,
        tally.stride(0),
        counts,
        members,
        tokens,
        slots,
        columns,
        stride,
        temperature,
        null,
        BLOCK_T=block,
        **shared,
        num_warps=1 if block * shared["BLOCK_C"] <= 1024 else 4,
    )
    return experts, weights, _down(x, a, weights, counts, members), counts, members


def routed_down(
    x: Tensor, a: Tensor, experts: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Down-projection of a routing chosen elsewhere; see `library._routed_down`."""
    x, a, experts, weights = (v.contiguous() for v in (x, a, experts, weights))
    tokens, parts, chosen = experts.shape
    slots = a.shape[1]
    counts, members = make_plan(x, parts * chosen, slots)
    if tokens <= FEW_TOKENS:
        constants = {
            "CHOOSE": False,
            "HAS_PRIOR": False,
            "HAS_NULL": False,
            "HAS_TALLY": False,
            "UNIT": False,
            "PIECES": 1,
            "SPLITS": 1,
            "S": parts,
            "K": chosen,
            "BLOCK_C": 1,
            "BLOCK_K": _power(chosen),
        }
        unused = (weights,) * 5
        z = _few_down(
            x,
            a,
            unused,
            experts,
            weights,
            weights,
            stride=0,
            numbers=(1.0, 0.0),
            constants=constants,
        )
        return z, counts, members
    counts.zero_()
    pairs = experts.numel()
    group(
        (_cdiv(pairs, 256), 1, 1),
        experts,
        counts,
        members,
        pairs,
        tokens,
        slots,
        SK=parts * chosen,
        BLOCK=256,
    )
    return _down(x, a, weights, counts, members), counts, members


def few_routed_up(
    output: Tensor, b: Sequence[Tensor], z: Tensor, experts: Tensor, part: int
) -> None:
    """`routed_up` for few tokens, of up to three parts from `part` on: outputs side by side."""
    tokens, parts, chosen = experts.shape
    rank = z.shape[3]
    if not tokens:
        return
    b, outputs = [up.contiguous() for up in b], [up.shape[1] for up in b]
    block_r, block_k = _power(rank), _power(chosen)
    block = max(16, 2048 // (block_k * block_r))
    few_up(
        (sum(_cdiv(size, block) for size in outputs), tokens, 1),
        z,
        *(*b, b[0], b[0])[:3],
        experts.contiguous(),
        output,
        output.stride(0),
        part,
        tokens,
        *(*outputs, 0, 0)[:3],
        rank,
        PARTS=len(b),
        SPLITS=_splits_of(tokens, parts, 1 + (len(z) - tokens) // FEW_TOKENS),
        S=parts,
        K=chosen,
        BLOCK_K=block_k,
        BLOCK_R=block_r,
        BLOCK_O=block,
        num_warps=max(1, min(8, block * block_k * block_r // 4096)),
    )


def routed_up(
    output: Tensor,
    b: Tensor,
    z: Tensor,
    experts: Tensor,
    counts: Tensor,
    members: Tensor,
    part: int,
) -> None:
    """Add the chosen experts' outputs to `output` in place; see `library._routed_up`."""
    b = b.contiguous()
    tokens, parts, chosen = experts.shape
    slots, outputs, rank = b.shape
    if tokens <= FEW_TOKENS:
        few_routed_up(output, [b], z, experts, part)
        return
    block_r = max(16, _power(rank))
    block_t, block_o = _up_blocks(block_r, b.element_size())
    atomic = _adds_in_cache(output)
    width = max(1, CACHED_OUTPUT // (tokens * output.element_size() * block_o * UP_COLUMNS))
    width *= block_o * UP_COLUMNS
    for first in range(0, outputs, width):
        for k in range(chosen):
            grid = (
                _cdiv(min(width, outputs - first), block_o * UP_COLUMNS),
                _most_blocks(tokens, slots, block_t),
                1,
            )
            up(
                grid,
                z,
                b,
                output,
                output.stride(0),
                counts,
                members,
                part * chosen + k,
                tokens,
                slots,
                outputs,
                rank,
                first,
                SK=parts * chosen,
                ATOMIC=atomic,
                PRECISION=_precision(b),
                BLOCK_T=block_t,
                BLOCK_C=_power(slots),
                BLOCK_R=block_r,
                BLOCK_O=block_o,
                COLUMNS=UP_COLUMNS,
                num_warps=8,
            )


def _scores(x: Tensor, signatures: Tensor, counts: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Products over splits of the features, fp32 [splits, T, M], and moments; zeroes `counts`."""
    tokens, features = x.shape
    columns = signatures.shape[0]
    found = x.new_empty(tokens, 2, dtype=torch.float32)
    few = tokens <= FEW_TOKENS
    block_x = min(4096 if few else 1024, _power(features))
    if not few:
        groups = counts.numel()
        moments((tokens, 1, 1), x, found, counts, features, groups, eps, BLOCK_X=block_x)
        if x.is_cuda and x.dtype != torch.float32 and CUBLAS_GIVES_FP32:
            return torch.mm(x, signatures.T, out_dtype=torch.float32).unsqueeze(0), found
    block_t, block_m, block_i, most_splits, warps, stages = _score_blocks(tokens, x.dtype)
    tiles = _cdiv(_rounded(tokens), block_t) * _cdiv(columns, block_m)
    splits = max(1, min(PROGRAMS // max(tiles, 1), features // (2 * block_i), most_splits))
    split = _cdiv(_cdiv(features, splits), block_i) * block_i
    splits = _cdiv(features, split)
    partial = x.new_empty(splits, tokens, columns, dtype=torch.float32)
    if tokens:
        more = _cdiv(block_t, splits) if few else 0
        grid = (_cdiv(columns, block_m) + more, _cdiv(tokens, block_t), splits)
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
            eps,
            MOMENTS=few,
            PRECISION=_precision(x),
            EVEN=features % split == 0,
            BLOCK_T=block_t,
            BLOCK_M=block_m,
            BLOCK_I=block_i,
            BLOCK_X=block_x,
            num_warps=warps,
            num_stages=stages,
        )
    return partial, found


def _cdiv(size: int, block: int) -> int:
    """Blocks that hold so much; Triton's own function takes 3 µs, as does its `next_power_of_2`."""
    return -(-size // block)


def _power(size: int) -> int:
    """The power of two that is not less than size."""
    return 1 << max(size - 1, 0).bit_length()


def _rounded(tokens: int) -> int:
    """So many at least: what is compiled for a number of tokens then serves others like it."""
    return max(16, _power(tokens))


def _score_blocks(tokens: int, dtype: torch.dtype) -> tuple[int, int, int, int, int, int]:
    """Block sizes of tokens, columns and features; most splits; warps and stages."""
    if tokens <= 16:
        return 16, 32, 128, 32, 4, 3
    if tokens <= FEW_TOKENS:
        return 64, 32, 64 if dtype == torch.float32 else 128, 32, 4, 3
    return (64, 64, 32, 4, 4, 3) if dtype == torch.float32 else (128, 128, 64, 4, 8, 3)


def _up_blocks(block_r: int, size: int) -> tuple[int, int]:
    """Tokens and outputs of a block."""
    block_t, block_o = 32, 128
    while 3 * (block_t + block_o) * block_r * size > SHARED_MEMORY and block_t + block_o > 32:
        if block_o > 16:
            block_o //= 2
        else:
            block_t //= 2
    return block_t, block_o


def _most_blocks(tokens: int, slots: int, block: int) -> int:
    """The most blocks that `tokens` pairs, grouped by slot, can fill."""
    return min(tokens, tokens // block + slots)


def _down(x: Tensor, a: Tensor, weights: Tensor, counts: Tensor, members: Tensor) -> Tensor:
    tokens, features = x.shape
    _, parts, chosen = weights.shape
    slots, rank = a.shape[1:3]
    z = make_z(x, a, chosen)
    block_r = max(16, _power(rank))
    block_i = _down_features(block_r, a.element_size())
    down(
        (_most_blocks(tokens * chosen, slots, DOWN_TOKENS), parts, 1),
        x,
        a,
        weights,
        counts,
        members,
        z,
        tokens,
        slots,
        features,
        rank,
        S=parts,
        K=chosen,
        PRECISION=_precision(a),
        EVEN=features % block_i == 0,
        BLOCK_T=DOWN_TOKENS,
        BLOCK_C=_power(slots),
        BLOCK_R=block_r,
        BLOCK_I=block_i,
        num_warps=4,
        num_stages=DOWN_STAGES,
    )
    return z


def _few_down(
    x: Tensor,
    a: Tensor,
    scores: tuple[Tensor, ...],
    experts: Tensor,
    weights: Tensor,
    tally: Tensor,
    *,
    stride: int,
    numbers: tuple[float, ...],
    constants: dict[str, int],
) -> Tensor:
    tokens, features = x.shape
    parts, slots, rank, _ = a.shape
    chosen = experts.shape[2]
    block_i, most_splits = few_splits(features, rank, chosen)
    splits = _splits_of(tokens, parts, most_splits)
    split = _cdiv(_cdiv(features, splits), block_i) * block_i
    z = make_z(x, a, chosen)
    if tokens:
        few_down(
            (tokens, parts, splits),
            x,
            a,
            *scores,
            experts,
            weights,
            tally,
            tally.stride(0),
            z,
            tokens,
            slots,
            parts * slots,
            stride,
            features,
            rank,
            split,
            *numbers,
            **constants,
            BLOCK_R=_power(rank),
            BLOCK_I=block_i,
            num_warps=4,
        )
    return z


def _down_features(block_r: int, size: int) -> int:
    """Features of a block: as many as let all stages fit the shared memory of small GPUs."""
    block = 64
    while block > 16 and (DOWN_TOKENS + block_r) * block * size * DOWN_STAGES > SHARED_MEMORY:
        block //= 2
    return block


def few_splits(features: int, rank: int, chosen: int) -> tuple[int, int]:
    """Features of a block, and most splits of the features, of a down-projection of few tokens."""
    rows = _power(rank) * _power(chosen)
    block = max(16, 8192 // rows)
    split = _cdiv(_cdiv(features, min(8, _cdiv(features, block))), block) * block
    return block, _cdiv(features, split)


def _splits_of(tokens: int, parts: int, most: int) -> int:
    """Splits of the features that are used: each scores once more, and adds to what up sums."""
    return min(most, _power(_cdiv(FEW_PROGRAMS, _rounded(tokens) * parts)))


def make_z(x: Tensor, a: Tensor, chosen: int) -> Tensor:
    """Room for w A x of every pair: [N, S, K, R], for few tokens as often as there are splits."""
    parts, _, rank, features = a.shape
    more = FEW_TOKENS * (few_splits(features, rank, chosen)[1] - 1)
    return x.new_empty(x.shape[0] + more, parts, chosen, rank, dtype=torch.float32)


def make_plan(x: Tensor, piles: int, slots: int) -> Plan:
    """Counts, not yet zero, and members."""
    counts = x.new_empty(piles * slots, dtype=torch.int32)
    return counts, x.new_empty(piles * slots, x.shape[0], dtype=torch.int32)


def _adds_in_cache(output: Tensor) -> bool:
    """Whether the GPU can add to `output` without reading it: bf16 needs a Hopper."""
    if output.device.type != "cuda":
        return False
    return output.dtype != torch.bfloat16 or torch.cuda.get_device_capability(output.device) >= (9,)


def _precision(x: Tensor) -> str:
    """fp32 on the tensor cores in three tf32 products, which keeps fp32's accuracy."""
    return "tf32x3" if x.dtype == torch.float32 else "tf32"
