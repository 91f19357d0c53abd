"""The kernels compile for GPUs that are not here; test_backends.py runs them interpreted."""

import warnings

import pytest
import torch

from phatgoose.ops.backends.triton import sizes

triton = pytest.importorskip("triton", reason="the kernels are Triton's")
gate_kernels = pytest.importorskip("phatgoose.ops.backends.triton.gate_kernels")
lora_kernels = pytest.importorskip("phatgoose.ops.backends.triton.lora_kernels")
choice_kernels = pytest.importorskip("phatgoose.ops.backends.triton.choice_kernels")

KERNELS = {
    name: kernel
    for module in (gate_kernels, lora_kernels, choice_kernels)
    for name, kernel in vars(module).items()
    if name.endswith("_kernel")
}
TENSORS = {
    "half": ("x", "signatures", "a", "b", "b0", "b1", "b2", "output"),
    "fp32": ("partial", "moments", "sums", "prior", "weights", "tally", "z"),
    "i32": ("counts", "members"),
    "i64": ("experts",),
    "i1": ("open_slots",),
}
NUMBERS = dict.fromkeys(("eps", "temperature", "null_score"), "fp32")  # the others count something
CONSTANTS = {"S": 3, "K": 2, "SK": 6, "SPLITS": 2, "COLUMNS": 2, "BLOCK": 256, "UNIT": False}
CONSTANTS |= {"BLOCK_T": 16, "BLOCK_C": 32, "BLOCK_K": 2, "BLOCK_R": 16, "BLOCK_M": 16}
CONSTANTS |= {"BLOCK_I": 64, "BLOCK_X": 64, "BLOCK_O": 64, "CHOOSE": True, "HAS_NULL": True}
CONSTANTS |= {"HAS_PRIOR": True, "HAS_TALLY": True, "PARTS": 3, "MOMENTS": True}


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(("capability", "dtype"), [(80, "bf16"), (90, "bf16"), (90, "fp32")])
def test_compiles(name, capability, dtype):
    assert compiled(name, capability, dtype).asm["cubin"]


@pytest.mark.parametrize("rank", [16, 128, 256])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_blocks_fit_the_shared_memory_of_small_gpus(dtype, rank):
    """99 KiB are what a program may have on compute capability 8.6 and 8.9."""
    size = 4 if dtype == "fp32" else 2
    block_t, block_o = sizes.up_blocks(rank, size)
    blocks = {"BLOCK_R": rank, "BLOCK_T": block_t, "BLOCK_O": block_o, "COLUMNS": sizes.UP_COLUMNS}
    assert compiled("up_kernel", 80, dtype, **blocks).metadata.shared <= 99 << 10
    block_i = sizes.down_features(rank, size)
    blocks = {"BLOCK_R": rank, "BLOCK_T": sizes.DOWN_TOKENS, "BLOCK_I": block_i}
    stages = sizes.DOWN_STAGES
    assert compiled("down_kernel", 80, dtype, stages, **blocks).metadata.shared <= 99 << 10
    for tokens in (1, 100, 1000):
        kind = torch.float32 if dtype == "fp32" else torch.bfloat16
        block_t, block_m, block_i, _, _, stages = sizes.score_blocks(tokens, kind)
        blocks = {"BLOCK_T": block_t, "BLOCK_M": block_m, "BLOCK_I": block_i}
        assert compiled("scores_kernel", 80, dtype, stages, **blocks).metadata.shared <= 99 << 10


ALIGNED = ("features", "split_features", "outputs", "output_stride", "rank")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@pytest.mark.parametrize("rank", [4, 16, 64, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_product_reads_registers_while_another_runs(dtype, rank):
    """On a Hopper ptxas before CUDA 13.3 may overwrite them (triton-lang/triton 11781).

    A product (wgmma) may read its first operand from registers, if it is waited for at once, or
    from shared memory. Launched with the blocks and stages of `sizes`.
    """
    size, block_r = DTYPES[dtype].itemsize, max(16, sizes.power(rank))
    block_t, block_o = sizes.up_blocks(block_r, size)
    blocks = {"BLOCK_R": block_r, "BLOCK_T": block_t, "BLOCK_O": block_o}
    check_products(compiled("up_kernel", 90, dtype, 3, warps=8, **blocks))
    block_i = sizes.down_features(block_r, size)
    blocks = {"BLOCK_R": block_r, "BLOCK_T": sizes.DOWN_TOKENS, "BLOCK_I": block_i}
    check_products(compiled("down_kernel", 90, dtype, sizes.DOWN_STAGES, **blocks))
    for tokens in (1, 100, 1000):
        block_t, block_m, block_i, _, warps, stages = sizes.score_blocks(tokens, DTYPES[dtype])
        blocks = {"BLOCK_T": block_t, "BLOCK_M": block_m, "BLOCK_I": block_i}
        check_products(compiled("scores_kernel", 90, dtype, stages, warps=warps, **blocks))


def test_a_cast_in_the_kernel_would_be_found():
    """What the down kernel was given before its input was cast outside of it."""
    cast = triton.JITFunction(lora_kernels.down_kernel.fn)
    cast._unsafe_update_src(
        lora_kernels.down_kernel.src.replace("tl.dot(u, v", "tl.dot(u.to(v.dtype), v")
    )
    blocks = {"BLOCK_R": 16, "BLOCK_T": sizes.DOWN_TOKENS, "BLOCK_I": 64}
    wrong = compiled(
        "down_kernel", 90, "bf16", sizes.DOWN_STAGES, kernel=cast, kinds={"x": "*fp32"}, **blocks
    )
    with pytest.raises(AssertionError):
        check_products(wrong)


def check_products(kernel):
    lines = [line for line in kernel.asm["ptx"].splitlines() if "wgmma" in line]
    reads_registers = [
        "mma_async" in line and "{" in line.partition("}")[2] for line in lines
    ]  # a second list of registers, behind that of the sums
    left_running = [int(line.split()[-1].rstrip(";")) for line in lines if "wait_group" in line]
    assert not (any(reads_registers) and any(left_running)), lines


def compiled(name, capability, dtype, stages=4, *, warps=4, kernel=None, kinds=None, **blocks):
    """As Triton compiles it for aligned tensors whose sizes are multiples of 16."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = KERNELS[name] if kernel is None else kernel
    given = kinds or {}
    if not isinstance(kernel, triton.JITFunction):
        pytest.skip("TRITON_INTERPRET is set")
    half = dtype != "fp32"
    constants = {
        **CONSTANTS,
        **blocks,
        "PIECES": 2 if half else 1,
        "PRECISION": "tf32" if half else "tf32x3",
        "EVEN": half,
        "ATOMIC": capability >= 90,
    }
    kinds = {
        argument: "*" + (dtype if kind == "half" else kind)
        for kind, arguments in TENSORS.items()
        for argument in arguments
    }
    kinds |= {**NUMBERS, **dict.fromkeys(constants, "constexpr"), **given}
    source = ASTSource(
        fn=kernel,
        signature={argument: kinds.get(argument, "i32") for argument in kernel.arg_names},
        constexprs={key: value for key, value in constants.items() if key in kernel.arg_names},
        attrs={
            (place,): [["tt.divisibility", 16]]
            for place, argument in enumerate(kernel.arg_names)
            if kinds.get(argument, "i32").startswith("*") or argument in ALIGNED
        },
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of settings whose default a later Triton changes
        return triton.compile(
            source,
            target=GPUTarget("cuda", capability, 32),
            options={"num_stages": stages, "num_warps": warps},
        )
