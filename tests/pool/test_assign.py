"""One expert for each row of a batch."""

import pytest
import torch

from phatgoose import assign, record, restrict, route, unroute
from phatgoose.errors import ConfigError, RoutingError
from tests.models import make_batch, take_row
from tests.tolerances import assert_near


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
