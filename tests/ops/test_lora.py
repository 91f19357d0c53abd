"""The routed sum of LoRA outputs: fast, reference and a loop over tokens agree."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from phatgoose.ops import routed_lora, routed_lora_reference
from phatgoose.ops.backends import sorting
from phatgoose.types import Routing
from tests.tolerances import TOLERANCE, assert_near

OPS = [routed_lora, routed_lora_reference]
# Tokens on both sides of FEW_PAIRS, whatever K is.
TOKENS = st.sampled_from([0, 1, 2, 7, sorting.FEW_PAIRS, sorting.FEW_PAIRS + 1, 131])


@st.composite
def problems(draw, dtypes=tuple(TOLERANCE)):
    """x, a, b and a routing: odd sizes, empty slots, one popular expert, strided tensors."""
    tokens, experts = draw(TOKENS), draw(st.integers(1, 6))
    chosen, rank = draw(st.integers(1, experts)), draw(st.integers(1, 5))
    width, out = draw(st.integers(1, 11)), draw(st.integers(1, 11))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    dtype = draw(st.sampled_from(dtypes))
    sizes = ((tokens, width), (experts, rank, width), (experts, out, rank))
    x, a, b = (torch.randn(size, generator=random).to(dtype) for size in sizes)
    if draw(st.booleans()):
        x, a, b = (v.transpose(-1, -2).contiguous().transpose(-1, -2) for v in (x, a, b))
    order = torch.rand(tokens, experts, generator=random).argsort(-1)[:, :chosen]
    if draw(st.booleans()):  # everybody's favourite, at times more than once
        order[:, 0] = draw(st.integers(0, experts - 1))
    if draw(st.booleans()):
        order[torch.rand(order.shape, generator=random) < 0.3] = -1
    weights = torch.rand(tokens, chosen, generator=random)
    return x, a, b, Routing(order, weights)


def by_token(x, a, b, routing):
    """The definition in float64, one token at a time."""
    rows = []
    for u, experts, weights in zip(x, routing.experts.tolist(), routing.weights, strict=True):
        y = torch.zeros(b.shape[1], dtype=torch.float64)
        for expert, weight in zip(experts, weights, strict=True):
            if expert >= 0:
                y = y + weight.double() * (b[expert].double() @ (a[expert].double() @ u.double()))
        rows.append(y)
    return torch.stack(rows) if rows else torch.zeros(0, b.shape[1], dtype=torch.float64)


def terms(x, a, b, routing):
    """The size of what is summed: the definition with every sign turned to plus."""
    return by_token(x.abs(), a.abs(), b.abs(), replace(routing, weights=routing.weights.abs()))


@pytest.mark.parametrize("op", OPS)
@given(problem=problems())
def test_definition(op, problem):
    x = problem[0]
    found = op(*problem)
    assert found.dtype == x.dtype
    assert_near(found, by_token(*problem), TOLERANCE[x.dtype].output, terms(*problem))


@given(problems())
def test_gathering_and_sorting_agree(problem):
    x, found = problem[0], []
    with pytest.MonkeyPatch.context() as patch:
        for few in (0, 10**6):
            patch.setattr(sorting, "FEW_PAIRS", few)
            found.append(routed_lora(*problem, backend="torch"))
    assert found[0].dtype == found[1].dtype == x.dtype
    assert_near(*found, TOLERANCE[x.dtype].output, terms(*problem))


@pytest.mark.parametrize("op", OPS)
@settings(max_examples=20)
@given(problem=problems(dtypes=(torch.float64,)))
def test_gradients(op, problem):
    found, wanted, size = (
        gradients(compute, problem, sign)
        for compute, sign in ((op, 0), (by_token, 0), (by_token, 1))
    )
    for each in zip(found, wanted, size, strict=True):
        assert_near(*each[:2], TOLERANCE[torch.float32].output, each[2])


def gradients(compute, problem, sign):
    """Of x, a, b and the weights, for some loss; with `sign` 1 every number is made positive."""
    *tensors, routing = problem
    leaves = [v.detach().clone() for v in (*tensors, routing.weights)]
    leaves = [(v.abs() if sign else v).requires_grad_() for v in leaves]
    *factors, weights = leaves
    y = compute(*factors, replace(routing, weights=weights))
    slope = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape)
    loss = (y * (slope.abs() if sign else slope)).sum()
    # With no tokens or no slots the loss depends on nothing, and all gradients are 0.
    return torch.autograd.grad(loss + 0 * sum(leaf.sum() for leaf in leaves), leaves)


@pytest.mark.parametrize("factors", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tokens", [3, 200])
def test_activations_and_factors_of_different_dtypes(factors, tokens):
    random = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, 9, generator=random)
    a, b = torch.randn(4, 2, 9, generator=random), torch.randn(4, 5, 2, generator=random)
    experts = torch.randint(4, (tokens, 2), generator=random)
    routing = Routing(experts, torch.rand(tokens, 2, generator=random))
    found = routed_lora(x, a.to(factors), b.to(factors), routing)
    assert found.dtype == torch.float32
    assert_near(found, by_token(x, a, b, routing), TOLERANCE[factors].output)


@given(problems(dtypes=(torch.float32,)), st.randoms(use_true_random=False))
def test_expert_order_is_irrelevant(problem, random):
    x, a, b, routing = problem
    order = torch.tensor(random.sample(range(len(a)), len(a)))
    slots = torch.cat([order.argsort(), torch.tensor([-1])])
    moved = replace(routing, experts=slots[routing.experts])
    found, wanted = routed_lora(x, a[order], b[order], moved), routed_lora(*problem)
    assert_near(found, wanted, TOLERANCE[x.dtype].output, terms(*problem))


def test_empty_slots_add_exactly_nothing():
    x, a, b = torch.ones(80, 3), torch.ones(2, 1, 3), torch.ones(2, 4, 1)
    for tokens in (2, 80):
        routing = Routing(torch.full((tokens, 2), -1), torch.ones(tokens, 2))
        for op in OPS:
            assert not torch.any(op(x[:tokens], a, b, routing))


class Largest(TorchDispatchMode):
    """Remembers the most elements any operation gave back."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.numel())
        return result


@pytest.mark.parametrize("tokens", [16, 300])
def test_memory_grows_with_chosen_experts_not_with_the_pool(tokens):
    experts, chosen, rank, width, out = 166, 2, 3, 32, 24
    random = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, width, generator=random)
    a = torch.randn(experts, rank, width, generator=random)
    b = torch.randn(experts, out, rank, generator=random)
    routing = Routing(
        torch.randint(experts, (tokens, chosen), generator=random), torch.ones(tokens, chosen)
    )
    with Largest() as largest:
        routed_lora(x, a, b, routing)
    pairs = tokens * chosen
    gathered = rank if pairs <= sorting.FEW_PAIRS else 1  # few pairs gather their factors
    assert 0 < largest.elements <= pairs * gathered * max(width, out) < tokens * experts * out
