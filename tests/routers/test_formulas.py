"""Routers that need no gates: each one's scores and choices, from its formula, in float64."""

import copy

import pytest
import torch
from peft import ArrowConfig, create_arrow_model
from safetensors.torch import load_file, save_file

from phatgoose import ExpertPool, record, route, unroute
from phatgoose.errors import ConfigError, MissingGateError
from phatgoose.routers import LagRouter, derivations, make_router
from phatgoose.routers.inputs import written_by
from phatgoose.routers.spectral import right_singular
from phatgoose.routers.zscore import ZScoreRouter
from tests.models import LINEARS, VOCABULARY, make_batch, make_model, save_experts
from tests.tolerances import assert_near

SITE = "model.layers.1.self_attn.q_proj"


def update(expert, module):
    """scale · B A, in float64."""
    lora = expert.modules[module]
    return lora.scale * lora.b.double() @ lora.a.double()


def right(expert, module):
    """Singular values and right vectors of the whole product, zero directions left out."""
    _, values, vectors = torch.linalg.svd(update(expert, module), full_matrices=False)
    return values[: expert.modules[module].rank], vectors[: expert.modules[module].rank]


FORMULAS = {
    "arrow": lambda e, m, x: (x @ right(e, m)[1][0]).abs(),
    "spectr": lambda e, m, x: (x @ right(e, m)[1].T * right(e, m)[0]).norm(dim=-1),
    "spectr_norm": lambda e, m, x: (x @ right(e, m)[1].T).norm(dim=-1),
    "seqr": lambda e, m, x: (x @ update(e, m).T).norm(dim=-1),
    "uniform": lambda e, m, x: torch.zeros(len(x)).double(),
}


def scores_of(router, pool, module, x):
    members = [expert for expert in pool if module in expert.modules]
    signatures = torch.nn.utils.rnn.pad_sequence(
        [router.signature(expert, module) for expert in members], batch_first=True
    )
    return members, router.score(x, signatures)


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5-gated"])
def test_scores_on_a_pool_of_mixed_ranks(name, family, model_and_pool):
    _, pool = model_and_pool(family, 6)
    for module in list(pool["e0"].modules)[:5]:
        x = torch.randn(7, pool["e0"].modules[module].in_features)
        members, found = scores_of(make_router(name), pool, module, x)
        assert len({expert.modules[module].rank for expert in members}) > 1 or len(members) == 1
        wanted = torch.stack([FORMULAS[name](e, module, x.double()) for e in members], dim=1)
        assert found.dtype == torch.float32
        assert_near(found, wanted, 1e-5)


def test_lag_takes_the_spectr_best_of_arrow_s_best(model_and_pool):
    _, pool = model_and_pool("llama", 6)
    x = torch.randn(50, pool["e0"].modules[SITE].in_features)
    members, found = scores_of(LagRouter(candidates=3), pool, SITE, x)
    arrow = torch.stack([FORMULAS["arrow"](e, SITE, x.double()) for e in members], dim=1)
    spectr = torch.stack([FORMULAS["spectr"](e, SITE, x.double()) for e in members], dim=1)
    kept = torch.zeros_like(arrow, dtype=torch.bool)
    kept.scatter_(1, arrow.argsort(dim=1, descending=True)[:, :3], True)
    assert (found.isfinite() == kept).all()
    assert_near(found[kept], spectr[kept], 1e-5)
    assert (found.argmax(1) != spectr.argmax(1)).any()  # the filter matters here
    with pytest.raises(ConfigError, match="candidates must be at least 1"):
        LagRouter(candidates=0)


def test_right_singular_vectors_depend_on_the_update_alone(model_and_pool):
    lora = model_and_pool("llama", 4)[1]["e3"].modules[SITE]
    mixing = torch.randn(lora.rank, lora.rank).double()
    other = type(lora)(mixing @ lora.a.double(), lora.b.double() @ mixing.inverse(), lora.scale)
    for found, wanted in zip(right_singular(other), right_singular(lora), strict=True):
        assert_near(found, wanted, 1e-6)


def test_a_zero_direction_counts_for_nothing(model_and_pool):
    lora = model_and_pool("llama", 4)[1]["e3"].modules[SITE]
    doubled = type(lora)(
        torch.cat([lora.a, lora.a]), torch.cat([lora.b, lora.b], dim=1), lora.scale / 2
    )
    values, vectors = right_singular(doubled)
    assert_near(values[: lora.rank], right_singular(lora)[0], 1e-6)
    assert (values[lora.rank :] == 0).all() and (vectors[lora.rank :] == 0).all()
    empty = type(lora)(lora.a, torch.zeros_like(lora.b), lora.scale)
    assert not right_singular(empty)[0].any() and right_singular(empty)[1].isfinite().all()


