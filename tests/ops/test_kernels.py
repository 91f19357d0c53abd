"""The kernels compile for GPUs that are not here; test_backends.py runs them interpreted."""

import warnings

import pytest

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
    "half": ("x", "signatures", "a", "b", "output"),
    "fp32": ("partial", "sums", "weights", "z"),
    "i32": ("counts", "members"),
    "i64": ("experts",),
    "i1": ("open_slots",),
}
NUMBERS = dict.fromkeys(("eps", "temperature", "null_score"), "fp32")  # the others count something
CONSTANTS = {"S": 3, "K": 2, "SK": 6, "SPLITS": 2, "COLUMNS": 2, "BLOCK": 256, "UNIT": False}
CONSTANTS |= {"BLOCK_T": 16, "BLOCK_C": 32, "BLOCK_K": 2, "BLOCK_R": 16, "BLOCK_M": 16}
CONSTANTS |= {"BLOCK_I": 64, "BLOCK_X": 64, "BLOCK_O": 64, "CHOOSE": True, "HAS_NULL": True}


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(("capability", "dtype"), [(80, "bf16"), (90, "bf16"), (90, "fp32")])
def test_compiles(name, capability, dtype):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = KERNELS[name]
    if not isinstance(kernel, triton.JITFunction):
        pytest.skip("TRITON_INTERPRET is set")
    half = dtype != "fp32"
    constants = {
        **CONSTANTS,
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
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert compiled.asm["cubin"]
