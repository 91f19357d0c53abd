"""Settings are checked before anything is loaded."""

import pytest

from phatgoose.errors import ConfigError
from phatgoose.nn import RoutingSettings
from phatgoose.serve.pool.settings import ServeSettings


def test_what_is_not_given_is_what_route_has():
    settings = ServeSettings.read({"experts": ["a"]})
    assert settings.experts == ("a",)
    assert settings.router == "phatgoose"
    assert settings.routing == RoutingSettings()
    assert settings.base_load_format == "auto"
    assert not settings.record_routing


def test_a_pool_may_start_empty():
    room = {"targets": ["q_proj"], "capacity": 2, "max_rank": 4}
    settings = ServeSettings.read({"experts": [], "routing": True, **room})
    assert (settings.experts, settings.targets) == ((), ("q_proj",))
    assert settings.record_routing


def test_what_is_given():
    settings = ServeSettings.read(
        {"experts": ["a", "b"], "top_k": 1, "scale": "unit", "capacity": 4, "max_rank": 8}
    )
    assert settings.routing == RoutingSettings(top_k=1, scale="unit")
    assert (settings.capacity, settings.max_rank) == (4, 8)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "wants its settings in additional_config"),
        (["a"], "list in their place"),
        ({}, "experts must be a list"),
        ({"experts": []}, "experts is empty"),
        ({"experts": [], "targets": ["q_proj"], "capacity": 2}, "targets, capacity and max_rank"),
        ({"experts": ["a"], "targets": "q_proj"}, "targets must be a list"),
        ({"experts": ["a"], "routing": 1}, "routing is true or false"),
        ({"experts": "folder"}, "experts must be a list"),
        ({"experts": ["a", 1]}, "experts must be a list"),
        ({"experts": ["a"], "topk": 2}, "no setting 'topk'"),
        ({"experts": ["a"], "top_k": 0}, "top_k must be at least 1"),
        ({"experts": ["a"], "capacity": True}, "capacity must be at least 1"),
        ({"experts": ["a"], "max_rank": 0}, "max_rank must be at least 1"),
        ({"experts": ["a"], "router": "no such"}, "no router is called"),
        ({"experts": ["a"], "router": 3}, "router must be a name"),
        ({"experts": ["a"], "router": "seqr+zscore"}, "wants to run the base first"),
        ({"experts": ["a"], "router": "phatgoose_mixed"}, "Choose from .*, phatgoose, "),
        ({"experts": ["a"], "router": "phatgoose+adapter_evidence"}, "Give it a file"),
        ({"experts": ["a"], "background": 1}, "background must be a file's name"),
        ({"experts": ["a"], "router": "phatgoose+evidence+evidence"}, "wants to run the base"),
        (
            {"experts": ["a"], "router": "phatgoose+evidence", "null_score": 0.1},
            "there is no null_score",
        ),
    ],
)
def test_refused(config, message):
    with pytest.raises(ConfigError, match=message):
        ServeSettings.read(config)
