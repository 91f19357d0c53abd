"""Routing a model, limiting it, recording it, and undoing all of it."""

from dataclasses import replace

import pytest
import torch
from peft import IA3Config, LoraConfig, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn

from phatgoose import ExpertPool, load_expert, record, restrict, route, unroute
from phatgoose.errors import ConfigError, IncompatibleExpertError, MissingGateError, RoutingError
from phatgoose.experts.bases import BaseWarning
from phatgoose.nn.settings import _say_fewer
from tests.models import (
    LINEARS,
    make_batch,
    make_model,
    mixed_targets,
    save_expert,
    save_experts,
)
from tests.tolerances import TOLERANCE, assert_near

Q = "model.layers.0.self_attn.q_proj"


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def anatomy(model):
    """All that could be left behind on a model: modules, buffers, attributes, hooks."""
    return {
        name: (
            {key: id(value) for key, value in vars(module).items()},
            [*module._modules],
            [*module._buffers],
            [len(value) for key, value in sorted(vars(module).items()) if key.endswith("_hooks")],
            [len(v) for k, v in sorted(vars(module).items()) if "_hooks_" in k],
        )
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("family", LINEARS)
def test_unroute_leaves_nothing_behind(family, model_and_pool):
    model, pool = model_and_pool(family)
    batch = make_batch(model, [4, 7, 1])
    before, parts, state = logits(model, batch), anatomy(model), model.state_dict()
    assert route(model, pool) is model
    assert not torch.equal(logits(model, batch), before)
    pool.remove("e1")
    assert unroute(model) is model
    assert torch.equal(logits(model, batch), before)
    assert anatomy(model) == parts
    after = model.state_dict()
    assert [*after] == [*state]
    assert all(torch.equal(after[key], state[key]) for key in state)
    pool.add(pool["e0"].folder.parent / "e1")  # the pool goes on without the model
    assert torch.equal(logits(model, batch), before)
    route(model, pool)
    unroute(model)
    assert anatomy(model) == parts


@pytest.mark.parametrize("family", LINEARS)
def test_state_dict_and_parameters_are_the_plain_model_s(family, model_and_pool):
    model, pool = model_and_pool(family)
    state, parameters = model.state_dict(), dict(model.named_parameters())
    route(model, pool)
    assert [*model.state_dict()] == [*state]
    assert model.load_state_dict(state).missing_keys == []
    assert all(parameters[name] is value for name, value in model.named_parameters())
    assert len(parameters) == len([*model.named_parameters()])


def test_save_pretrained_saves_the_plain_model(model_and_pool, tmp_path):
    model, pool = model_and_pool()
    model.save_pretrained(tmp_path / "plain")
    route(model, pool)
    model.save_pretrained(tmp_path / "routed")
    for path in (tmp_path / "plain").iterdir():
        assert path.read_bytes() == (tmp_path / "routed" / path.name).read_bytes(), path.name
    assert "lm_head.weight" in load_file(tmp_path / "routed" / "model.safetensors")


def test_an_exception_leaves_the_model_routed_and_clean(model_and_pool):
    model, pool = model_and_pool()
    batch = make_batch(model, [4, 7])
    plain = logits(model, batch)
    route(model, pool)
    before = logits(model, batch)
    for block in (lambda: record(model), lambda: restrict(model, ["e1"])):
        with pytest.raises(ZeroDivisionError), block():
            logits(model, batch)
            raise ZeroDivisionError
        with pytest.raises(IndexError), block():
            model(torch.tensor([[10**6]]))
        assert torch.equal(logits(model, batch), before)
    with record(model) as trace:
        logits(model, batch)
    assert len(trace.tokens["decoder"].ids) == 11
    assert torch.equal(logits(unroute(model), batch), plain)


def test_a_failed_route_leaves_nothing_behind(model_and_pool):
    model, pool = model_and_pool()
    parts = anatomy(model)
    last = replace(pool["e3"], gates=None)
    with pytest.raises(MissingGateError, match="^e3: has no gates"):
        route(model, ExpertPool([*pool.experts[:3], last]))
    assert anatomy(model) == parts
    route(model, pool)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("settings", [{}, {"scale": "unit"}, {"null_score": 0.1}])
def test_a_pool_smaller_than_top_k_is_used_whole(count, settings, model_and_pool, caplog):
    model, pool = model_and_pool(count=count)
    batch = make_batch(model, [4, 7])
    whole = count + ("null_score" in settings)
    wanted = logits(route(model, pool, top_k=whole, **settings), batch)
    unroute(model)
    caplog.clear()
    _say_fewer.cache_clear()
    for _ in range(2):
        assert torch.equal(logits(route(model, pool, top_k=count + 40, **settings), batch), wanted)
        with record(model) as trace:
            logits(model, batch)
        assert trace.top_k == trace.experts[Q].shape[1] == whole
        unroute(model)
    said = f"top_k is {count + 40} and the pool has {count} expert(s): each token uses all."
    assert [r.message for r in caplog.records] == [said]  # once a process


def test_an_empty_pool(model_and_pool):
    model, _ = model_and_pool()
    with pytest.raises(RoutingError, match="pool is empty"):
        route(model, ExpertPool())


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"top_k": 0}, ConfigError, "top_k must be at least 1, got 0"),
        ({"temperature": 0.0}, ConfigError, "temperature must be above 0"),
        pytest.param(
            {"scale": "sum"}, ConfigError, "scale must be one of", marks=pytest.mark.wrong_types
        ),
        ({"null_score": float("nan")}, ConfigError, "null_score must be finite"),
        ({"router": "nonsense"}, ConfigError, "no router is called 'nonsense'.*phatgoose"),
    ],
)
def test_wrong_settings(settings, error, said, model_and_pool):
    model, pool = model_and_pool()
    parts = anatomy(model)
    with pytest.raises(error, match=said):
        route(model, pool, **settings)
    assert anatomy(model) == parts


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=2, target_modules=["q_proj"]),
        IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_a_peft_model_is_refused(config, model_and_pool):
    model, pool = model_and_pool()
    adapted = get_peft_model(model, config)
    with pytest.raises(RoutingError, match="PEFT adapters.*plain base"):
        route(adapted, pool)
    if config.peft_type == "LORA":
        with pytest.raises(RoutingError, match="PEFT adapters.*plain base"):
            route(adapted.get_base_model(), pool)
        route(adapted.unload(), pool)


