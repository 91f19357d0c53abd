"""What every router shares: being found by name."""

import pytest
import torch

from phatgoose import ExpertPool, record, route
from phatgoose.errors import ConfigError
from phatgoose.routers import PhatgooseRouter, Router, make_router
from phatgoose.types import TokenContext
from tests.models import make_batch


@pytest.fixture
def registry(monkeypatch):
    """A copy of the registry, so that routers made by a test are forgotten after it."""
    monkeypatch.setattr(Router, "_known", dict(Router._known))
    return Router._known


def make_constant(name):
    """A new router class that prefers later experts, whatever the token."""

    class Constant(Router):
        def signature(self, expert, module):
            return torch.zeros(expert.modules[module].in_features)

        def score(self, x, signatures):
            return torch.arange(float(len(signatures))).expand(len(x), -1)

    if name is None:
        return Constant
    return type("Named", (Constant,), {"name": name})


def test_only_the_library_s_routers_are_known():
    assert Router._known["phatgoose"] is PhatgooseRouter
    assert all(cls.__module__.startswith("phatgoose.") for cls in Router._known.values())


def test_by_name_or_as_given():
    assert isinstance(make_router("phatgoose"), PhatgooseRouter)
    router = PhatgooseRouter()
    assert make_router(router) is router


def test_an_unknown_name_lists_the_known_ones(registry):
    make_constant("zebra")
    with pytest.raises(ConfigError, match=r"'nonsense'.*phatgoose.*zebra"):
        make_router("nonsense")


def test_a_subclass_with_a_name_is_found(registry, model_and_pool):
    make_constant("last")
    model, pool = model_and_pool("llama", 3)
    route(model, pool, router="last", top_k=1)
    with record(model) as trace:
        model(**make_batch(model, [3]))
    assert trace.experts["model.layers.0.self_attn.q_proj"].tolist() == [[2]] * 3


def test_a_subclass_without_a_name_is_not_registered(registry):
    before = set(registry)
    make_constant(None)
    assert set(registry) == before


def test_a_router_has_no_prior_unless_it_says_so():
    context = TokenContext(length=2, ids=torch.ones(1, 2).long(), real=torch.ones(1, 2).bool())
    assert PhatgooseRouter().prior(context, list(ExpertPool())) is None


def test_a_router_needs_signatures_and_scores():
    with pytest.raises(TypeError, match="abstract"):
        type("Empty", (Router,), {})()
