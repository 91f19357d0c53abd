"""A pool's experts, and the routed models that follow it."""

import gc
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from phatgoose import ExpertPool, load_expert, record, restrict, route, unroute
from phatgoose.errors import (
    ConfigError,
    ExpertNotFoundError,
    IncompatibleExpertError,
    MissingGateError,
    RoutingError,
)
from phatgoose.routers import Router
from tests.models import make_batch, make_model, save_expert, save_experts
from tests.tolerances import TOLERANCE, assert_near

Q = "model.layers.0.self_attn.q_proj"


class NeedsNothing(Router):
    """Scores every expert alike, from nothing."""

    def signature(self, expert, module):
        return torch.zeros(expert.modules[module].in_features)

    def score(self, x, signatures):
        return x.new_zeros(len(x), len(signatures), dtype=torch.float32)


@pytest.fixture
def experts(model_and_pool):
    return model_and_pool("llama", 4)[1].experts


def rename(expert, **base):
    """The expert with another name or identity of the base its gates were trained on."""
    record = expert.gates.record
    gates = replace(expert.gates, record=replace(record, base=replace(record.base, **base)))
    return replace(expert, gates=gates)


def spoil(expert, part, value=math.nan):
    """The expert with one bad number."""
    if part == "gate":
        vectors = {name: vector.clone() for name, vector in expert.gates.vectors.items()}
        vectors[Q][3] = value
        return replace(expert, gates=replace(expert.gates, vectors=vectors))
    lora = expert.modules[Q]
    matrix = getattr(lora, part).clone()
    matrix[0, 0] = value
    return replace(expert, modules={**expert.modules, Q: replace(lora, **{part: matrix})})


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def test_order_names_and_access(experts):
    pool = ExpertPool(experts)
    assert pool.names == ["e0", "e1", "e2", "e3"]
    assert len(pool) == 4
    assert list(pool) == pool.experts == experts
    assert pool["e2"] is experts[2]
    assert pool.index("e3") == 3
    pool.remove("e1")
    assert pool.names == ["e0", "e2", "e3"]
    assert pool.add(experts[1]) is experts[1]
    assert pool.names == ["e0", "e2", "e3", "e1"]
    pool.experts.clear()  # a copy
    assert len(pool) == 4


def test_load_and_add_from_folders(experts):
    folders = [expert.folder for expert in experts]
    pool = ExpertPool.load([folders[0], str(folders[1])])
    assert pool.names == ["e0", "e1"]
    assert pool.add(folders[2]).name == "e2"
    assert pool.add(str(folders[3])) is pool["e3"]


@pytest.mark.parametrize("kind", [str, Path])
def test_load_of_a_folder_of_experts(kind, experts, tmp_path):
    for expert in experts[:2]:
        shutil.copytree(expert.folder, tmp_path / "pool" / expert.name)
    shutil.copytree(experts[2].folder, tmp_path / "pool" / ".half-written")
    (tmp_path / "pool" / "notes").mkdir()
    assert ExpertPool.load(kind(tmp_path / "pool")).names == ["e0", "e1"]
    assert ExpertPool.load([experts[3].folder, kind(tmp_path / "pool")]).names == ["e3", "e0", "e1"]
    assert ExpertPool.load(kind(experts[0].folder)).names == ["e0"]


@pytest.mark.parametrize("name", ["x" * 5000, "nul\0", "a b"])
def test_load_of_what_can_be_no_folder(name):
    with pytest.raises(ExpertNotFoundError, match="not a folder"):
        ExpertPool.load(name)


def test_load_of_nothing_there(tmp_path):
    with pytest.raises(ExpertNotFoundError, match="nothing-here"):
        ExpertPool.load([tmp_path / "nothing-here"])


@pytest.mark.parametrize("call", [ExpertPool.index, ExpertPool.remove, ExpertPool.__getitem__])
def test_an_unknown_name_lists_the_known_ones(call, experts):
    with pytest.raises(ConfigError, match=r"^who: .*e0, e1, e2, e3"):
        call(ExpertPool(experts), "who")


def test_values_beyond_the_dtype_of_the_base_are_refused(experts):
    model = make_model("llama")
    lora = experts[0].modules[Q]
    large = replace(lora, scale=1e6 * lora.scale)
    expert = replace(experts[0], modules={**experts[0].modules, Q: large})
    route(model, ExpertPool([expert]))
    unroute(model)
    with pytest.raises(IncompatibleExpertError, match=rf"e0: its LoRA of {Q} .* float16 holds"):
        route(model.half(), ExpertPool([expert]))


