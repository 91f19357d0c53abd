"""What each row of a batch asks for itself: an expert, a mixture, or knobs of routing."""

import copy
import functools
import json
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel

from phatgoose import Choice, ExpertPool, assign, record, restrict, route, unroute
from phatgoose.errors import ConfigError, RoutingError
from tests.models import make_batch, make_model, save_expert, take_row
from tests.tolerances import TOLERANCE, assert_near


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5-gated"])
def test_each_row_is_its_expert_alone(family, model_and_pool):
    model, pool = model_and_pool(family, 4)
    names = ["e2", None, "e0", "e2"]
    batch = make_batch(model, [5, 7, 3, 4])
    plain = model(**batch).logits
    route(model, pool, "uniform")
    with assign(model, names):
        found = model(**batch).logits
    for row, name in enumerate(names):
        alone = take_row(batch, row)
        with restrict(model, [name] if name else []):
            wanted = model(**alone).logits[0]
        real = batch.get("decoder_attention_mask", batch["attention_mask"])[row].bool()
        assert_near(found[row, real], wanted, 1e-5)
        if name is None:
            assert_near(found[row, real], plain[row, real], 1e-6)
    unroute(model)


def test_generating_with_beams_and_a_cache(model_and_pool):
    model, pool = model_and_pool("llama", 4)
    batch = make_batch(model, [5, 7])
    batch.pop("position_ids")
    settings = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False}
    route(model, pool)
    with assign(model, ["e1", "e3"]):
        both = model.generate(**batch, **settings)
    for row, name in enumerate(["e1", "e3"]):
        alone = {key: value[row : row + 1] for key, value in batch.items()}
        with restrict(model, [name]):
            assert torch.equal(model.generate(**alone, **settings)[0], both[row])


def test_gradients_flow(model_and_pool):
    model, pool = model_and_pool("llama", 4)
    route(model, pool)
    embeddings = torch.randn(2, 3, 24, requires_grad=True)
    with assign(model, ["e0", "e1"]):
        model(inputs_embeds=embeddings).logits.sum().backward()
    assert embeddings.grad.abs().sum() > 0


def test_a_trace_shows_it(model_and_pool):
    model, pool = model_and_pool("llama", 4)
    route(model, pool)
    with record(model) as trace, assign(model, ["e1", None]):
        model(**make_batch(model, [3, 2]))
    module = "model.layers.0.self_attn.q_proj"
    assert trace.experts[module][:, 0].tolist() == [1, 1, 1, -1, -1]


def test_what_cannot_be(model_and_pool):
    model, pool = model_and_pool("llama", 4)
    route(model, pool)
    for names in ("e1", []):
        with pytest.raises(ConfigError, match="a name for every row"), assign(model, names):
            pass
    with pytest.raises(ConfigError, match="zebra"), assign(model, ["zebra"]):
        pass
    with (
        restrict(model, ["e0"]),
        pytest.raises(ConfigError, match="e1 is not among"),
        assign(model, ["e1"]),
    ):
        pass
    with assign(model, ["e0", "e1"]):
        with pytest.raises(RoutingError, match="2 experts for 3 sequences"):
            model(**make_batch(model, [3, 3, 3]))
        with pytest.raises(RoutingError, match="inside a assign block"):
            pool.remove("e3")


def with_peft(model, pool, weights):
    """The adapters of these names active at once in PEFT, each at its own scale."""
    made = copy.deepcopy(model)
    names = list(weights)
    made = PeftModel.from_pretrained(made, pool[names[0]].folder, names[0])
    for name in names[1:]:
        made.load_adapter(pool[name].folder, name)
    made.base_model.set_adapter(names)
    for module in made.modules():
        for name in set(weights) & set(getattr(module, "lora_A", ())):
            module.scaling[name] *= weights[name]
    return made.eval()


