"""Tells how far a mean over few examples may be off."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

RESAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """A value and its 95% bootstrap interval."""

    value: float
    low: float
    high: float


def resampled_means(
    scores: Float[np.ndarray, "N M"], *, resamples: int = RESAMPLES, seed: int = 0
) -> Float[np.ndarray, "S M"]:
    """Take the means of M scores per example over S draws of N examples, with replacement.

    The M scores of an example stay together, so differences of methods are paired.
    """
    count = len(scores)
    # How often each draw has each example: a matrix product then gives all means at once.
    draws = np.random.default_rng(seed).multinomial(count, [1 / count] * count, size=resamples)
    means: np.ndarray = draws @ scores / count
    return means


def interval(value: float, samples: Float[np.ndarray, " S"]) -> Interval:
    """Give the value with the 2.5th and 97.5th percentiles of what resampling made of it."""
    low, high = np.percentile(samples, [2.5, 97.5])
    return Interval(float(value), float(low), float(high))


def mean_interval(
    scores: Sequence[float], *, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Give the mean of some scores and its interval."""
    values = np.asarray(scores, dtype=float)
    samples = resampled_means(values[:, None], resamples=resamples, seed=seed)
    return interval(values.mean(), samples[:, 0])
