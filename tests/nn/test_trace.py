"""What a trace holds: real tokens only, in step with their ids, with the documented shapes."""

import pytest
import torch

from phatgoose import ExpertPool, record, restrict, route
from phatgoose.errors import RoutingError
from phatgoose.nn import Trace
from tests.models import DECODERS, make_batch, make_model, real_tokens, save_experts

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"


@pytest.fixture
def recorded(model_and_pool):
    """recorded(family, lengths): batch, pool and trace of one forward."""

    def make(family="llama", lengths=(4, 7, 1), top_k=2, **batch):
        model, pool = model_and_pool(family)
        route(model, pool, top_k=top_k)
        inputs = make_batch(model, lengths, **batch)
        with torch.no_grad(), record(model) as trace:
            model(**inputs)
        return inputs, pool, trace

    return make


@pytest.mark.parametrize("top_k", [1, 3])
def test_shapes_and_dtypes(top_k, recorded):
    _, pool, trace = recorded(top_k=top_k)
    assert trace.names == pool.names
    assert trace.top_k == top_k
    assert set(trace.experts) == set(trace.weights) == set(trace.streams)
    assert set(trace.experts) == set(pool["e0"].modules)
    for module, experts in trace.experts.items():
        weights = trace.weights[module]
        assert experts.shape == weights.shape == (12, top_k)
        assert experts.dtype == torch.int64
        assert weights.dtype == torch.float32
        assert torch.equal(weights == 0, experts == -1)
        torch.testing.assert_close(weights.sum(-1), torch.ones(12))


def test_gradients_are_not_kept(model_and_pool):
    model, pool = model_and_pool()
    route(model, pool)
    with record(model) as trace:
        model(**make_batch(model, [3]))
    assert not any(weights.requires_grad for weights in trace.weights.values())


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_left_out(side, recorded):
    batch, _, trace = recorded(side=side)
    real = batch["attention_mask"].bool()
    table = trace.tokens["decoder"]
    assert table.ids.tolist() == batch["input_ids"][real].tolist()
    assert table.sequence.tolist() == [0] * 4 + [1] * 7 + [2]
    assert table.position.tolist() == [*range(4), *range(7), 0]


def test_streams_of_an_encoder_decoder(recorded):
    batch, _, trace = recorded("t5")
    wanted = {
        "encoder": [name for name in trace.experts if name.startswith("encoder.")],
        "cross": [f"decoder.block.{i}.layer.1.EncDecAttention.{k}" for i in (0, 1) for k in "kv"],
    }
    for name, stream in trace.streams.items():
        expected = next((stream for stream, names in wanted.items() if name in names), "decoder")
        assert stream == expected, name
    assert set(trace.tokens) == {"encoder", "cross", "decoder"}
    for stream, table in trace.tokens.items():
        ids = batch["decoder_input_ids" if stream == "decoder" else "input_ids"]
        assert table.ids.tolist() == ids.flatten()[real_tokens(batch, stream)].tolist()
    for name, experts in trace.experts.items():
        assert len(experts) == len(trace.tokens[trace.streams[name]].ids)


def test_embeddings_have_no_ids(model_and_pool):
    model, pool = model_and_pool()
    route(model, pool)
    with record(model) as trace:
        model(inputs_embeds=torch.randn(2, 3, 24))
    assert trace.tokens["decoder"].ids.tolist() == [-1] * 6
    assert trace.tokens["decoder"].position.tolist() == [0, 1, 2] * 2


def test_forwards_are_put_one_after_the_other(model_and_pool):
    model, pool = model_and_pool()
    route(model, pool)
    batches = [make_batch(model, lengths, seed=7) for lengths in ([4, 2], [5])]
    apart = []
    for batch in batches:
        with record(model) as trace:
            model(**batch)
        apart.append(trace)
    with record(model) as together:
        for batch in batches:
            model(**batch)
    for name in together.experts:
        assert torch.equal(together.experts[name], torch.cat([t.experts[name] for t in apart]))
        assert torch.equal(together.weights[name], torch.cat([t.weights[name] for t in apart]))
    ids = torch.cat([trace.tokens["decoder"].ids for trace in apart])
    assert torch.equal(together.tokens["decoder"].ids, ids)