MIXTURES = [
    {"e1": 1.0},
    {"e0": 0.7, "e2": 0.3},
    {"e3": 0.25},
    {"e0": 0.2, "e1": 1.7, "e2": 0.4, "e3": 0.9},  # more than top_k
    {"e1": 0.0},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5-gated"])
def test_a_mixture_is_pefts_sum(family, dtype, model_and_pool):
    model, pool = model_and_pool(family, 4)
    model.to(dtype)
    batch = make_batch(model, [5, 7, 3, 4, 6])
    base = model(**batch).logits
    wanted = [with_peft(model, pool, weights)(**batch).logits for weights in MIXTURES]
    route(model, pool)
    with assign(model, MIXTURES):
        found = model(**batch).logits
    for row, logits in enumerate(wanted):
        assert_near(found[row], logits[row], TOLERANCE[dtype].output)
        delta = logits[row] - base[row]
        size = delta if MIXTURES[row] != {"e1": 0.0} else base[row]
        assert_near(found[row] - base[row], delta, TOLERANCE[dtype].delta, size)


def test_a_row_does_not_see_the_others(model_and_pool):
    """Routed rows, restricted ones, mixtures and knobs in one batch: each as it is alone."""
    model, pool = model_and_pool("llama", 4)
    rows = [
        Choice(),
        {"e0": 0.7, "e1": 0.2, "e3": 1.1},
        "e2",
        None,
        Choice(top_k=1),
        Choice(top_k="all", temperature=3.0),
        Choice(allow=["e1", "e2"], scale=0.5),
        Choice(deny=["e0"], temperature=0.3),
        Choice(scale=0),
    ]
    batch = make_batch(model, [5, 7, 3, 4, 6, 2, 8, 1, 5])
    base = model(**batch).logits
    route(model, pool)
    with assign(model, rows):
        together = model(**batch).logits
    for number, row in enumerate(rows):
        alone, real = take_row(batch, number), batch["attention_mask"][number].bool()
        with assign(model, [row]):
            assert_near(together[number, real], model(**alone).logits[0], 1e-5)
    assert_near(together[8], base[8], 1e-6)
    with assign(model, [Choice()]):
        again = model(**batch).logits
    assert_near(again, model(**batch).logits, 1e-6)
    unroute(model)
    for number, knobs in [
        (4, {"top_k": 1}),
        (5, {"top_k": "all", "temperature": 3.0}),
    ]:  # a pool that is routed so from the start
        route(model, pool, **knobs)
        alone, real = take_row(batch, number), batch["attention_mask"][number].bool()
        assert_near(together[number, real], model(**alone).logits[0], 1e-5)
        unroute(model)


@pytest.mark.parametrize("router", ["phatgoose", "arrow", "phatgoose+adapter_prompt_evidence"])
def test_what_a_row_allows_is_what_restrict_allows(router, model_and_pool):
    model, pool = model_and_pool("llama", 4)
    batch = make_batch(model, [5, 5])
    batch.pop("position_ids")
    route(model, pool, router)
    with assign(model, [Choice(allow=["e1", "e3"]), {"e0": 0.5, "e1": 0.5}]):
        found = model(**batch).logits
        written = model.generate(**batch, max_new_tokens=5, do_sample=False)
    one = {key: value[:1] for key, value in batch.items()}
    with restrict(model, ["e1", "e3"]):
        assert_near(found[:1], model(**one).logits, 1e-5)
        assert torch.equal(model.generate(**one, max_new_tokens=5, do_sample=False), written[:1])


def test_weights_one_are_the_expert_bit_for_bit(model_and_pool):
    model, pool = model_and_pool("llama", 4)
    batch = make_batch(model, [5, 7])
    route(model, pool)
    with torch.no_grad(), assign(model, ["e1", None]):
        named = model(**batch).logits
    for rows in ([{"e1": 1}, None], [Choice(weights={"e1": 2}, scale=0.5), Choice(base=True)]):
        with torch.no_grad(), assign(model, rows):
            assert torch.equal(model(**batch).logits, named)


def test_decoding_gives_what_reading_gives(model_and_pool):
    model, pool = model_and_pool("llama", 4)
    batch = make_batch(model, [6, 6, 6])
    rows = [{"e0": 0.6, "e1": 0.2, "e2": 0.4}, Choice(scale=0.5, top_k=3), Choice(top_k=1)]
    route(model, pool)
    with torch.no_grad(), assign(model, rows):
        whole = model(**batch).logits
        cache, ids = None, batch["input_ids"]
        for at in range(6):
            step = model(input_ids=ids[:, at : at + 1], past_key_values=cache, use_cache=True)
            cache = step.past_key_values
            assert_near(step.logits[:, 0], whole[:, at], 1e-5)


def test_scale_is_alpha(model_and_pool, tmp_path):
    model, pool = model_and_pool("llama", 4)
    batch = make_batch(model, [5, 7])
    shutil.copytree(pool["e2"].folder, tmp_path / "louder")
    config = tmp_path / "louder" / "adapter_config.json"
    found = json.loads(config.read_text())
    config.write_text(json.dumps({**found, "lora_alpha": 2.5 * found["lora_alpha"]}))
    louder = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "louder")
    wanted = louder(**batch).logits
    route(model, pool)
    for choice in (
        Choice(weights={"e2": 1}, scale=2.5),
        Choice(weights={"e2": 2.5}),
        Choice(allow=["e2"], scale=2.5),
    ):
        with assign(model, [choice]):
            assert_near(model(**batch).logits, wanted, 1e-5)


