"""Routed models against the float64 reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phatgoose import ExpertPool, record, route, unroute
from tests.models import (
    LINEARS,
    make_batch,
    make_model,
    mixed_targets,
    real_tokens,
    save_expert,
    save_experts,
)
from tests.reference import Reference
from tests.tolerances import TOLERANCE, assert_near
from tests.versions import t5_on_the_left


def assert_parity(model, folders, batch, *, top_k=2):
    """The routed model is the reference: same logits, same delta, same experts and weights."""
    bound = TOLERANCE[torch.float32]
    reference, bare = Reference(model, folders, top_k), Reference(model, [])
    wanted, wanted_base = reference(**batch), bare(**batch)
    real = real_tokens(batch, "decoder").view(wanted.shape[:2])
    with torch.no_grad():
        base = model(**batch).logits
        route(model, ExpertPool.load(folders), top_k=top_k)
        with record(model) as trace:
            found = model(**batch).logits
        unroute(model)
    assert_near(found[real], wanted[real], bound.output)
    assert_near((found - base)[real], (wanted - wanted_base)[real], bound.delta)
    assert_same_routing(trace, reference, batch)
    return trace


def assert_same_routing(trace, reference, batch):
    assert set(trace.experts) == set(reference.chosen)
    for module, rows in reference.chosen.items():
        keep = real_tokens(batch, trace.streams[module]).tolist()
        chosen = [pad(row, trace.top_k, -1) for row, real in zip(rows, keep, strict=True) if real]
        weights = [
            pad(row, trace.top_k, 0.0)
            for row, real in zip(reference.weights[module], keep, strict=True)
            if real
        ]
        assert trace.experts[module].tolist() == chosen, module
        bound = TOLERANCE[torch.float32].output
        assert_near(trace.weights[module], torch.tensor(weights).view(-1, trace.top_k), bound)


T5_LEFT = ("t5", "left")


def pad(row, length, fill):
    return row + [fill] * (length - len(row))


@pytest.mark.parametrize(
    ("family", "side"),
    [
        pytest.param(family, side, marks=t5_on_the_left if (family[:2], side) == T5_LEFT else ())
        for family in LINEARS
        for side in ("left", "right")
    ],
)
def test_parity(family, side, tmp_path):
    model = make_model(family)
    folders = save_experts(tmp_path, model, mixed_targets(family, 5))
    trace = assert_parity(model, folders, make_batch(model, [4, 7, 1], side=side))
    lonely = [name for name in trace.experts if name.endswith("." + LINEARS[family][-1])]
    assert lonely
    for name in lonely:  # one candidate: weight 1, and an empty second place
        assert trace.experts[name].tolist() == [[0, -1]] * len(trace.experts[name])
        assert trace.weights[name].tolist() == [[1.0, 0.0]] * len(trace.weights[name])


@settings(max_examples=12, derandomize=True)  # scores may nearly tie, and fp32 decide otherwise
@given(data=st.data())
def test_parity_of_random_pools(data, tmp_path_factory):
    """Any ranks, scales, layers, top_k and lengths, empty and single sequences among them."""
    family = data.draw(st.sampled_from(sorted(LINEARS)))
    seed = data.draw(st.integers(0, 99))
    model = make_model(family, seed=seed, hidden=data.draw(st.sampled_from([12, 24, 36])), layers=1)
    some = st.sets(st.sampled_from(LINEARS[family]), min_size=1).map(sorted)
    root = tmp_path_factory.mktemp("random")
    folders = [
        save_expert(
            root / f"e{i}",
            model,
            seed=seed + i,
            targets=data.draw(some),
            rank=data.draw(st.integers(1, 6)),
            alpha=data.draw(st.integers(1, 9)),
            use_rslora=data.draw(st.booleans()),
        )
        for i in range(data.draw(st.integers(1, 4)))
    ]
    lengths = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    batch = make_batch(
        model, lengths, side=data.draw(st.sampled_from(["left", "right"])), seed=seed
    )
    assert_parity(model, folders, batch, top_k=data.draw(st.integers(1, len(folders))))


@pytest.mark.parametrize("rslora", [False, True])
def test_parity_of_rank_and_alpha_patterns(rslora, tmp_path):
    model = make_model("llama")
    patterns = {
        "rank_pattern": {"v_proj": 5, r"layers\.1\.self_attn\.q_proj": 4},
        "alpha_pattern": {r"layers\.0\.mlp\.down_proj": 1, "self_attn.v_proj": 9},
        "use_rslora": rslora,
    }
    targets = [("q_proj", "v_proj", "down_proj")] * 3
    folders = save_experts(tmp_path, model, targets, **patterns)
    assert_parity(model, folders, make_batch(model, [5, 2]))


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5-gated"])
def test_parity_of_more_experts_than_one_pass_finds(family, tmp_path):
    model = make_model(family, layers=1)
    folders = save_experts(tmp_path, model, mixed_targets(family, 12))
    assert_parity(model, folders, make_batch(model, [6, 3]), top_k=10)


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5-gated"])
def test_parity_of_gradients(family, tmp_path):
    """Also through the weights, which the routed activations decide."""
    model = make_model(family)
    folders = save_experts(tmp_path, model, mixed_targets(family, 4))
    batch = make_batch(model, [4, 3], side="right")
    reference = Reference(model, folders)
    route(model, ExpertPool.load(folders))
    for each in (model, reference.model):
        each(**batch).logits.log_softmax(-1)[..., 3].sum().backward()
    wanted = dict(reference.model.named_parameters())
    for name, parameter in model.named_parameters():
        assert_near(parameter.grad, wanted[name].grad, TOLERANCE[torch.float32].delta)


@pytest.mark.parametrize(
    ("family", "how"),
    [
        pytest.param(
            family,
            how,
            marks=t5_on_the_left if (family[:2], how) == ("t5", "autocast") else (),
            id=f"{family}-{how}",
        )
        for family in ("llama", "gpt2", "t5-gated")
        for how in (torch.bfloat16, torch.float16, "autocast")
    ],
)
def test_parity_of_each_layer_in_low_precision(family, how, tmp_path):
    """At every layer, for the input it really had: the same experts, and a near output."""
    autocast = how == "autocast"
    dtype = torch.bfloat16 if autocast else how
    model = make_model(family)
    folders = save_experts(tmp_path, model, mixed_targets(family, 4))
    model = model if autocast else model.to(dtype)
    batch = make_batch(model, [4, 7, 1])
    reference, seen = Reference(model, folders), {}
    layers = {name: model.get_submodule(name) for expert in reference.experts for name in expert}
    for name, layer in layers.items():  # before the routing's own hook, and after it
        layer.register_forward_hook(lambda _, x, y, name=name: seen.update({name: [x[0], y]}))
    route(model, ExpertPool.load(folders))
    for name, layer in layers.items():
        layer.register_forward_hook(lambda _, x, y, name=name: seen[name].append(y))
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=autocast), record(model) as trace:
        model(**batch)
    for name, (x, base, found) in seen.items():
        wanted = reference.delta(name, x.double())
        assert found.dtype == base.dtype == dtype
        assert_near(found, base.double() + wanted, TOLERANCE[dtype].output)
        assert_near(found.double() - base.double(), wanted, TOLERANCE[dtype].delta)
    assert_same_routing(trace, reference, batch)
