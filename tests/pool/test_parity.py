"""Routed models against the float64 reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phatgoose import ExpertPool, record, route, unroute
from tests.models import (
    DECODERS,
    LINEARS,
    make_batch,
    make_model,
    mixed_targets,
    real_tokens,
    save_expert,
    save_experts,
)
from tests.reference import Reference
from tests.tolerances import TOLERANCE, assert_near


def assert_parity(model, folders, batch, *, top_k=2):
    """The routed model is the reference: same logits, same delta, same experts and weights."""
    bound = TOLERANCE[torch.float32]
    reference, bare = Reference(model, folders, top_k), Reference(model, [])
    wanted, wanted_base = reference(**batch), bare(**batch)
    real = real_tokens(batch, "decoder").view(wanted.shape[:2])
    with torch.no_grad():
        base = model(**batch).logits
        route(model, ExpertPool.load(folders), top_k=top_k)
        with record(model) as trace:
            found = model(**batch).logits
        unroute(model)
    assert_near(found[real], wanted[real], bound.output)
    assert_near((found - base)[real], (wanted - wanted_base)[real], bound.delta)
    assert_same_routing(trace, reference, batch)
    return trace


def assert_same_routing(trace, reference, batch):
    assert set(trace.experts) == set(reference.chosen)
    for module, rows in reference.chosen.items():
        keep = real_tokens(batch, trace.streams[module]).tolist()
        chosen = [pad(row, trace.top_k, -1) for row, real in zip(rows, keep, strict=True) if real]
        weights = [
            pad(row, trace.top_k, 0.0)
            for row, real in zip(reference.weights[module], keep, strict=True)
            if real
        ]
        assert trace.experts[module].tolist() == chosen, module
        torch.testing.assert_close(trace.weights[module], torch.tensor(weights), rtol=1e-4, atol=0)


def pad(row, length, fill):
    return row + [fill] * (length - len(row))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", LINEARS)
def test_parity(family, side, tmp_path):
    model = make_model(family)
    folders = save_experts(tmp_path, model, mixed_targets(family, 5))
    trace = assert_parity(model, folders, make_batch(model, [4, 7, 1], side=side))
    lonely = [name for name in trace.experts if name.endswith("." + LINEARS[family][-1])]
    assert lonely
    for name in lonely:  # one candidate: weight 1, and an empty second place
        assert trace.experts[name].tolist() == [[0, -1]] * len(trace.experts[name])
        assert trace.weights[name].tolist() == [[1.0, 0.0]] * len(trace.weights[name])