def test_gradients_flow_through_mixtures(model_and_pool):
    model, pool = model_and_pool("llama", 4)
    route(model, pool)
    embeddings = torch.randn(2, 3, 24, requires_grad=True)
    wanted = []
    for rows in (["e0", {"e1": 0.5, "e2": 2.0, "e3": 1.0}], [Choice(), Choice(top_k=3)]):
        with assign(model, rows):
            logits = model(inputs_embeds=embeddings).logits
        with torch.no_grad(), assign(model, rows):
            assert_near(logits, model(inputs_embeds=embeddings).logits, 1e-5)
        (gradient,) = torch.autograd.grad(logits.sum(), embeddings)
        wanted.append(gradient)
    assert all(gradient.abs().sum() > 0 for gradient in wanted)


def test_a_trace_shows_a_mixture(model_and_pool):
    model, pool = model_and_pool("llama", 4)
    route(model, pool)
    with record(model) as trace, assign(model, [{"e0": 0.5, "e1": 0.25, "e3": 2.0}, "e1"]):
        model(**make_batch(model, [2, 1]))
    module = "model.layers.0.self_attn.q_proj"
    assert trace.experts[module].tolist() == [[0, 1, 3], [0, 1, 3], [1, -1, -1]]
    assert trace.weights[module].tolist() == [[0.5, 0.25, 2.0], [0.5, 0.25, 2.0], [1.0, 0.0, 0.0]]


BAD = [
    ({}, "weights are empty"),
    ({"zebra": 1.0}, "zebra: no expert of this name"),
    ({"e0": -0.1}, "the weight of e0 must be at least 0 and finite, got -0.1"),
    ({"e0": float("nan")}, "the weight of e0 must be at least 0 and finite, got nan"),
    ({"e0": float("inf")}, "must be at least 0 and finite"),
    ({"e0": 1e39}, "must be at least 0 and finite"),  # more than float32 holds
    ({"e0": 10**400}, "must be at least 0 and finite"),
    ({"e0": "1"}, "the weight of e0 must be a number, got '1'"),
    ({"e0": True}, "must be a number"),
    ({0: 1.0}, "weights must be experts' names with numbers"),
    (0.5, "a row is a name, weights, a Choice or None"),
]
CONTRADICTING = [
    ({"weights": {"e0": 1}, "allow": ["e0"]}, "allow has no meaning beside them"),
    ({"weights": {"e0": 1}, "deny": ["e1"]}, "deny has no meaning beside them"),
    ({"weights": {"e0": 1}, "top_k": 2}, "top_k has no meaning beside them"),
    ({"weights": {"e0": 1}, "temperature": 2}, "temperature has no meaning beside them"),
    ({"weights": {"e0": 1e30}, "scale": 1e30}, "more than float32 holds"),
    ({"weights": [["e0", 1]]}, "weights must be experts' names"),
    ({"base": True, "weights": {"e0": 1}}, "weights has no meaning beside it"),
    ({"base": True, "scale": 0.5}, "scale has no meaning beside it"),
    ({"base": True, "allow": ["e0"]}, "name none beside it"),
    ({"allow": []}, '"allow" is empty'),
    ({"allow": "e0"}, "allow must be a list"),
    ({"allow": "e" * 10**6}, "allow must be a list"),
    ({"weights": ["\n"] * 10**5}, "weights must be experts' names"),
    ({"scale": -1}, "scale must be at least 0 and finite"),
    ({"scale": float("nan")}, "scale must be at least 0 and finite"),
    ({"temperature": 0}, "temperature must be above 0"),
    ({"temperature": 1e-60}, "temperature must be above 0"),  # 0 in float32
    ({"temperature": float("inf")}, "temperature must be at least 0 and finite"),
    ({"top_k": 0}, "top_k must be a whole number"),
    ({"top_k": 1.5}, "top_k must be a whole number"),
    ({"top_k": True}, "top_k must be a whole number"),
]