def test_routing_twice_and_unrouting_twice(model_and_pool):
    model, pool = model_and_pool()
    with pytest.raises(RoutingError, match="does not route"):
        unroute(model)
    route(model, pool)
    with pytest.raises(RoutingError, match="routes already.*unroute"):
        route(model, pool)
    unroute(model)
    for use in (unroute, lambda m: record(m).__enter__(), lambda m: restrict(m, []).__enter__()):
        with pytest.raises(RoutingError, match=r"does not route.*phatgoose\.route"):
            use(model)


def test_an_expert_of_another_base(model_and_pool, tmp_path):
    model, pool = model_and_pool()
    wide = make_model("llama", hidden=36)
    expert = load_expert(save_expert(tmp_path / "wide", wide, seed=0, targets=["q_proj"]))
    with pytest.raises(IncompatibleExpertError, match="^wide: .*another base.*sizes"):
        route(model, ExpertPool([expert]), top_k=1)
    bare = ExpertPool([replace(expert, gates=None)])  # no identity: the sizes tell
    with pytest.raises(IncompatibleExpertError, match=rf"^wide: its LoRA of {Q} maps 36 to 24"):
        route(model, bare, top_k=1)
    with pytest.raises(IncompatibleExpertError, match="^e0: .*type or in the sizes"):
        route(make_model("qwen3"), pool)
    identity = replace(pool["e0"].gates.record.base, name="org/one")
    gates = replace(pool["e0"].gates, record=replace(pool["e0"].gates.record, base=identity))
    named = ExpertPool([replace(pool["e0"], gates=gates)])
    model.config._name_or_path = "org/two"
    with pytest.warns(BaseWarning, match="made on the base org/one, and this model is org/two"):
        route(model, named, top_k=1)
    unroute(model)
    model.config._name_or_path = "org/one"
    route(model, named, top_k=1)


