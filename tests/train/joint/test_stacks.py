"""Stacked LoRAs against their formula, one expert at a time in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from phatgoose.experts import LoraModule
from phatgoose.train.joint.rows import Rows
from phatgoose.train.joint.stacks import GatedStack, LoraStack, add_stack
from tests.tolerances import TOLERANCE, assert_near

CPU = torch.device("cpu")
I, O, L = 6, 5, 3  # noqa: E741
GRADIENT = TOLERANCE[torch.float32].delta


def experts(count, seed):
    """Modules of different ranks; the second expert leaves the site alone if it can."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=random)

    ranks = [1 + (i + seed) % 4 for i in range(count)]
    modules = [LoraModule(normal(r, I), normal(O, r), 0.5 + r) for r in ranks]
    return [None if i == 1 else module for i, module in enumerate(modules)], normal


def formula(x, output, module, gate):
    """W u + scale * B A u * sigmoid(v·u), with what the base adds given."""
    if module is None:
        return output.double()
    x, a, b, gate = (t.double() for t in (x, module.a, module.b, gate))
    return output.double() + module.scale * (x @ a.T @ b.T) * torch.sigmoid(x @ gate)[..., None]


@given(
    counts=st.lists(st.integers(1, 3), min_size=1, max_size=4),
    seed=st.integers(0, 2**16),
    flat=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_gated_is_its_formula(counts, seed, flat, dtype):
    modules, normal = experts(len(counts), seed)
    rows = Rows.of(counts, CPU)
    gates = torch.nn.Parameter(normal(len(counts), I))
    x, output = (normal(sum(counts), L, size).to(dtype).requires_grad_() for size in (I, O))
    stack = GatedStack(modules, gates, torch.float32)
    shape = (lambda t: t.flatten(0, 1)) if flat else (lambda t: t)
    found = add_stack(shape(output), shape(x), stack, rows)
    assert found.dtype == dtype and found.shape == shape(output).shape
    wanted = torch.cat(
        [
            formula(*parts, modules[e], gates[e])
            for e, parts in enumerate(zip(x.split(counts), output.split(counts), strict=True))
        ]
    )
    assert_near(found.view_as(wanted), wanted, TOLERANCE[dtype].output)
    slopes = normal(*wanted.shape).to(dtype)
    ways = (gates, x)
    gradients = torch.autograd.grad(found, ways, shape(slopes))
    expected = torch.autograd.grad(wanted, ways, slopes.double())
    bound = GRADIENT if dtype == torch.float32 else TOLERANCE[dtype].output
    for one, other in zip(gradients, expected, strict=True):
        assert_near(one, other, bound)
    for expert, module in enumerate(modules):
        assert module is not None or not gradients[0][expert].any()


@pytest.mark.parametrize("counts", [[2, 2, 2], [1, 3, 2]])
def test_trained_is_its_formula(counts):
    _, normal = experts(3, 0)
    a, b = (torch.nn.Parameter(normal(3, *shape)) for shape in ((2, I), (O, 2)))
    x, output = (normal(sum(counts), L, size) for size in (I, O))
    stack = LoraStack(a, b, scale=0.7, dropout=0.0)
    found = add_stack(output, x, stack, Rows.of(counts, CPU))
    delta = [u.double() @ a[e].double().T @ b[e].double().T for e, u in enumerate(x.split(counts))]
    wanted = output.double() + 0.7 * torch.cat(delta)
    assert_near(found, wanted, TOLERANCE[torch.float32].output)
    slopes = normal(*wanted.shape)
    gradients = torch.autograd.grad(found, (a, b), slopes)
    expected = torch.autograd.grad(wanted, (a, b), slopes.double())
    for one, other in zip(gradients, expected, strict=True):
        assert_near(one, other, GRADIENT)


def test_one_expert_s_nan_stays_its_own():
    sums = Rows.of([2, 1], CPU).sums(torch.tensor([1.0, 2.0, torch.nan]))
    assert sums[0] == 3 and sums[1].isnan()
