"""The published score: the cosine-like product of standardised token and gate."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from phatgoose.errors import MissingGateError
from phatgoose.routers import PhatgooseRouter
from tests.reference import standardise
from tests.tolerances import TOLERANCE, assert_near

SITE = "model.layers.0.self_attn.q_proj"


@given(
    st.integers(0, 5),
    st.integers(1, 4),
    st.integers(1, 40),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    st.integers(0, 99),
)
def test_score(tokens, experts, width, dtype, seed):
    random = torch.Generator().manual_seed(seed)
    x = (3 * torch.randn(tokens, width, generator=random) + 1).to(dtype)
    gates = torch.randn(experts, width, generator=random)
    signatures = torch.nn.functional.layer_norm(gates, (width,))
    found = PhatgooseRouter().score(x, signatures)
    assert found.dtype == torch.float32
    wanted = torch.tensor(
        [
            [float(standardise(gate) @ standardise(u)) / width**0.5 for gate in gates.double()]
            for u in x.double()
        ]
    ).reshape(tokens, experts)
    assert_near(found, wanted, TOLERANCE[torch.float32].delta)


def test_signature_is_the_standardised_gate_in_fp32(model_and_pool):
    _, pool = model_and_pool("llama", 2)
    expert = pool["e1"]
    gate = expert.gates.vectors[SITE]
    for stored in (gate, gate.bfloat16()):
        copy = replace(expert, gates=replace(expert.gates, vectors={SITE: stored}))
        signature = PhatgooseRouter().signature(copy, SITE)
        assert signature.dtype == torch.float32
        bound = TOLERANCE[torch.float32].output
        assert_near(signature, standardise(stored.double()), bound)


def test_scale_and_shift_of_the_gate_do_not_matter(model_and_pool):
    _, pool = model_and_pool("llama", 1)
    expert = pool["e0"]
    gate = expert.gates.vectors[SITE]
    moved = replace(expert, gates=replace(expert.gates, vectors={SITE: 7 * gate - 3}))
    router = PhatgooseRouter()
    assert_near(router.signature(moved, SITE), router.signature(expert, SITE), 1e-3)


def test_an_expert_without_gates_is_named(model_and_pool):
    _, pool = model_and_pool("llama", 1)
    with pytest.raises(MissingGateError, match=r"^e0: has no gates.*phatgoose gate"):
        PhatgooseRouter().signature(replace(pool["e0"], gates=None), SITE)