def test_experts_of_another_revision_are_routed_and_told(model_and_pool, tmp_path, caplog):
    model, _ = model_and_pool(count=1)
    model.config._name_or_path, model.config._commit_hash = "owner/base", "c0ffee"
    folders = save_experts(tmp_path, model, mixed_targets("llama", 2))
    model.config._commit_hash = "Q4_1"
    route(model, ExpertPool.load(folders))
    told = [r.getMessage() for r in caplog.records if "other weights" in r.getMessage()]
    assert len(told) == 1
    assert told[0].startswith("phatgoose: 2 experts (e0, ...): made on owner/base at c0ffee")


def test_a_model_that_is_no_transformers_model(model_and_pool):
    _, pool = model_and_pool()
    with pytest.raises(IncompatibleExpertError):
        route(nn.Linear(3, 3), pool)


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_restricted_to_nobody_is_the_base(family, model_and_pool):
    model, pool = model_and_pool(family)
    batch = make_batch(model, [4, 7])
    before = logits(model, batch)
    route(model, pool)
    with restrict(model, []):
        assert torch.equal(logits(model, batch), before)
    assert not torch.equal(logits(model, batch), before)


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_restricted_to_some_is_a_pool_of_those(family, model_and_pool):
    model, pool = model_and_pool(family)
    batch = make_batch(model, [4, 7])
    fresh = route(make_model(family), ExpertPool([pool["e0"], pool["e2"]]))
    route(model, pool)
    with restrict(model, ("e2", "e0")), record(model) as trace:
        found = logits(model, batch)
    assert_near(found, logits(fresh, batch), TOLERANCE[torch.float32].output)
    used = torch.cat([experts.flatten() for experts in trace.experts.values()]).unique()
    assert trace.names == pool.names
    assert set(used.tolist()) == {-1, 0, 2}


def test_restricted_to_all_changes_nothing(model_and_pool):
    model, pool = model_and_pool()
    batch = make_batch(model, [4, 7])
    before = logits(route(model, pool), batch)
    with restrict(model, pool.names):
        assert torch.equal(logits(model, batch), before)


def test_restrictions_nest_and_end(model_and_pool):
    model, pool = model_and_pool()
    batch = make_batch(model, [4, 7])
    route(model, pool)
    before = logits(model, batch)
    with restrict(model, ["e0"]):
        one = logits(model, batch)
        with restrict(model, ["e1"]):
            assert not torch.equal(logits(model, batch), one)
        assert torch.equal(logits(model, batch), one)
    assert torch.equal(logits(model, batch), before)
    assert not torch.equal(one, before)


def test_restricted_to_a_stranger(model_and_pool):
    model, pool = model_and_pool()
    before = logits(route(model, pool), batch := make_batch(model, [4]))
    with (
        pytest.raises(ConfigError, match="^who: no expert.*e0, e1, e2, e3"),
        restrict(model, ["who"]),
    ):
        pass
    assert torch.equal(logits(model, batch), before)


def test_restricted_to_a_name_in_place_of_a_list(model_and_pool):
    model, pool = model_and_pool()
    route(model, pool)
    with pytest.raises(ConfigError, match="wants a list of names, got 'e0'"), restrict(model, "e0"):
        pass


def test_one_recording_at_a_time(model_and_pool):
    model, pool = model_and_pool()
    route(model, pool)
    with record(model) as trace:
        with pytest.raises(RoutingError, match="being recorded already"), record(model):
            pass
        model(**make_batch(model, [3]))  # the first one goes on
    assert len(trace.tokens["decoder"].ids) == 3


def test_only_forwards_inside_the_block_are_recorded(model_and_pool):
    model, pool = model_and_pool()
    route(model, pool)
    model(**make_batch(model, [5]))
    with record(model) as trace:
        model(**make_batch(model, [3]))
    model(**make_batch(model, [5]))
    assert len(trace.tokens["decoder"].ids) == 3
    assert {len(experts) for experts in trace.experts.values()} == {3}


def test_unit_scale_and_null_score_reach_the_layers(model_and_pool):
    model, pool = model_and_pool("llama", 1)
    batch = make_batch(model, [4, 7])
    plain = logits(model, batch)
    published = logits(route(model, pool, top_k=1), batch)
    unroute(model)
    assert torch.equal(logits(route(model, pool, top_k=1, scale="unit"), batch), published)
    unroute(model)
    assert torch.equal(logits(route(model, pool, top_k=1, null_score=1e3), batch), plain)
    unroute(model)
    low = logits(route(model, pool, top_k=1, null_score=-1e3), batch)
    assert torch.equal(low, published)