@pytest.mark.wrong_types
def test_bad_rows_change_nothing(model_and_pool):
    model, pool = model_and_pool("llama", 4)
    batch = make_batch(model, [3, 2])
    route(model, pool)
    before = model(**batch).logits
    for row, message in BAD:
        with pytest.raises(ConfigError, match=message), assign(model, ["e1", row]):
            raise AssertionError(row)
    for contradicting, message in CONTRADICTING:
        with pytest.raises(ConfigError, match=message) as raised:
            Choice(**contradicting)
        assert len(str(raised.value)) < 250 and "\n" not in str(raised.value)
    with pytest.raises(ConfigError, match="deny"), assign(model, [Choice(deny=pool.names)]):
        pass
    assert torch.equal(model(**batch).logits, before)


def test_rows_and_restrict_agree(model_and_pool):
    model, pool = model_and_pool("llama", 4)
    batch = make_batch(model, [3, 2])
    plain = model(**batch).logits
    route(model, pool)
    with restrict(model, ["e0", "e1"]):
        for row in ({"e0": 0.5, "e2": 0.5}, Choice(allow=["e2"])):
            with pytest.raises(ConfigError, match="e2 is not among"), assign(model, [row]):
                pass
        denied = Choice(deny=["e0", "e1"])
        with pytest.raises(ConfigError, match="denies all experts"), assign(model, [denied]):
            pass
        wanted = model(**batch).logits
        with assign(model, [Choice(), Choice(deny=["e3"])]):
            assert_near(model(**batch).logits, wanted, 1e-6)
    with assign(model, [{"e0": 0.5}, "e1"]):
        with pytest.raises(ConfigError, match="e1 is not among"), restrict(model, ["e0"]):
            pass
        with restrict(model, []):
            assert_near(model(**batch).logits, plain, 1e-6)


def test_a_temperature_that_would_change_nothing(model_and_pool):
    model, pool = model_and_pool("llama", 2)
    route(model, pool, scale="unit")
    rows = [Choice(temperature=2.0)]
    with pytest.raises(ConfigError, match="changes nothing"), assign(model, rows):
        pass


@settings(max_examples=20, derandomize=True, deadline=None)
@given(data=st.data())
def test_a_mixture_is_the_weighted_sum_of_its_experts(data):
    """At one layer, where nothing comes after it that is not linear."""
    weight = st.floats(0, 3, width=32)
    given = data.draw(st.dictionaries(st.sampled_from(["e0", "e1", "e2"]), weight, min_size=1))
    model, pool = one_layer()
    x = torch.randn(4, 24, generator=torch.Generator().manual_seed(0))
    layer = model.get_submodule(next(iter(pool["e0"].modules)))
    base = layer(x[None])[0]
    route(model, pool)
    try:
        with assign(model, [given]):
            found = layer(x[None])[0] - base
    finally:
        unroute(model)
    wanted = torch.zeros_like(base, dtype=torch.float64)
    for name, share in given.items():
        (lora,) = pool[name].modules.values()
        a, b = lora.a.double(), lora.b.double() * lora.scale
        wanted += share * x.double() @ a.T @ b.T
    assert_near(found, wanted, 1e-5, wanted.abs() + base.abs())


@functools.cache
def one_layer():
    model = make_model("llama", layers=1)
    name = "model.layers.0.self_attn.q_proj"
    with tempfile.TemporaryDirectory() as root:
        folders = [
            save_expert(Path(root) / f"e{i}", model, seed=i, targets=[name], rank=1 + i)
            for i in range(3)
        ]
        return model, ExpertPool.load(folders)


@pytest.mark.parametrize("config", [{"use_dora": True}, {"lora_bias": True}], ids=str)
def test_other_kinds_are_mixed_by_what_they_add(config, tmp_path):
    """DoRA is not linear in its factors, so a weight is of all that it adds at a layer."""
    model = make_model("llama", layers=1)
    name = "model.layers.0.mlp.down_proj"
    folders = [
        save_expert(tmp_path / f"e{i}", model, seed=i, targets=[name], **kind)
        for i, kind in enumerate([config, config, {}])
    ]
    layer, x = model.get_submodule(name), torch.randn(1, 5, 31)
    base = layer(x)
    plain = [
        PeftModel.from_pretrained(copy.deepcopy(model), folder)
        .get_base_model()
        .get_submodule(name)(x)
        - base
        for folder in folders
    ]
    route(model, ExpertPool.load(folders))
    with assign(model, [{"e0": 0.5, "e1": 1.5, "e2": 0.25}]):
        found = layer(x) - base
    wanted = 0.5 * plain[0] + 1.5 * plain[1] + 0.25 * plain[2]
    assert_near(found, wanted, TOLERANCE[torch.float32].delta)
