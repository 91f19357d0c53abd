"""Gates of adapters of other kinds than LoRA on linear layers, trained on the plain base."""

from dataclasses import replace

import pytest
import torch

from phatgoose import (
    ExpertPool,
    assign,
    load_expert,
    route,
    train_gates_together,
    unroute,
)
from phatgoose.experts import verify_expert
from phatgoose.experts.resolve import resolve
from phatgoose.train.joint.groups import GateGroup
from phatgoose.train.loop.run import Run
from phatgoose.train.settings import GateTraining
from tests.experts.matrix import VARIANTS, Family, logits, make_adapter
from tests.models import make_batch, make_model
from tests.tolerances import TOLERANCE, assert_near

KINDS = (
    "dora",
    "lora_bias",
    "pissa",
    "embedding, dora",
    "embedding and head",
    "saved all at once",
    "tokens",
    "experts and attention",
)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def family_of(kind):
    return Family("qwen3-moe" if kind.startswith("experts") else "gemma3")


def batches(model):
    batch = make_batch(model, [6, 6])
    return [{**batch, "labels": batch["input_ids"]}]


@pytest.mark.parametrize("kind", KINDS)
def test_every_module_of_an_adapter_gets_a_gate(kind, tmp_path):
    family = family_of(kind)
    folder = make_adapter(tmp_path / "e", family, VARIANTS[kind](family))
    model = make_model(family.name)
    plain = logits(model)
    (gates,) = train_gates_together(
        model, {"e": folder}, {"e": batches(model)}, steps=3, learning_rate=0.05, progress=False
    ).values()
    assert torch.equal(logits(model), plain)
    assert set(gates.vectors) == set(load_expert(folder).modules)
    assert all(bool(vector.any()) for vector in gates.vectors.values())
    gates.save(folder)
    assert verify_expert(folder, model) == []
    route(model, ExpertPool.load([folder]), top_k=1)
    routed = logits(model)
    with assign(model, ["e"]):
        alone = logits(model)
    assert_near(routed, alone, TOLERANCE[torch.float32].model)  # one expert has weight 1
    unroute(model)


@pytest.mark.parametrize("kind", KINDS)
def test_a_gate_of_zero_halves_what_a_module_adds(kind, tmp_path):
    """sigmoid(0) is a half: the loss with such gates is that of half the adapter."""
    family = family_of(kind)
    folder = make_adapter(tmp_path / "e", family, VARIANTS[kind](family))
    model, expert = make_model(family.name), load_expert(folder)
    other = replace(expert, name="other")
    run = Run.start(autocast=None, checkpoint=None, progress=False)
    group = GateGroup(model, {"e": expert.modules}, GateTraining(steps=1), run)
    batch = batches(model)[0]
    with torch.no_grad(), group.joint.installed():
        (found,) = group.joint({"e": batch}).losses
    nothing = {
        name: _nothing(delta) for name, delta in resolve(other, model).expert.modules.items()
    }
    pool = ExpertPool([expert, replace(other, modules=nothing, signatures={})])
    route(model, pool, "uniform", top_k="all")
    with torch.no_grad():
        wanted = model(**batch).loss
    assert_near(found, wanted, 1e-5)


def _nothing(delta):
    """The same modules, and nothing added."""
    rest = {key: torch.zeros_like(tensor) for key, tensor in delta.rest.items()}
    changed = replace(delta, b=torch.zeros_like(delta.b))
    return replace(changed, parts=rest) if rest else changed
