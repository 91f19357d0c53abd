"""LoRAHub's search: it finds what suits the examples, and says what it cannot do."""

import pytest

from phatgoose import ExpertPool, merge_experts, route, unroute
from phatgoose.errors import ConfigError
from phatgoose.evaluation import search_weights
from phatgoose.evaluation.lorahub import LARGEST, PENALTY, cost
from phatgoose.evaluation.scoring import score_choices
from phatgoose.tasks import Example
from tests.evaluation.world import EXPERTS, World, save_world

ASKED = [Example(f"say {x}?\n", x, (x,)) for x in ("red", "blue", "no")]


@pytest.fixture(scope="module")
def world(tmp_path_factory, tokenizer):
    return World(save_world(tmp_path_factory.mktemp("world"), tokenizer))


def costs(world, weights):
    """Of several mixtures."""
    route(world.model, world.pool, "uniform")
    try:
        return [cost(world.model, world.tokenizer, ASKED, each) for each in weights]
    finally:
        unroute(world.model)


def test_what_is_minimised_is_the_likelihood_of_the_merged_adapter(world):
    """The same weights merged into one adapter: another way to the same number."""
    weights = dict(zip(EXPERTS, (0.3, 1.1, 0.0), strict=True))
    (found,) = costs(world, [weights])
    merged = merge_experts(world.pool, weights=list(weights.values()))
    route(world.model, ExpertPool([merged]), top_k=1, router="uniform")
    try:
        scores = score_choices(world.model, world.tokenizer, ASKED)
    finally:
        unroute(world.model)
    wanted = -sum(score for (score,) in scores) / 3 + PENALTY * 1.4 / 3
    assert found == pytest.approx(wanted, rel=1e-5)


def test_the_weights_found_beat_where_it_began_and_every_expert_alone(world):
    before = {name: value.clone() for name, value in world.model.state_dict().items()}
    found = search_weights(world.model, world.tokenizer, world.pool, ASKED, steps=60)
    assert set(found) == set(EXPERTS) and all(0 <= w <= LARGEST for w in found.values())
    one_hot = [{name: float(name == alone) for name in EXPERTS} for alone in EXPERTS]
    others = [dict.fromkeys(EXPERTS, 1 / 3), *one_hot]
    mine, *theirs = costs(world, [found, *others])
    assert mine < min(theirs)
    again = search_weights(world.model, world.tokenizer, world.pool, ASKED, steps=60)
    assert again == found
    assert all(value.equal(before[n]) for n, value in world.model.state_dict().items())


def test_the_seed_says_which_examples(world):
    def found(seed):
        return search_weights(
            world.model, world.tokenizer, world.pool, ASKED, shots=1, steps=6, seed=seed
        )

    assert found(0) == found(0)
    assert len({tuple(found(seed).values()) for seed in range(4)}) > 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shots": 0}, "shots must be at least 1"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"examples": []}, "there are no examples"),
        ({"pool": ExpertPool()}, "there are no experts"),
    ],
)
def test_what_cannot_be(settings, message, world):
    given = {"pool": world.pool, "examples": ASKED, **settings}
    with pytest.raises(ConfigError, match=message):
        search_weights(world.model, world.tokenizer, **given)