def test_rows_stay_in_step_when_some_forwards_are_restricted(model_and_pool):
    model, pool = model_and_pool("llama", 3)  # e1 adapts q_proj alone, e0 alone down_proj
    route(model, pool)
    with record(model) as trace:
        for allowed in (["e1"], pool.names, []):
            with restrict(model, allowed):
                model(**make_batch(model, [3]))
    assert {len(experts) for experts in trace.experts.values()} == {9}
    assert trace.experts[Q][:3].tolist() == [[1, -1]] * 3
    assert trace.experts[DOWN].tolist() == [[-1, -1]] * 3 + [[0, -1]] * 3 + [[-1, -1]] * 3
    assert trace.weights[DOWN].tolist() == [[0.0, 0.0]] * 3 + [[1.0, 0.0]] * 3 + [[0.0, 0.0]] * 3


def test_the_null_candidate_has_a_weight_but_no_expert(model_and_pool):
    model, pool = model_and_pool()
    route(model, pool, null_score=100.0)
    with record(model) as trace:
        model(**make_batch(model, [3]))
    for module, experts in trace.experts.items():
        assert experts[:, 0].tolist() == [-1] * 3
        assert bool((trace.weights[module][:, 0] > 0.99).all())
        assert bool((experts[:, 1] >= 0).all())


def test_shares(recorded):
    _, _, trace = recorded()
    total = torch.zeros(4)
    for module in trace.experts:
        wanted = torch.zeros(4)
        pairs = zip(trace.experts[module].flatten(), trace.weights[module].flatten(), strict=True)
        for expert, weight in pairs:
            if expert >= 0:
                wanted[expert] += weight / 12
        torch.testing.assert_close(trace.shares(module), wanted)
        total += wanted / len(trace.experts)
    torch.testing.assert_close(trace.shares(), total)
    torch.testing.assert_close(trace.shares().sum(), torch.tensor(1.0))
    assert trace.shares(DOWN).tolist() == pytest.approx([1, 0, 0, 0])
    rows = [trace.shares(Q, sequence=row) * size for row, size in enumerate((4, 7, 1))]
    torch.testing.assert_close(sum(rows) / 12, trace.shares(Q))


def test_nothing_recorded():
    trace = Trace(names=["a"], top_k=1)
    trace.close()
    assert trace.shares().tolist() == [0.0]


def test_a_part_of_the_model_cannot_be_recorded(model_and_pool):
    model, pool = model_and_pool()
    route(model, pool)
    ids = torch.tensor([[1, 2, 3]])
    model.model(ids)  # routes, for it needs no more than activations
    with pytest.raises(RoutingError, match=f"^{Q}: .*Call the model itself"), record(model):
        model.model(ids)


def test_a_layer_that_sees_some_tokens_only_cannot_be_recorded(tmp_path):
    model = make_model("llama")
    route(model, ExpertPool.load(save_experts(tmp_path, model, [["lm_head"]] * 2)))
    ids = torch.tensor([[1, 2, 3]])
    with record(model) as trace:
        model(ids)
    assert len(trace.experts["lm_head"]) == 3
    some = torch.tensor([1])
    model(ids, logits_to_keep=some)
    with pytest.raises(RoutingError, match=r"^lm_head: sees 1 tokens"), record(model):
        model(ids, logits_to_keep=some)


def test_a_head_that_sees_the_last_tokens_is_recorded_apart(tmp_path):
    model = make_model("llama")
    route(model, ExpertPool.load(save_experts(tmp_path, model, [["lm_head"]] * 2)))
    ids = torch.tensor([[1, 2, 3]])
    with record(model) as trace:
        model(ids, logits_to_keep=2)
    assert trace.streams["lm_head"] == "head"
    assert trace.tokens["head"].position.tolist() == [1, 2]
    with pytest.raises(RoutingError, match=r"lm_head: sees all tokens in one"), record(model):
        model(ids, logits_to_keep=2)
        model(ids)


@pytest.mark.parametrize("family", DECODERS)
def test_recording_changes_nothing(family, model_and_pool):
    model, pool = model_and_pool(family)
    route(model, pool)
    batch = make_batch(model, [4, 7])
    before = model(**batch).logits
    with record(model):
        during = model(**batch).logits
    assert torch.equal(before, during)
    assert torch.equal(before, model(**batch).logits)
