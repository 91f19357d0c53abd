"""Settings are checked when they are made."""

import math
from dataclasses import FrozenInstanceError

import pytest

from phatgoose.errors import ConfigError
from phatgoose.nn import RoutingSettings


def test_defaults_are_the_published_ones():
    assert RoutingSettings() == RoutingSettings(
        top_k=2, temperature=1.0, scale="softmax", null_score=None
    )


@pytest.mark.parametrize(
    "wrong",
    [
        {"top_k": 0},
        {"top_k": -1},
        {"temperature": 0.0},
        {"temperature": -1.0},
        {"temperature": math.inf},
        {"temperature": math.nan},
        pytest.param({"scale": "sum"}, marks=pytest.mark.wrong_types),
        {"null_score": math.inf},
        {"null_score": math.nan},
    ],
    ids=str,
)
def test_a_wrong_setting_is_named(wrong):
    (name, value), *_ = wrong.items()
    with pytest.raises(ConfigError, match=rf"^{name} must be .*{value}"):
        RoutingSettings(**wrong)


def test_settings_do_not_change():
    with pytest.raises(FrozenInstanceError):
        RoutingSettings().top_k = 3
