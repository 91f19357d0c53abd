"""The bootstrap against the normal approximation, and its laws."""

import numpy as np
import pytest

from phatgoose.evaluation import mean_interval, resampled_means


def test_interval_of_a_mean_is_as_wide_as_theory_says() -> None:
    scores = [1.0] * 120 + [0.0] * 80
    found = mean_interval(scores)
    error = 1.96 * (0.6 * 0.4 / 200) ** 0.5
    assert found.value == 0.6
    assert found.low == pytest.approx(0.6 - error, abs=0.01)
    assert found.high == pytest.approx(0.6 + error, abs=0.01)
    assert mean_interval(scores) == found  # seeded
    assert mean_interval(scores, seed=1) != found


def test_a_constant_has_no_width() -> None:
    found = mean_interval([0.5])
    assert (found.value, found.low, found.high) == pytest.approx((0.5, 0.5, 0.5))


def test_scores_of_an_example_stay_together() -> None:
    first = np.random.default_rng(0).random(50)
    means = resampled_means(np.stack([first, first + 0.25], axis=1), resamples=100)
    assert means.shape == (100, 2)
    np.testing.assert_allclose(means[:, 1] - means[:, 0], 0.25)