def test_a_name_twice(experts):
    with pytest.raises(ConfigError, match=r"^e1: two experts of this name"):
        ExpertPool([*experts, experts[1]])
    twin = load_expert(experts[1].folder, name="twin")
    assert ExpertPool([*experts, twin]).names[-1] == "twin"


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("part", "said"),
    [("a", f"lora_A of {Q} holds"), ("b", f"lora_B of {Q} holds"), ("gate", f"gates at {Q} hold")],
)
def test_numbers_that_are_none(part, said, value, experts):
    with pytest.raises(IncompatibleExpertError, match=rf"^e1: .*{said} NaN"):
        ExpertPool([experts[0], spoil(experts[1], part, value)])


def test_experts_of_different_bases(experts):
    one, two = experts[:2]
    for wrong, said in [
        (rename(two, shape="other"), "type or in the sizes"),
        (rename(two, tokenizer="b"), "tokenizers differ"),
    ]:
        pool = ExpertPool([rename(one, name="org/a", tokenizer="a")])
        with pytest.raises(IncompatibleExpertError, match=rf"^e1: .*another base than e0.*{said}"):
            pool.add(wrong)
        assert pool.names == ["e0"]
    for name in ("org/b", "local-copy"):  # which tell nothing; see `experts.bases`
        ExpertPool([rename(one, name="org/a"), rename(two, name=name)])


def test_adding_to_a_live_model_is_routing_with_the_bigger_pool(experts):
    model, batch = make_model("llama"), make_batch(make_model("llama"), [4, 7])
    grown = ExpertPool(experts[1:3])  # which adapt few layers
    route(model, grown)
    small = logits(model, batch)
    for expert in (experts[0], experts[3]):
        grown.add(expert)
    found = logits(model, batch)
    fresh = route(make_model("llama"), ExpertPool(grown.experts))
    assert not torch.equal(found, small)
    assert_near(found, logits(fresh, batch), TOLERANCE[torch.float32].output)
    with record(model) as one, record(fresh) as other:
        logits(model, batch)
        logits(fresh, batch)
    assert one.names == other.names == ["e1", "e2", "e0", "e3"]
    for module in other.experts:
        assert torch.equal(one.experts[module], other.experts[module])


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("rank", [1, 7, 40])
def test_add_then_remove_changes_nothing(family, rank, model_and_pool, tmp_path):
    model, pool = model_and_pool(family, 3)
    targets = [*pool["e0"].modules]
    extra = save_expert(tmp_path / "extra", model, seed=50, targets=targets, rank=rank)
    few, many = make_batch(model, [4]), make_batch(model, [9, 30, 22])
    route(model, pool)
    before = [logits(model, batch) for batch in (few, many)]
    layers = [name for name, _ in model.named_modules()]
    pool.add(extra)
    assert not torch.equal(logits(model, many), before[1])
    pool.remove("extra")
    assert layers == [name for name, _ in model.named_modules()]
    assert all(
        torch.equal(logits(model, batch), wanted)
        for batch, wanted in zip((few, many), before, strict=True)
    )


def test_removing_is_routing_with_the_smaller_pool(experts):
    model, batch = make_model("llama"), make_batch(make_model("llama"), [4, 7])
    pool = ExpertPool(experts)
    route(model, pool)
    for name in ("e1", "e0"):  # e0 alone adapts down_proj
        pool.remove(name)
    fresh = route(make_model("llama"), ExpertPool(experts[2:]))
    assert torch.equal(logits(model, batch), logits(fresh, batch))
    assert [*model.state_dict()] == [*fresh.state_dict()]
    assert {name for name, _ in model.named_modules()} == {
        name for name, _ in fresh.named_modules()
    }


def test_a_routed_model_keeps_an_expert(experts):
    model, pool = make_model("llama"), ExpertPool(experts[:3])
    route(model, pool, top_k=2)
    before = logits(model, batch := make_batch(model, [4]))
    pool.remove("e2")
    pool.remove("e1")  # one expert, and top_k is 2
    alone = route(make_model("llama"), ExpertPool(experts[:1]), top_k=1)
    assert torch.equal(logits(model, batch), logits(alone, batch))
    with pytest.raises(RoutingError, match="^e0: it is the last expert.*unroute"):
        pool.remove("e0")
    assert pool.names == ["e0"]
    pool.add(experts[1])
    pool.add(experts[2])
    assert torch.equal(logits(model, batch), before)
    unroute(model)
    for name in pool.names:
        pool.remove(name)
    assert not len(pool)


def test_two_models_follow_one_pool(experts):
    pool = ExpertPool(experts[:2])
    models = [route(make_model("llama"), pool), route(make_model("llama"), pool, top_k=1)]
    batch = make_batch(models[0], [4, 7])
    before = [logits(model, batch) for model in models]
    pool.add(experts[2])
    for model, top_k, old in zip(models, (2, 1), before, strict=True):
        fresh = route(make_model("llama"), ExpertPool(experts[:3]), top_k=top_k)
        assert torch.equal(logits(model, batch), logits(fresh, batch))
        assert not torch.equal(logits(model, batch), old)
    pool.remove("e2")
    assert all(
        torch.equal(logits(model, batch), old) for model, old in zip(models, before, strict=True)
    )
    unroute(models[0])
    pool.add(experts[2])
    assert_near(
        logits(models[0], batch),
        logits(make_model("llama"), batch),
        TOLERANCE[torch.float32].output,
    )


