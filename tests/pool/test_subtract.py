"""General knowledge subtraction, against float64 and against PEFT's Arrow."""

from dataclasses import replace

import pytest
import torch
from peft import ArrowConfig, PeftModel, create_arrow_model
from peft.tuners.lora import LoraLayer

from phatgoose import ExpertPool, route, subtract_general
from phatgoose.errors import ConfigError, IncompatibleExpertError, MissingGateError
from tests.models import make_batch, make_model, save_experts
from tests.pool.test_merge import EXACT, product, same, truncated, values
from tests.tolerances import TOLERANCE, assert_near


def wanted(expert, generals, name):
    """scale B A less the mean of the generals', formed whole."""
    own = product(expert.modules[name]) if name in expert.modules else 0.0
    theirs = [product(g.modules[name]) for g in generals if name in g.modules]
    return own - sum(theirs) / len(generals)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("rank", [None, 2])
def test_the_difference_of_the_products(model_and_pool, count, rank):
    *experts, _, _ = pool = model_and_pool("llama", 6)[1].experts
    generals = pool[-count:]
    before = [values(expert) for expert in pool]
    made = subtract_general(experts, generals[0] if count == 1 else generals, rank=rank)
    assert [e.name for e in made] == [e.name for e in experts]
    for new, old in zip(made, experts, strict=True):
        assert new.modules.keys() == {n for e in (old, *generals) for n in e.modules}
        for name, lora in new.modules.items():
            whole = wanted(old, generals, name)
            close = whole if rank is None else truncated(whole, rank)
            assert_near(product(lora), close, EXACT, size=whole)
    assert all(same(values(e), b) for e, b in zip(pool, before, strict=True))


def test_gates_do_not_survive(model_and_pool):
    model, pool = model_and_pool("llama", 3)
    *experts, general = pool.experts
    made = subtract_general(experts, general)
    assert all(e.gates is not None for e in experts)
    assert all((e.gates, e.folder) == (None, None) for e in made)
    with pytest.raises(MissingGateError, match="e0: has no gates"):
        route(model, ExpertPool(made))


def test_an_expert_of_general_knowledge_alone_becomes_nothing(model_and_pool):
    expert = model_and_pool("llama", 1)[1].experts[0]
    (made,) = subtract_general([expert], replace(expert, name="general"))
    for name, lora in made.modules.items():
        found, size = product(lora), product(expert.modules[name])
        assert_near(found, torch.zeros_like(found), EXACT, size=size)


@torch.no_grad()
def test_factors_are_what_peft_subtracts(tmp_path):
    """PEFT's Arrow edits its adapters in place at the first forward; ours are new."""
    model = make_model("llama")
    targets = [("q_proj", "up_proj")] * 4
    folders = save_experts(tmp_path, model, targets, rank=2, alpha=4)
    *experts, one, two = ExpertPool.load(folders).experts
    made = subtract_general(experts, [one, two], factors=True)
    config = ArrowConfig(top_k=1, use_gks=True, rng_seed=0)
    paths = [str(folder) for folder in folders]
    arrow: PeftModel = create_arrow_model(make_model("llama"), paths[:2], config, paths[2:])
    arrow(**make_batch(model, [5]))
    layers = {
        name.removeprefix("base_model.model."): layer
        for name, layer in arrow.named_modules()
        if isinstance(layer, LoraLayer)
    }
    for i, expert in enumerate(made):
        assert expert.modules.keys() == layers.keys()
        for name, lora in expert.modules.items():
            layer = layers[name]
            assert_near(lora.a, layer.lora_A[f"task_{i}"].weight, TOLERANCE[torch.float32].output)
            assert_near(lora.b, layer.lora_B[f"task_{i}"].weight, TOLERANCE[torch.float32].output)
            assert lora.scale == layer.scaling[f"task_{i}"] == experts[i].modules[name].scale


def test_what_cannot_be_subtracted(model_and_pool, saved_experts):
    _, pool = model_and_pool("llama", 4)
    *experts, general = pool.experts
    with pytest.raises(ConfigError, match="no general expert"):
        subtract_general(experts, [])
    with pytest.raises(ConfigError, match="e0: two experts of this name"):
        subtract_general(experts, experts[0])
    with pytest.raises(ConfigError, match="rank must be at least 1, got 0"):
        subtract_general(experts, general, rank=0)
    with pytest.raises(ConfigError, match="factors keep the experts' rank"):
        subtract_general(experts, general, rank=2, factors=True)
    with pytest.raises(ConfigError, match="e0 has rank 1 at .*, e3 [04]"):
        subtract_general(experts, general, factors=True)
    foreign = ExpertPool.load(saved_experts("gpt2", 1)).experts[0]
    with pytest.raises(IncompatibleExpertError, match="another base"):
        subtract_general(experts, replace(foreign, name="general"))
