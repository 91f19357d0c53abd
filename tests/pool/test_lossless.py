"""What is said to change no answer changes none, also where a token knows the whole prompt."""

import copy
import functools

import pytest
import torch
from transformers import DynamicCache

from phatgoose import ExpertPool, route, unroute
from phatgoose.errors import ConfigError, RoutingError
from phatgoose.routers import PhatgooseRouter
from phatgoose.routers.evidence import ContextEvidence
from tests.models import VOCABULARY, make_batch, make_model
from tests.pool.test_compile import Compiled, folders, fresh_compiler  # noqa: F401
from tests.tolerances import TOLERANCE, assert_near

NEAR = TOLERANCE[torch.float32].model
ROUTERS = ("ahead", "phatgoose+ahead", "causal")


class RandomEvidence(ContextEvidence):
    """Evidence by which any token may turn the balance."""

    usual_strength = 4.0

    def __init__(self, inner, ahead):
        super().__init__(inner, background=torch.arange(VOCABULARY).unsqueeze(0))
        self.ahead, self.name = ahead, "random evidence"

    def require(self, expert):
        pass

    def weigh(self, experts, inputs, background):
        seeds = [int(expert.name[1:]) for expert in experts]
        random = [torch.Generator().manual_seed(seed) for seed in seeds]
        return torch.stack([torch.randn(len(inputs), generator=each) for each in random])


@pytest.fixture
def routed(model_and_pool):
    """routed(router): a model that asks that kind of evidence."""

    def make(router):
        model, pool = model_and_pool()
        inner = PhatgooseRouter() if "+" in router else None
        evidence = RandomEvidence(inner, "ahead" in router)
        return route(model, pool, evidence, top_k="all", scale="softmax")  # each token counts

    return make


def prompts(lengths, seed=0):
    batch = make_batch(make_model("llama", layers=1), lengths, seed=seed)
    return {key: batch[key] for key in ("input_ids", "attention_mask")}


def repetitive(length, seed=0):
    """A prompt in which looking up guesses something."""
    ids = torch.randint(3, 9, (1, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


WAYS = {
    "lookup": {"prompt_lookup_num_tokens": 3},
    "chunks": {"prefill_chunk_size": 3},
    "one by one": {"prefill_chunk_size": 1},
    "no cache": {"use_cache": False},
    "static": {"cache_implementation": "static"},
}


@pytest.mark.parametrize("way", [*WAYS, "draft"])
@pytest.mark.parametrize("router", ROUTERS)
def test_greedy_answers_stay(router, way, routed):
    model = routed(router)
    settings = {"max_new_tokens": 8, "do_sample": False}
    how = WAYS[way] if way in WAYS else {"assistant_model": make_model("llama", seed=5, layers=1)}
    for seed in range(3):
        prompt = repetitive(10, seed)
        wanted = model.generate(**prompt, **settings)
        found = model.generate(**prompt, **settings, **how)
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("way", ["chunks", "no cache", "static"])
def test_a_padded_batch_too(way, masked, routed):
    model = routed(ROUTERS[0])
    batch = prompts([4, 9, 7])
    if not masked:  # generate makes the mask itself
        del batch["attention_mask"]
    settings = {"max_new_tokens": 6, "do_sample": False, "num_beams": 2}
    wanted = model.generate(**batch, **settings)
    assert torch.equal(model.generate(**batch, **settings, **WAYS[way]), wanted)


def test_the_whole_prompt_matters(routed):
    """Or none of these tests shows anything."""
    model = routed(ROUTERS[0])
    ids = repetitive(10)["input_ids"]
    with torch.no_grad():
        whole = model(ids).logits[:, :5]
        part = model(ids[:, :5]).logits
    assert (whole - part).abs().max() > 0.01


def test_a_prompt_is_what_comes_first(routed):
    """A loop by hand that checks guesses, several at once, and takes them back."""
    model = routed(ROUTERS[0])
    ids = torch.cat([repetitive(6)["input_ids"], repetitive(5, 1)["input_ids"]], 1)
    with torch.no_grad():
        cache, wanted = DynamicCache(config=model.config), []
        for start, end in [(0, 6), *((i, i + 1) for i in range(6, 11))]:
            wanted.append(model(ids[:, start:end], past_key_values=cache).logits)
        cache, found = DynamicCache(config=model.config), []
        found.append(model(ids[:, :6], past_key_values=cache).logits)
        model(torch.tensor([[3, 4, 5]]), past_key_values=cache)
        cache.crop(-3)
        found.append(model(ids[:, 6:], past_key_values=cache).logits)
    assert_near(torch.cat(found, 1), torch.cat(wanted, 1), NEAR)


@pytest.mark.parametrize("router", ROUTERS)
def test_a_prefix_copied_for_several_ends(router, routed):
    model = routed(router)
    ids = repetitive(8)["input_ids"]
    with torch.no_grad():
        prefix = DynamicCache(config=model.config)
        model(ids[:, :5], past_key_values=prefix)
        for seed in range(2):
            end = repetitive(3, seed)["input_ids"]
            cache = copy.deepcopy(prefix)
            found = model(end, past_key_values=cache).logits
            again = model(end, past_key_values=copy.deepcopy(prefix)).logits
            assert torch.equal(found, again)
            if "ahead" not in router:  # there the prefix is a prompt of its own
                assert_near(found, model(torch.cat([ids[:, :5], end], 1)).logits[:, 5:], NEAR)


def test_a_second_turn_on_the_cache_of_the_first(routed):
    model = routed("causal")
    settings = {"max_new_tokens": 5, "do_sample": False}
    first = model.generate(**repetitive(6), **settings, return_dict_in_generate=True)
    ids = torch.cat([first.sequences, repetitive(4, 2)["input_ids"]], 1)
    wanted = model.generate(ids, **settings)
    assert torch.equal(
        model.generate(ids, past_key_values=first.past_key_values, **settings), wanted
    )


def test_moved_rows_are_refused(routed):
    model = routed(ROUTERS[0])
    batch = prompts([5, 5])
    with torch.no_grad():
        cache = model(**batch, use_cache=True).past_key_values
        cache.reorder_cache(torch.tensor([1, 0]))
        with pytest.raises(ConfigError, match="the KV cache was changed since"):
            model(batch["input_ids"][:, :1], past_key_values=cache)


# ---------------------------------------------------------------- compiled before it is routed


def test_routing_what_was_compiled_already(folders, fresh_compiler):  # noqa: F811
    both = Compiled(folders)
    wanted = both.compare()
    unroute(both.model)
    compiled = torch.compile(both.model, backend="eager")
    batch = make_batch(both.model, (4, 7))
    assert route(compiled, both.pool) is compiled
    with torch.no_grad():
        assert_near(compiled(**batch).logits, wanted, NEAR)
        assert unroute(compiled) is compiled
        assert not torch.allclose(compiled(**batch).logits, wanted)


def test_a_refused_route_leaves_nothing(model_and_pool):
    model, pool = model_and_pool()
    layer = model.model.layers[1]
    model.model.layers[1] = torch.compile(layer, backend="eager")
    with pytest.raises(RoutingError, match="model.layers.1 is compiled"):
        route(model, pool)
    model.model.layers[1] = layer
    plain = {name: dict(module.__dict__) for name, module in model.named_modules()}
    other = ExpertPool([pool.experts[0]])
    for fails in (
        functools.partial(route, model, other, "evidence"),
        functools.partial(route, make_model("llama", hidden=36), pool),
    ):
        with pytest.raises(Exception):  # noqa: B017
            fails()
    for name, module in model.named_modules():
        assert module.__dict__.keys() == plain[name].keys(), name
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
