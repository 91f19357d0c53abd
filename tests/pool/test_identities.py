"""Laws of routing that need no reference: what has to be the same however it is reached."""

import copy
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel

from phatgoose import ExpertPool, record, restrict, route, unroute
from tests.models import (
    DECODERS,
    LINEARS,
    make_batch,
    make_model,
    mixed_targets,
    real_tokens,
    save_expert,
    save_experts,
    take_row,
)
from tests.tolerances import TOLERANCE, assert_near


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def with_peft(model, folder):
    return PeftModel.from_pretrained(copy.deepcopy(model), folder)


def assert_same(found, wanted, base, dtype=torch.float32):
    """The same logits, and the same difference to the base."""
    assert_near(found, wanted, TOLERANCE[dtype].output)
    assert_near(found - base, wanted - base, TOLERANCE[dtype].delta)


@pytest.mark.parametrize("family", LINEARS)
def test_one_expert_is_its_plain_adapter(family, model_and_pool):
    model, pool = model_and_pool(family)
    batch = make_batch(model, [4, 7, 1])
    base = logits(model, batch)
    plain = {expert.name: logits(with_peft(model, expert.folder), batch) for expert in pool}
    route(model, pool)
    for name, wanted in plain.items():
        with restrict(model, [name]):
            assert_same(logits(model, batch), wanted, base)
    unroute(model)
    for expert in pool:
        route(model, ExpertPool([expert]), top_k=1)
        assert_same(logits(model, batch), plain[expert.name], base)
        unroute(model)


@pytest.mark.parametrize(
    "config",
    [
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"v_proj": 11}},
        {"rank_pattern": {r"layers\.1\.mlp\.down_proj": 4}, "use_rslora": True},
        {"lora_dropout": 0.5},
    ],
    ids=str,
)
def test_one_expert_is_its_plain_adapter_however_scaled(config, model_and_pool):
    model, pool = model_and_pool("llama", 1, **config)
    batch = make_batch(model, [4, 7])
    base, wanted = logits(model, batch), logits(with_peft(model, pool["e0"].folder), batch)
    assert_same(logits(route(model, pool, top_k=1), batch), wanted, base)


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("how", ["bfloat16", "float16", "autocast"])
def test_one_expert_is_its_plain_adapter_in_low_precision(how, family, model_and_pool):
    """Near it: PEFT keeps the factors in fp32, a routed model has them in the base's dtype."""
    model, pool = model_and_pool(family, 2)
    autocast = how == "autocast"
    dtype = torch.bfloat16 if autocast else getattr(torch, how)
    model = model if autocast else model.to(dtype)
    batch = make_batch(model, [4, 7])
    with torch.autocast("cpu", dtype, enabled=autocast):
        wanted = logits(with_peft(model, pool["e0"].folder), batch)
        route(model, pool)
        with restrict(model, ["e0"]):
            assert_near(logits(model, batch), wanted, TOLERANCE[dtype].model)


@pytest.mark.parametrize("copies", [2, 5])
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_copies_of_one_expert_are_that_expert(family, copies, model_and_pool, tmp_path):
    model, pool = model_and_pool(family, 1)
    batch = make_batch(model, [4, 7])
    base, wanted = logits(model, batch), logits(with_peft(model, pool["e0"].folder), batch)
    twins = [shutil.copytree(pool["e0"].folder, tmp_path / f"twin{i}") for i in range(copies)]
    for top_k in (1, 2, copies):
        route(model, ExpertPool.load(twins), top_k=top_k)
        with record(model) as trace:
            assert_same(logits(model, batch), wanted, base)
        unroute(model)
        for weights in trace.weights.values():  # all tie, but for how a product is rounded
            assert_near(weights, torch.full(weights.shape, 1 / top_k), 1e-6)


@settings(max_examples=6, derandomize=True)
@given(order=st.permutations(range(5)), family=st.sampled_from(["llama", "gpt2", "t5"]))
def test_expert_order_is_irrelevant(order, family, tmp_path_factory):
    model = make_model(family)
    batch = make_batch(model, [4, 7])
    base = logits(model, batch)
    folders = save_experts(tmp_path_factory.mktemp("order"), model, mixed_targets(family, 5))
    runs = []
    for places in (range(5), order):
        pool = ExpertPool.load([folders[place] for place in places])
        route(model, pool)
        with record(model) as trace:
            runs.append((logits(model, batch), trace))
        unroute(model)
    (wanted, straight), (found, shuffled) = runs
    assert_same(found, wanted, base)
    for module in straight.experts:
        names = [
            [[trace.names[i] if i >= 0 else None for i in row] for row in trace.experts[module]]
            for trace in (straight, shuffled)
        ]
        assert names[0] == names[1]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", LINEARS)
def test_a_batch_is_its_sequences_alone(family, side, model_and_pool):
    model, pool = model_and_pool(family)
    batch = make_batch(model, [4, 7, 1], side=side)
    base = logits(model, batch)
    route(model, pool)
    with record(model) as together:
        found = logits(model, batch)
    for row in range(3):
        alone = take_row(batch, row)
        with record(model) as trace:
            wanted = logits(model, alone)
        real = real_tokens(batch, "decoder").view(3, -1)[row]
        assert_same(found[row, real], wanted[0], base[row, real])
        for module, experts in trace.experts.items():
            mine = together.tokens[together.streams[module]].sequence == row
            assert torch.equal(together.experts[module][mine], experts)
            bound = TOLERANCE[torch.float32].delta
            assert_near(together.weights[module][mine], trace.weights[module], bound)


@pytest.mark.parametrize("family", DECODERS)
def test_many_experts_add_as_their_weights_say(family, tmp_path):
    """One adapted layer, all experts kept at weight 1: the deltas of the plain adapters add up."""
    model = make_model(family, layers=1)
    leaf = LINEARS[family][-1]  # nothing comes after it but the norm, so look at its own output
    name = next(n for n, _ in model.named_modules() if n.endswith("." + leaf))
    folders = [
        save_expert(tmp_path / f"e{i}", model, seed=i, targets=[name], rank=1 + i) for i in range(3)
    ]
    batch = make_batch(model, [4, 7])

    def output(runs):
        seen = []
        hooked = runs.get_submodule(name).register_forward_hook(lambda *args: seen.append(args[-1]))
        logits(runs, batch)
        hooked.remove()
        return seen[0]

    base = output(model)
    plain = [output(with_peft(model, folder).get_base_model()) - base for folder in folders]
    route(model, ExpertPool.load(folders), top_k=3, scale="unit")
    assert_near(output(model) - base, sum(plain), TOLERANCE[torch.float32].delta)
