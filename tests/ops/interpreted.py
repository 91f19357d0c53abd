"""Triton's kernels on a CPU; test_backends.py runs this file in a process of its own.

Triton reads TRITON_INTERPRET when it is imported. Its interpreter gets products in bf16 wrong, so
these are left to a GPU.
"""

import os

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from phatgoose import ExpertPool, restrict, route
from phatgoose.ops import routed_lora
from phatgoose.ops.backends.triton import sizes
from phatgoose.types import Routing
from tests.models import make_batch, make_model, save_experts
from tests.ops.gated import (
    check_far_from_zero,
    check_gated,
    check_given,
    problems,
)
from tests.ops.test_lora import by_token, gradients, terms
from tests.tolerances import TOLERANCE, assert_near

assert os.environ.get("TRITON_INTERPRET") == "1"

DTYPES = (torch.float32, torch.float16)
FEW = 3  # in place of sizes.FEW_TOKENS: more tokens than these are grouped by expert

examples = hypothesis.settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=25,
    phases=[hypothesis.Phase.generate],  # making a failure small takes minutes here
)


@pytest.fixture(autouse=True, scope="module")
def few_tokens():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sizes, "FEW_TOKENS", FEW)
        yield


TOKENS = st.sampled_from([0, 1, FEW, FEW + 1, 9])


@examples
@hypothesis.given(problems(TOKENS, DTYPES, most=3))
def test_scored_by_gate(problem):
    check_gated(problem, "triton")


@examples
@hypothesis.given(problems(TOKENS, DTYPES, most=3))
def test_chosen_elsewhere(problem):
    check_given(problem, "triton")


@pytest.mark.parametrize("tokens", [FEW, 9])
def test_a_mean_far_from_zero(tokens):
    check_far_from_zero(tokens, "triton")


def many_pairs(tokens):
    random = torch.Generator().manual_seed(0)
    sizes = ((tokens, 9), (3, 3, 9), (3, 7, 3))
    x, a, b = (torch.randn(size, generator=random) for size in sizes)
    experts = torch.randint(-1, 3, (tokens, 2), generator=random)
    experts[::2] = 1
    return x, a, b, Routing(experts, torch.rand(tokens, 2, generator=random))


def test_several_blocks_of_one_expert():
    problem = many_pairs(150)
    found = routed_lora(*problem, backend="triton")
    assert_near(found, by_token(*problem), TOLERANCE[torch.float32].output, terms(*problem))


@pytest.mark.parametrize("tokens", [FEW, 9])
def test_wide_inputs_are_split(tokens):
    """Over programs that each sum a part of the features, with a short last part."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, 2100, generator=random)
    a = torch.randn(2, 8, 2100, generator=random)
    b = torch.randn(2, 300, 8, generator=random)
    experts = torch.arange(2).repeat(tokens, 1)
    routing = Routing(experts, torch.rand(tokens, 2, generator=random))
    problem = (x, a, b, routing)
    found = routed_lora(*problem, backend="triton")
    assert_near(found, by_token(*problem), TOLERANCE[x.dtype].output, terms(*problem))


@pytest.mark.parametrize("tokens", [FEW, 9])
@pytest.mark.parametrize("strided", ["x", "a", "b", "experts", "weights"])
def test_strided_tensors(strided, tokens):
    """Every second column of a wider tensor: the routing of one layer of several, for example."""
    x, a, b, routing = many_pairs(tokens)
    given = {"x": x, "a": a, "b": b, "experts": routing.experts, "weights": routing.weights}
    wanted = by_token(x, a, b, routing)
    given[strided] = given[strided].repeat_interleave(2, dim=-1)[..., ::2]
    found = torch.ops.phatgoose.routed_lora(*given.values(), "triton")
    assert_near(found, wanted, TOLERANCE[x.dtype].output, terms(x, a, b, routing))


@pytest.mark.parametrize("tokens", [FEW, 9])
def test_gradients(tokens):
    problem = many_pairs(tokens)
    triton = gradients(lambda *call: routed_lora(*call, backend="triton"), problem, 0)
    wanted, size = (gradients(by_token, problem, sign) for sign in (0, 1))
    for each in zip(triton, wanted, size, strict=True):
        assert_near(*each[:2], TOLERANCE[torch.float32].output, each[2])


@pytest.mark.parametrize("tokens", [0, FEW, 9])
def test_operators_are_what_they_declare(tokens):
    """Shapes and dtypes, that is, with few tokens and with many."""
    x, a, b, routing = many_pairs(tokens)
    signatures = torch.randn(3, 9, generator=torch.Generator().manual_seed(1))
    operators, opened = torch.ops.phatgoose, torch.ones(1, 3, dtype=torch.bool)
    gates = signatures, signatures.sum(-1).unsqueeze(0), opened, a.unsqueeze(0)
    check = torch.library.opcheck
    only = ("test_schema", "test_faketensor")
    call = (x, *gates, None, None, "triton", 2, 1.0, False, None)
    check(operators.gated_down.default, call, test_utils=only)
    experts, _, z, *plan = operators.gated_down(*call)
    check(
        operators.routed_up_.default,
        (torch.zeros(tokens, 7), b, z, experts, *plan, 0, "triton"),
        test_utils=only,
    )
    routing = routing.experts.unsqueeze(1), routing.weights.unsqueeze(1)
    call = (x, a.unsqueeze(0), *routing, "triton")
    check(operators.routed_down.default, call, test_utils=only)


# The experts adapt some of the layers that read one input, all of them, or others.
TARGETS = [("q_proj", "k_proj", "v_proj", "o_proj"), ("q_proj",), ("k_proj", "v_proj"), ("v_proj",)]


@pytest.mark.parametrize(
    ("length", "router"), [(FEW, {"null_score": 0.1, "top_k": 3}), (FEW + 1, {})]
)
def test_a_routed_model(length, router, tmp_path):
    """Through banks: several parts, spare slots, a restriction, another pool."""
    pool = ExpertPool.load(save_experts(tmp_path, make_model("llama", layers=1), TARGETS))
    last = pool["e3"]
    pool.remove("e3")
    fast, slow = (
        route(make_model("llama", layers=1), pool, capacity=6, backend=backend, **router)
        for backend in ("triton", "torch")
    )
    batch = make_batch(fast, [length])

    def compare(gradients=False):
        with torch.set_grad_enabled(gradients):
            found, wanted = fast(**batch).logits, slow(**batch).logits
        assert_near(found, wanted, TOLERANCE[torch.float32].model)

    compare()
    compare(gradients=True)
    with restrict(fast, ["e1"]), restrict(slow, ["e1"]):
        compare()
    pool.add(last)
    compare()


@pytest.mark.parametrize("length", [FEW, FEW + 1])
def test_a_routed_model_with_a_prior(length, tmp_path):
    pool = ExpertPool.load(save_experts(tmp_path, make_model("llama", layers=1), TARGETS))
    router = "phatgoose+adapter_evidence"
    found, wanted = (
        route(make_model("llama", layers=1), pool, router, capacity=6, backend=backend)(
            **make_batch(make_model("llama", layers=1), [length])
        ).logits
        for backend in ("triton", "reference")
    )
    assert_near(found, wanted, TOLERANCE[torch.float32].model)
