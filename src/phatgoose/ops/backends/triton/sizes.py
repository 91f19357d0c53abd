"""Sizes of blocks, grids and splits of the Triton kernels: numbers in, numbers out."""

import torch
from torch import Tensor

FEW_TOKENS = 256  # up to here every pair reads its own factors; beyond, pairs are grouped by expert
PROGRAMS = 132  # about one a multiprocessor; more splits than this win nothing
FEW_PROGRAMS = 512  # of a projection of few tokens, where there is work for so many
# The L2 cache keeps so many bytes of output from one expert of a token to the next.
CACHED_OUTPUT = 32 << 20
CUBLAS_GIVES_FP32 = "dtype" in torch.ops.aten.mm.overloads()  # of half-precision factors

SHARED_MEMORY = 96 << 10  # bytes that a program may have on any GPU since Ampere
DOWN_TOKENS = 64  # of a block
DOWN_STAGES = 5
UP_COLUMNS = 4  # blocks of outputs that a program walks through


def cdiv(size: int, block: int) -> int:
    """How many blocks hold `size`. Triton's own takes 3 µs, and so does its `next_power_of_2`."""
    return -(-size // block)


def power(size: int) -> int:
    """The power of two that is not less than size."""
    return 1 << max(size - 1, 0).bit_length()


def rounded(tokens: int) -> int:
    """A number of tokens rounded up, so that what is compiled for it serves others like it."""
    return max(16, power(tokens))


def score_blocks(tokens: int, dtype: torch.dtype) -> tuple[int, int, int, int, int, int]:
    """Returns block sizes of tokens, columns and features; the most splits; warps and stages."""
    if tokens <= 16:
        return 16, 32, 128, 32, 4, 3
    if tokens <= FEW_TOKENS:
        return 64, 32, 64 if dtype == torch.float32 else 128, 32, 4, 3
    return (64, 64, 32, 4, 4, 3) if dtype == torch.float32 else (128, 128, 64, 4, 8, 3)


def up_blocks(block_r: int, size: int) -> tuple[int, int]:
    """Returns how many tokens and outputs a block has."""
    block_t, block_o = 32, 128
    while 3 * (block_t + block_o) * block_r * size > SHARED_MEMORY and block_t + block_o > 32:
        if block_o > 16:
            block_o //= 2
        else:
            block_t //= 2
    return block_t, block_o


def most_blocks(tokens: int, slots: int, block: int) -> int:
    """The most blocks that `tokens` pairs, grouped by slot, can fill."""
    return min(tokens, tokens // block + slots)


def down_features(block_r: int, size: int) -> int:
    """How many features a block has: all its stages must fit the shared memory of small GPUs."""
    block = 64
    while block > 16 and (DOWN_TOKENS + block_r) * block * size * DOWN_STAGES > SHARED_MEMORY:
        block //= 2
    return block


def few_splits(features: int, rank: int, chosen: int) -> tuple[int, int]:
    """How many features a block has when few tokens are projected down, and the most splits."""
    rows = power(rank) * power(chosen)
    block = max(16, 8192 // rows)
    split = cdiv(cdiv(features, min(8, cdiv(features, block))), block) * block
    return block, cdiv(features, split)


def splits_of(tokens: int, parts: int, most: int) -> int:
    """How many splits of the features to use.

    Each split repeats the scoring and adds a partial sum for `up`, so take few.
    """
    return min(most, power(cdiv(FEW_PROGRAMS, rounded(tokens) * parts)))


def adds_in_cache(output: Tensor) -> bool:
    """Whether the GPU can add to `output` without reading it: bf16 needs a Hopper."""
    if output.device.type != "cuda":
        return False
    return output.dtype != torch.bfloat16 or torch.cuda.get_device_capability(output.device) >= (9,)


def precision(x: Tensor) -> str:
    """fp32 on the tensor cores in three tf32 products, which keeps fp32's accuracy."""
    return "tf32x3" if x.dtype == torch.float32 else "tf32"
