"""The kernels compile for GPUs that are not here; test_backends.py runs them interpreted."""

import warnings

import pytest
import torch

triton = pytest.importorskip("triton", reason="the kernels are Triton's")
gate_kernels = pytest.importorskip("phatgoose.ops.gate_kernels")
lora_kernels = pytest.importorskip("phatgoose.ops.lora_kernels")

KERNELS = {
    name: kernel
    for module in (gate_kernels, lora_kernels)
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
    launch = pytest.importorskip("phatgoose.ops.launch")
    size = 4 if dtype == "fp32" else 2
    block_t, block_o = launch._up_blocks(rank, size)
    sizes = {"BLOCK_R": rank, "BLOCK_T": block_t, "BLOCK_O": block_o, "COLUMNS": launch.UP_COLUMNS}
    assert compiled("up_kernel", 80, dtype, **sizes).metadata.shared <= 99 << 10
    block_i = launch._down_features(rank, size)
    sizes = {"BLOCK_R": rank, "BLOCK_T": launch.DOWN_TOKENS, "BLOCK_I": block_i}
    stages = launch.DOWN_STAGES
    assert compiled("down_kernel", 80, dtype, stages, **sizes).metadata.shared <= 99 << 10
    for tokens in (1, 100, 1000):
        kind = torch.float32 if dtype == "fp32" else torch.bfloat16
        block_t, block_m, block_i, _, _, stages = launch._score_blocks(tokens, kind)
        sizes = {"BLOCK_T": block_t, "BLOCK_M": block_m, "BLOCK_I": block_i}
        assert compiled("scores_kernel", 80, dtype, stages, **sizes).metadata.shared <= 99 << 10


def compiled(name, capability, dtype, stages=4, **sizes):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = KERNELS[name]
    if not isinstance(kernel, triton.JITFunction):
        pytest.skip("TRITON_INTERPRET is set")
    half = dtype != "fp32"
    constants = {
        **CONSTANTS,
        **sizes,
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
    kinds |= {**NUMBERS, **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(
        fn=kernel,
        signature={argument: kinds.get(argument, "i32") for argument in kernel.arg_names},
        constexprs={key: value for key, value in constants.items() if key in kernel.arg_names},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of settings whose default a later Triton changes
        return triton.compile(
            source, target=GPUTarget("cuda", capability, 32), options={"num_stages": stages}
        )