DEFAULTS = {
    "phatgoose": (2, False),
    "arrow": (3, False),
    "spectr": (2, False),
    "seqr": (1, True),
    "lag": (1, True),
    "uniform": (5, False),
    "seqr+zscore": (1, True),
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_each_routes_by_its_own_paper_s_settings(name, model_and_pool):
    model, pool = model_and_pool("llama", 5)
    top_k, unit = DEFAULTS[name]
    route(model, pool, name)
    with record(model) as trace:
        model(**make_batch(model, [5, 3]))
    module = "model.layers.0.self_attn.q_proj"  # every expert adapts it
    chosen = trace.experts[module]
    assert int((chosen >= 0).sum(1).min()) == min(top_k, len(pool))
    weights = trace.weights[module].sum(1)
    assert_near(weights, torch.ones_like(weights), 1e-6)
    assert unit == bool((trace.weights[module] == 1).all())
    unroute(model)


def test_arrow_chooses_as_peft_s(tmp_path):
    model = make_model("llama")
    folders = save_experts(tmp_path, model, [LINEARS["llama"]] * 5, rank=3, alpha=4)
    for folder in folders:
        # Updates with one strong direction: PEFT's power iteration, 15 rounds, then converges.
        weights = load_file(folder / "adapter_model.safetensors")
        for name, weight in weights.items():
            if "lora_B" in name:
                weight[:, 0] *= 12
        save_file(weights, folder / "adapter_model.safetensors")
        (folder / "phatgoose_gates.safetensors").unlink()
    pool, batch = ExpertPool.load(folders), make_batch(model, [9, 6])
    theirs = create_arrow_model(
        base_model=copy.deepcopy(model),
        task_specific_adapter_paths=[str(folder) for folder in folders],
        arrow_config=ArrowConfig(top_k=3, router_temperature=1.0),
    ).eval()
    wanted = theirs(**batch).logits
    layer = theirs.get_submodule("base_model.model." + SITE).lora_arrow["arrow_router"]
    order = [int(name.removeprefix("task_")) for name in layer.task_adapter_names]
    x = torch.randn(300, 24)
    _, ours = scores_of(make_router("arrow"), pool, SITE, x)
    scores = (x @ layer.prototypes.T).abs()
    assert torch.equal(ours.topk(3).indices, torch.tensor(order)[scores.topk(3).indices])
    route(model, pool, "arrow")
    real = batch["attention_mask"].bool()
    assert_near(model(**batch).logits[real], wanted[real], 1e-4)


def test_scores_that_leave_experts_out_have_no_zscores(model_and_pool):
    model, pool = model_and_pool("llama", 4)
    with pytest.raises(ConfigError, match=r"lag\+zscore: lag leaves experts out.*seqr\+zscore"):
        route(model, pool, ZScoreRouter(LagRouter(candidates=2)))


@pytest.mark.parametrize("name", ["seqr+zscore", "phatgoose+zscore"])
def test_zscores_have_no_mean_and_unit_deviation_on_their_background(name, model_and_pool):
    model, pool = model_and_pool("llama", 4)
    background = torch.randint(1, VOCABULARY, (6, 9))
    router = make_router(name)
    router._background = background
    inputs = []
    handle = model.get_submodule(SITE).register_forward_pre_hook(
        lambda _, args: inputs.append(args[0].flatten(0, 1))
    )
    model(input_ids=background)
    handle.remove()
    router.prepare(model, pool.experts)
    _, scores = scores_of(router, pool, SITE, torch.cat(inputs))
    assert_near(scores.mean(0), torch.zeros(4), 1e-4, size=torch.ones(4))
    assert_near(scores.std(0, correction=0), torch.ones(4), 1e-4)


def test_modifiers_by_name():
    with pytest.raises(
        ConfigError, match=r"'arrow' modifies no other.*adapter_evidence, .*evidence, .*zscore"
    ):
        make_router("phatgoose+arrow")
    with pytest.raises(ConfigError, match="name one"):
        make_router("zscore")
    with pytest.raises(ConfigError, match="'nonsense'"):
        make_router("phatgoose+nonsense")
    assert make_router("lag+evidence").defaults == LagRouter.defaults


def test_a_base_writes_the_same_text_each_time_and_leaves_the_seed_alone():
    model = make_model("llama")
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    first = written_by(model, rows=3, length=7)
    assert torch.equal(torch.rand(3), wanted)
    assert first.shape == (3, 7)
    assert written_by(model, rows=3, length=7) is first  # remembered
    assert torch.equal(first, written_by(make_model("llama"), rows=3, length=7))


def test_mixed_experts_without_gates_score_like_those_with(model_and_pool):
    model, pool = model_and_pool("llama", 4)
    bare = [type(e)(e.name, e.modules, None, None) if i == 3 else e for i, e in enumerate(pool)]
    background = torch.randint(1, VOCABULARY, (20, 12))
    router = make_router("phatgoose_mixed")
    router._background = background
    inputs = []
    handle = model.get_submodule(SITE).register_forward_pre_hook(
        lambda _, args: inputs.append(args[0].flatten(0, 1))
    )
    model(input_ids=background)
    handle.remove()
    router.prepare(model, bare)
    assert derivations(router, bare) == {"e3": "arrow"}
    members, scores = scores_of(router, bare, SITE, torch.cat(inputs))
    trained = scores[:, [e.gates is not None for e in members]]
    derived = scores[:, [e.gates is None for e in members]]
    assert_near(derived.mean(), trained.mean(0).mean(), 1e-3, size=torch.ones(()))
    assert_near(derived.var(0).mean(), trained.var(0).mean(), 1e-3)
    route(model, ExpertPool(bare), router)  # and it serves
    model(**make_batch(model, [4]))
    unroute(model)
    with pytest.raises(MissingGateError, match="no other expert has any"):
        route(model, ExpertPool([bare[3]]), "phatgoose_mixed", top_k=1)


def test_where_all_have_gates_mixed_is_phatgoose(model_and_pool):
    model, pool = model_and_pool("llama", 4)
    batch = make_batch(model, [6])
    route(model, pool)
    wanted = model(**batch).logits
    unroute(model)
    route(model, pool, "phatgoose_mixed")
    assert torch.equal(model(**batch).logits, wanted)


def test_average_activation_says_what_it_needs(model_and_pool):
    _, pool = model_and_pool("llama", 2)
    with pytest.raises(MissingGateError, match=r"e0: has no average activation.*experts derive"):
        make_router("average_activation").signature(pool["e0"], SITE)