def test_a_model_that_is_gone_is_not_followed(experts):
    pool = ExpertPool(experts[:2])
    model = route(make_model("llama"), pool)
    del model
    gc.collect()
    for name in ("e0", "e1"):  # none may stay, for no model needs one
        pool.remove(name)
    assert not len(pool)


@pytest.fixture
def other_folder(tmp_path):
    """An expert for a wider base of the same names."""
    wide = make_model("llama", hidden=36)
    return save_expert(tmp_path / "wide", wide, seed=0, targets=["q_proj"])


def wrong_expert(kind, experts, folder):
    if kind == "wide":
        return load_expert(folder)
    if kind == "wide, without gates":
        return replace(load_expert(folder), gates=None)
    return {
        "taken name": experts[0],
        "no gates": replace(experts[3], gates=None),
        "NaN in A": spoil(experts[3], "a"),
        "NaN in a gate": spoil(experts[3], "gate"),
        "unknown layer": replace(
            experts[3], modules={**experts[3].modules, "nowhere": experts[3].modules[Q]}
        ),
        "other base": rename(experts[3], shape="other"),
        "other words": rename(experts[3], tokenizer="b"),
    }[kind]


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("taken name", ConfigError),
        ("no gates", MissingGateError),
        ("NaN in A", IncompatibleExpertError),
        ("NaN in a gate", IncompatibleExpertError),
        ("unknown layer", IncompatibleExpertError),
        ("other base", IncompatibleExpertError),
        ("other words", IncompatibleExpertError),
        ("wide", IncompatibleExpertError),
        ("wide, without gates", IncompatibleExpertError),
    ],
)
def test_a_failed_add_changes_nothing(kind, error, experts, other_folder):
    pool = ExpertPool([rename(e, name="org/a", tokenizer="a") for e in experts[:3]])
    models = [route(make_model("llama"), pool), route(make_model("llama"), pool, top_k=1)]
    batch = make_batch(models[0], [4, 7])
    before = [logits(model, batch) for model in models]
    with pytest.raises(error):
        pool.add(wrong_expert(kind, experts, other_folder))
    assert pool.names == ["e0", "e1", "e2"]
    for model, old in zip(models, before, strict=True):
        assert torch.equal(logits(model, batch), old)
    pool.add(rename(experts[3], name="org/a"))  # and a good one still fits
    fresh = route(make_model("llama"), ExpertPool(pool.experts))
    assert torch.equal(logits(models[0], batch), logits(fresh, batch))


def test_an_add_one_model_refuses_reaches_none(experts, tmp_path):
    """Several of them, as it is open who is asked first."""
    shallow, *others = (make_model("llama", layers=n) for n in (1, 2, 2, 2, 2, 2))
    deep = others[0]
    folders = save_experts(tmp_path, shallow, [["q_proj"]] * 2, gates=False)
    taller = save_expert(tmp_path / "taller", deep, seed=5, rank=9, targets=["q_proj"], gates=False)
    pool = ExpertPool.load(folders)
    models = [route(model, pool, NeedsNothing()) for model in (*others, shallow)]
    batch = make_batch(deep, [4, 7])
    before = [logits(model, batch) for model in models]
    layers = [[name for name, _ in model.named_modules()] for model in models]
    with pytest.raises(IncompatibleExpertError, match=r"taller: adapts model.layers.1"):
        pool.add(taller)
    assert pool.names == ["e0", "e1"]
    for model, old in zip(models, before, strict=True):
        assert torch.equal(logits(model, batch), old)
    assert layers == [[name for name, _ in model.named_modules()] for model in models]


def test_the_pool_holds_still_while_recorded(experts):
    pool = ExpertPool(experts[:3])
    model = route(make_model("llama"), pool)
    batch = make_batch(model, [4])
    before = logits(model, batch)
    with record(model):
        for change in (lambda: pool.add(experts[3]), lambda: pool.remove("e0")):
            with pytest.raises(RoutingError, match="inside a record block"):
                change()
    assert pool.names == ["e0", "e1", "e2"]
    assert torch.equal(logits(model, batch), before)
    pool.add(experts[3])


def test_a_restriction_stays_with_its_experts(experts):
    pool = ExpertPool(experts)
    model = route(make_model("llama"), pool)
    batch = make_batch(model, [4])
    with restrict(model, ["e2"]):
        before = logits(model, batch)
        pool.remove("e1")  # e2 moves down a place
        assert torch.equal(logits(model, batch), before)
