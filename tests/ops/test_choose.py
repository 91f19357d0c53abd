"""Choosing experts, against a sort of each row in plain Python."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from phatgoose.nn.settings import KNOBS
from phatgoose.ops import Choosing, choose, choose_experts
from tests.tolerances import TOLERANCE, assert_near

# Few different values, so that ties are common; -inf is no candidate.
VALUES = st.sampled_from([-2.0, -0.5, 0.0, 0.25, 1.0, 3.0, -math.inf])


@st.composite
def score_tables(draw, width=st.integers(1, 12)):
    """[T E] scores; some tokens may use no expert at all."""
    columns = draw(width)
    rows = draw(st.lists(st.lists(VALUES, min_size=columns, max_size=columns), max_size=4))
    return torch.tensor(rows).reshape(-1, columns)


def choose_by_sorting(row, top_k, temperature=1.0, scale="softmax", null_score=None):
    scores = row if null_score is None else [*row, null_score]
    candidates = [slot for slot, score in enumerate(scores) if score > -math.inf]
    kept = sorted(candidates, key=lambda slot: (-scores[slot], slot))[:top_k]
    weights = [1.0] * len(kept)
    if scale == "softmax":
        powers = [math.exp((scores[slot] - scores[kept[0]]) / temperature) for slot in kept]
        weights = [power / sum(powers) for power in powers]
    left = min(top_k, len(scores)) - len(kept)
    return [-1 if slot == len(row) else slot for slot in kept] + [-1] * left, weights + [0] * left


@given(
    score_tables(),
    st.integers(1, 14),
    st.sampled_from([0.1, 1.0, 7.0]),
    st.sampled_from(["softmax", "unit"]),
    st.sampled_from([None, -3.0, 0.25, 9.0]),
)
def test_definition(scores, top_k, temperature, scale, null_score):
    settings = {"temperature": temperature, "scale": scale, "null_score": null_score}
    found = choose_experts(scores, top_k, **settings)
    wanted = [choose_by_sorting(row, top_k, **settings) for row in scores.tolist()]
    count = min(top_k, scores.shape[1] + (null_score is not None))
    assert found.experts.shape == found.weights.shape == (len(wanted), count)
    assert found.experts.dtype == torch.int64
    assert found.weights.dtype == torch.float32
    assert found.experts.tolist() == [slots for slots, _ in wanted]
    weights = torch.tensor([weights for _, weights in wanted]).reshape(found.weights.shape)
    assert_near(found.weights, weights, TOLERANCE[torch.float32].output)


@given(score_tables(), st.integers(1, 12))
def test_both_ways_to_find_the_best_agree(scores, top_k):
    found = []
    with pytest.MonkeyPatch.context() as patch:
        for few in (0, 99):
            patch.setattr(choose, "FEW_EXPERTS", few)
            found.append(choose_experts(scores, top_k))
    assert torch.equal(found[0].experts, found[1].experts)
    assert torch.equal(found[0].weights, found[1].weights)


@pytest.mark.parametrize("experts", [2, choose.FEW_EXPERTS, choose.FEW_EXPERTS + 1, 40])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_ties_go_to_the_lower_slot(experts, dtype):
    scores = torch.ones(3, experts, dtype=dtype)
    for top_k in (1, 2, experts):
        routing = choose_experts(scores, top_k)
        assert routing.experts.tolist() == [list(range(top_k))] * 3
        assert_near(routing.weights, torch.full((3, top_k), 1 / top_k), 1e-6)


@given(score_tables(st.just(5)), st.integers(1, 5), st.sampled_from([0.05, 1.0, 30.0]))
def test_weights_sum_to_one_where_there_is_a_candidate(scores, top_k, temperature):
    routing = choose_experts(scores, top_k, temperature=temperature)
    some = (scores > -math.inf).any(-1).float()
    assert_near(routing.weights.sum(-1), some, 1e-6)
    assert bool((routing.weights >= 0).all())


def test_temperature_sharpens_and_flattens():
    scores = torch.tensor([[1.0, 0.0]])
    cold, hot = (choose_experts(scores, 2, temperature=t).weights for t in (0.01, 100.0))
    assert cold[0, 0] > 0.999
    assert 0.5 < hot[0, 0] < 0.51


def test_unit_scale_keeps_the_choice():
    scores = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    soft, unit = (choose_experts(scores, 3, scale=scale) for scale in ("softmax", "unit"))
    assert torch.equal(soft.experts, unit.experts)
    assert torch.equal(unit.weights, torch.ones(6, 3))


def test_the_null_candidate_takes_its_share():
    scores = torch.tensor([[1.0, 0.0], [-1.0, -2.0], [3.0, 2.0], [0.5, -1.0]])
    routing = choose_experts(scores, 2, null_score=0.5)
    assert routing.experts.tolist() == [[0, -1], [-1, 0], [0, 1], [0, -1]]  # last: a tie
    assert_near(routing.weights.sum(-1), torch.ones(4), 1e-6)
    assert routing.weights[1, 0] > routing.weights[1, 1] > 0


@pytest.mark.parametrize("scale", ["softmax", "unit"])
def test_places_without_a_candidate_are_empty(scale):
    scores = torch.tensor([[-math.inf, 2.0, -math.inf], [-math.inf] * 3], requires_grad=True)
    routing = choose_experts(scores, 3, scale=scale)
    assert routing.experts.tolist() == [[1, -1, -1], [-1, -1, -1]]
    assert routing.weights.tolist() == [[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    if scale == "softmax":
        routing.weights.square().sum().backward()
        assert not torch.isnan(scores.grad).any()


def test_scores_are_compared_in_fp32():
    scores = torch.tensor([[1.0, 1.0 + 1e-12]], dtype=torch.float64)
    assert choose_experts(scores, 1).experts.tolist() == [[0]]
    assert choose_experts(scores.bfloat16(), 2).weights.dtype == torch.float32


def test_no_tokens_and_no_candidates():
    assert choose_experts(torch.zeros(0, 3), 2).experts.shape == (0, 2)
    assert choose_experts(torch.zeros(4, 0), 2).weights.shape == (4, 0)


def test_gradients_reach_the_scores():
    scores = torch.tensor([[0.3, -0.2, 0.1]], dtype=torch.float64, requires_grad=True)
    choose_experts(scores, 2).weights[0, 0].backward()
    first = math.exp(0.3) / (math.exp(0.3) + math.exp(0.1))
    slope = first * (1 - first)
    wanted = torch.tensor([[slope, 0.0, -slope]], dtype=torch.float64)
    assert_near(scores.grad, wanted, TOLERANCE[torch.float32].output)


@pytest.mark.parametrize("few", [0, choose.FEW_EXPERTS])
@pytest.mark.parametrize("top_k", [1, 2, choose.FEW_EXPERTS])
@pytest.mark.parametrize("null_score", [None, 0.1])
def test_leading_dimensions_are_tokens(few, top_k, null_score, monkeypatch):
    """Scores [2, 3, E] are those of six tokens: each is chosen for along its own last dimension."""
    monkeypatch.setattr(choose, "FEW_EXPERTS", few)
    scores = torch.randn(2, 3, 9, generator=torch.Generator().manual_seed(1))
    scores[0, 1] = scores[1, 2, 3:] = -math.inf
    together = choose_experts(scores, top_k, null_score=null_score)
    alone = choose_experts(scores.flatten(0, 1), top_k, null_score=null_score)
    assert torch.equal(together.experts.flatten(0, 1), alone.experts)
    assert torch.equal(together.weights.flatten(0, 1), alone.weights)


def test_operators_take_every_knob():
    """The tuple, the operators' schema and the settings say the same, in one order."""
    assert [piece.split()[-1] for piece in choose.CHOOSING.split(", ")] == [*Choosing._fields]
    names = [argument.name for argument in torch.ops.phatgoose.gated_down.default._schema.arguments]
    assert names[-len(Choosing._fields) :] == [*Choosing._fields]
    knobs = {"unit" if name == "scale" else name for name in KNOBS}
    assert knobs == set(Choosing._fields)
