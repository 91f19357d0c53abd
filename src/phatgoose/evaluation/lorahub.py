"""LoRAHub: weights of a mixture, found by a few examples and without gradients."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from phatgoose.errors import ConfigError
from phatgoose.evaluation.scoring import score_choices
from phatgoose.pool import ExpertPool, route, unroute
from phatgoose.tasks import Example

SHOTS = 5  # examples, as published
STEPS = 40  # mixtures that are tried, as published
PENALTY = 0.05  # of the mean weight, as published
LARGEST = 1.5  # weight, as published
FIRST_STEP = 0.5  # of the search


def search_weights(
    model: Any,
    tokenizer: Any,
    pool: ExpertPool,
    examples: Sequence[Example],
    *,
    shots: int = SHOTS,
    steps: int = STEPS,
    seed: int = 0,
) -> dict[str, float]:
    """Find the weights of a fixed mixture that suits a few examples: LoRAHub, arXiv:2307.13269.

    It minimises L(w) + 0.05 · mean |w|, where L is the mean negative log-likelihood of the
    examples' targets, averaged over the tokens of each. Only forwards are needed. Two things differ
    from the paper: the experts' products are mixed, Σ w_e · scale_e · B_e A_e, and not their
    factors, so ranks may differ; and weights are from 0 to 1.5, and not from -1.5, so that every
    request may ask for them. The search is scipy's COBYLA, from equal weights that sum to 1. It
    tries every expert once before it can tell them apart, so give it more steps than experts.

    Args:
        model: the plain base. It comes back as it was.
        examples: `shots` of them are taken, by the seed. Choices have no say.
        steps: how many mixtures are tried.

    Raises ConfigError without experts or examples, for counts below 1, and where scipy is missing.
    """
    for what, count in (("shots", shots), ("steps", steps)):
        if count < 1:
            raise ConfigError(f"lorahub: {what} must be at least 1, got {count}.")
    if not examples or not len(pool):
        lacking = "examples" if len(pool) else "experts"
        raise ConfigError(f"lorahub: there are no {lacking}. Give at least one.")
    chosen = random.Random(seed).sample(list(examples), min(shots, len(examples)))
    asked = [replace(each, choices=(each.target,)) for each in chosen]
    route(model, pool, "uniform")  # it needs nothing, and is not asked
    try:
        return _minimised(model, tokenizer, asked, pool.names, steps)
    finally:
        unroute(model)


def _minimised(
    model: Any, tokenizer: Any, asked: Sequence[Example], names: Sequence[str], steps: int
) -> dict[str, float]:
    minimize, bounds_of = _scipy()
    tried: list[tuple[float, dict[str, float]]] = []

    def loss(point: Sequence[float]) -> float:
        # The method may step a little beyond its bounds.
        values = [min(max(float(value), 0.0), LARGEST) for value in point]
        weights = dict(zip(names, values, strict=True))
        found = cost(model, tokenizer, asked, weights)
        tried.append((found, weights))
        return found

    equal = [1.0 / len(names)] * len(names)
    settings = {"maxiter": steps, "rhobeg": FIRST_STEP}
    bounds = bounds_of([0.0] * len(names), [LARGEST] * len(names))
    minimize(loss, equal, method="COBYLA", bounds=bounds, options=settings)
    return min(tried, key=lambda one: one[0])[1]  # the first of equals


def cost(
    model: Any, tokenizer: Any, asked: Sequence[Example], weights: Mapping[str, float]
) -> float:
    """What `search_weights` minimises, for a model that routes."""
    rows = [weights] * len(asked)
    scores = score_choices(model, tokenizer, asked, experts=rows)
    likelihood = sum(score for (score,) in scores) / len(scores)
    return -likelihood + PENALTY * sum(map(abs, weights.values())) / len(weights)


def _scipy() -> tuple[Any, Any]:
    try:
        from scipy.optimize import Bounds, minimize
    except ImportError as error:
        raise ConfigError(
            f"lorahub: needs scipy ({error}): pip install 'phatgoose[eval]'"
        ) from error
    return minimize, Bounds
