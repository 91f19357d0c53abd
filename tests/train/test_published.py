"""The published recipe, pinned: each figure with where the authors say it.

Sources: the paper, arXiv:2402.05859 (sections 3.1, 3.2 and 4), and the authors' code,
github.com/r-three/phatgoose at 1d23ac4: colm/experiments/train.gin (AdamW, learning rate 5e-3, no
weight decay, constant rate after a warm-up of 0.06), colm/experiments/bash_scripts/train_gate.sh
(100 steps, only the gates learn, only_sigmoid), src/procedures/utils/optimizer_scheduler.py (eps
1e-8, and torch's own betas).
"""

import inspect
import math

import pytest
import torch

from phatgoose import route, train_gates, train_gates_together
from phatgoose.nn.settings import RoutingSettings
from phatgoose.ops import choose_experts
from phatgoose.routers import make_router
from phatgoose.routers.phatgoose import PhatgooseRouter
from phatgoose.train.settings import GateTraining
from tests.train.toys import make, make_batches, make_collection, modules_of

STEPS, RATE, WARMUP = 100, 5e-3, 0.06
ADAMW = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "amsgrad": False}


def spied(monkeypatch):
    """The settings of AdamW at every step it takes."""
    seen = []
    step = torch.optim.AdamW.step

    def watch(self, *args, **kwargs):
        seen.extend({key: group[key] for key in ("lr", *ADAMW)} for group in self.param_groups)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", watch)
    return seen


def one_alone():
    train_gates(make(), make_batches(2), progress=False)


def two_together():
    base, models = make_collection("llama", 2)
    batches = dict.fromkeys(models, make_batches(2))
    train_gates_together(base, modules_of(models), batches, progress=False)


@pytest.mark.parametrize("phase", [one_alone, two_together])
def test_the_steps_a_gate_is_trained_with(phase, monkeypatch):
    """The authors' warm-up begins at a rate of zero, a step that changes nothing; ours at 1/6."""
    seen = spied(monkeypatch)
    phase()
    rates = [group.pop("lr") for group in seen]
    assert all(group == ADAMW for group in seen)
    groups = len(rates) // STEPS
    assert len(rates) == STEPS * groups
    warmup = int(STEPS * WARMUP)
    assert warmup == 6
    wanted = [RATE * min(1.0, (step + 1) / warmup) for step in range(STEPS)]
    assert rates[::groups] == pytest.approx(wanted, rel=1e-9)


def test_every_way_to_train_gates_has_these_defaults():
    """Nobody's own default may drift from the published one."""
    wanted = {"steps": STEPS, "learning_rate": RATE, "warmup_ratio": WARMUP}
    assert {name: getattr(GateTraining(), name) for name in wanted} == wanted
    for function in (train_gates, train_gates_together):
        given = inspect.signature(function).parameters
        assert {name: given[name].default for name in wanted} == wanted, function.__name__


def test_a_gate_starts_at_zero_and_halves_its_adapter(monkeypatch):
    """sigmoid(0) = 1/2: before the first step every adapter works at half its strength (3.1)."""
    start = []
    step = torch.optim.AdamW.step

    def watch(self, *args, **kwargs):
        start.extend(p.detach().clone() for group in self.param_groups for p in group["params"])
        monkeypatch.setattr(torch.optim.AdamW, "step", step)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", watch)
    train_gates(make(), make_batches(1), steps=1, progress=False)
    assert start
    assert not any(bool(gate.any()) for gate in start)


def test_how_a_token_is_routed():
    """3.2: standardise gate and activation, dot over sqrt(d), keep two, softmax over the two."""
    router = make_router(inspect.signature(route).parameters["router"].default)
    assert type(router) is PhatgooseRouter
    settings = RoutingSettings.of(router)
    assert settings.top_k == 2
    assert settings.temperature == 1.0
    assert settings.scale == "softmax"
    assert settings.null_score is None

    torch.manual_seed(0)
    x, gates = torch.randn(5, 12, dtype=torch.float64), torch.randn(4, 12, dtype=torch.float64)

    def standard(v):
        variance = v.var(-1, unbiased=False, keepdim=True)
        return (v - v.mean(-1, keepdim=True)) / (variance + 1e-5).sqrt()

    scores = standard(x) @ standard(gates).T / math.sqrt(12)
    found = router.score(x.float(), standard(gates).float())
    torch.testing.assert_close(found.double(), scores, rtol=1e-5, atol=1e-5)
    routing = choose_experts(scores, settings.top_k)
    best = scores.sort(dim=-1, descending=True)
    assert torch.equal(routing.experts, best.indices[:, :2])
    weights = best.values[:, :2].softmax(-1).float()
    torch.testing.assert_close(routing.weights, weights, rtol=1e-5, atol=1e-6)
