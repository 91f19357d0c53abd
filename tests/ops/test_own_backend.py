"""A backend of one's own is one file, this class, and one line in BACKENDS."""

from typing import final

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import phatgoose
from phatgoose.errors import ConfigError
from phatgoose.ops import BACKENDS, Backend, backend_names, choose_backend
from phatgoose.ops.backends import Down
from tests.models import make_batch
from tests.ops.gated import check_gated, check_given, problems
from tests.tolerances import TOLERANCE, assert_near


@final
class LoopBackend(Backend):
    """One token after the other."""

    automatic = False

    def why_not(self, device_type, dtype):
        return None if device_type == "cpu" else "it is for a CPU"

    def empty_down(self, x, a, chosen):
        z = x.new_empty(x.shape[0], a.shape[0], chosen, a.shape[2], dtype=torch.float32)
        return Down(z, x.new_empty(0), x.new_empty(0))

    def routed_down(self, x, a, experts, weights):
        down = self.empty_down(x, a, experts.shape[2])
        for t, part, k in torch.cartesian_prod(*map(torch.arange, experts.shape)).tolist():
            low = a[part, experts[t, part, k]].float() @ x[t].float()
            down.z[t, part, k] = weights[t, part, k] * low if experts[t, part, k] >= 0 else 0.0
        return down

    def routed_up_(self, output, b, down, experts, part):
        for t in range(len(output)):
            for k, slot in enumerate(experts[t, part].tolist()):
                output[t] += (b[slot].float() @ down.z[t, part, k]).to(output.dtype)


@pytest.fixture
def loop(monkeypatch):
    choose_backend.cache_clear()
    monkeypatch.setitem(BACKENDS, "loop", LoopBackend())
    yield
    choose_backend.cache_clear()


@pytest.mark.usefixtures("loop")
@pytest.mark.parametrize("check", [check_gated, check_given])
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(problem=problems(st.sampled_from([0, 1, 5]), (torch.float32, torch.float64)))
def test_it_computes_the_definition(check, problem):
    check(problem, "loop")


@pytest.mark.usefixtures("loop")
def test_it_routes_a_model(model_and_pool):
    logits = []
    for backend in ("loop", "reference"):
        model, pool = model_and_pool(count=3)
        phatgoose.route(model, pool, backend=backend)
        with torch.no_grad():
            logits.append(model(**make_batch(model, [4, 3])).logits)
    assert_near(*logits, TOLERANCE[torch.float32].model)
    assert not torch.equal(*logits)  # it was another backend that computed


@pytest.mark.usefixtures("loop")
def test_it_is_named_and_refused_as_the_others_are():
    assert "loop" in backend_names()
    assert choose_backend("auto", "cpu", torch.float64) == "torch"
    with pytest.raises(ConfigError, match="^backend='loop': it is for a CPU. Leave backend at"):
        choose_backend("loop", "cuda")


def test_without_its_line_it_is_unknown():
    with pytest.raises(ConfigError, match=r"backend must be one of \('auto', .*got 'loop'"):
        choose_backend("loop", "cpu")
