"""Static merges, against products formed whole in float64 and against PEFT on the real base."""

import copy
import warnings
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from phatgoose import ExpertPool, load_expert, merge_experts, restrict, route, save_expert, unroute
from phatgoose.errors import ConfigError, IncompatibleExpertError
from phatgoose.experts import LoraModule
from phatgoose.pool import MERGE_METHODS
from phatgoose.routers import Router
from tests.models import make_batch, make_model, save_experts
from tests.tolerances import TOLERANCE, assert_near

BOUND = TOLERANCE[torch.float32]
EXACT = 3e-7  # float64 inside, rounded once to fp32: a few of its epsilons
PEFT_METHODS = MERGE_METHODS[1:]


class Alike(Router):
    """Needs no gates, and scores every expert alike."""

    def signature(self, expert, module):
        return torch.zeros(expert.modules[module].in_features)

    def score(self, x, signatures):
        return x.new_zeros(len(x), len(signatures), dtype=torch.float32)


def product(lora):
    return lora.scale * lora.b.double() @ lora.a.double()


def average(experts, module, weights=None):
    """Σ w · product, formed whole; an expert without the module counts as zero."""
    weights = weights or [1 / len(experts)] * len(experts)
    return sum(
        w * product(e.modules[module])
        for w, e in zip(weights, experts, strict=True)
        if module in e.modules
    )


def truncated(matrix, rank):
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def copies(expert, count):
    return [replace(expert, name=f"copy{i}") for i in range(count)]


def values(expert):
    return {n: (lora.a.clone(), lora.b.clone(), lora.scale) for n, lora in expert.modules.items()}


def same(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(one[n][0], other[n][0]) and torch.equal(one[n][1], other[n][1]) for n in one
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5-gated"])
@pytest.mark.parametrize("weights", [None, [0.5, -0.25, 0.0, 2.0, 1.0]])
def test_average_is_the_average_of_the_products(model_and_pool, family, weights):
    _, pool = model_and_pool(family, 5)
    merged = merge_experts(pool, weights=weights)
    assert (merged.name, merged.gates, merged.folder) == ("merged", None, None)
    assert set(merged.modules) == {name for e in pool for name in e.modules}
    for name, lora in merged.modules.items():
        assert lora.rank == sum(e.modules[name].rank for e in pool if name in e.modules)
        assert lora.a.dtype == lora.b.dtype == torch.float32
        assert_near(product(lora), average(pool.experts, name, weights), EXACT)


@pytest.mark.parametrize("rank", [1, 2, 5, 100])
def test_truncated_average_is_the_best_of_its_rank(model_and_pool, rank):
    _, pool = model_and_pool("llama", 5)
    merged = merge_experts(pool, rank=rank)
    for name, lora in merged.modules.items():
        assert lora.rank == min(rank, sum(e.modules[name].rank for e in pool if name in e.modules))
        whole = average(pool.experts, name)
        assert_near(product(lora), truncated(whole, rank), EXACT, size=whole)
    assert same(values(merge_experts(pool, rank=rank)), values(merged))


def test_more_ranks_than_features(model_and_pool):
    """The sum of the ranks is above both sizes of the layer."""
    _, pool = model_and_pool("llama", 4, rank=13)
    name = "model.layers.0.self_attn.q_proj"  # all adapt it
    lora = merge_experts(pool, rank=3).modules[name]
    assert sum(e.modules[name].rank for e in pool) > max(lora.in_features, lora.out_features)
    whole = average(pool.experts, name)
    assert_near(product(lora), truncated(whole, 3), EXACT, size=whole)


def halved(lora):
    return LoraModule(lora.a.bfloat16(), lora.b.bfloat16(), lora.scale)


def test_adapters_in_bf16(model_and_pool):
    _, pool = model_and_pool("llama", 3)
    half = [replace(e, modules={n: halved(x) for n, x in e.modules.items()}) for e in pool]
    for name, lora in merge_experts(half).modules.items():
        assert_near(product(lora), average(half, name), EXACT)


@pytest.mark.parametrize("method", ["average", "linear", "ties", "ties_svd", "magnitude_prune_svd"])
@pytest.mark.filterwarnings("ignore:The density")  # PEFT says that 1 prunes nothing
def test_copies_of_an_expert_make_that_expert(model_and_pool, method):
    expert = model_and_pool("llama", 4)[1].experts[3]
    options = {} if method in ("average", "linear") else {"density": 1.0}
    if method == "average":
        options["rank"] = next(iter(expert.modules.values())).rank
    merged = merge_experts(copies(expert, 5), method=method, **options)
    assert merged.modules.keys() == expert.modules.keys()
    for name, lora in merged.modules.items():
        assert lora.rank == expert.modules[name].rank
        assert_near(product(lora), product(expert.modules[name]), BOUND.output)


@torch.no_grad()
def test_a_merged_expert_runs_as_its_products(model_and_pool):
    """Routed alone, saved and loaded by PEFT, and added to the base's weights: all the same."""
    model, pool = model_and_pool("llama", 4)
    batch = make_batch(model, [7, 4])
    merged = merge_experts(pool)
    wanted = copy.deepcopy(model).double()
    for name in merged.modules:
        wanted.get_submodule(name).weight += average(pool.experts, name)
    wanted = wanted(**batch).logits
    route(model, ExpertPool([merged]), router=Alike(), top_k=1)
    assert_near(model(**batch).logits, wanted, BOUND.model)
    unroute(model)
    route(model, ExpertPool([*pool, merged]), router=Alike(), top_k=2)
    with restrict(model, ["merged"]):
        assert_near(model(**batch).logits, wanted, BOUND.model)


@torch.no_grad()
def test_a_merged_expert_is_a_peft_folder(model_and_pool, tmp_path):
    model, pool = model_and_pool("t5", 4)
    merged = merge_experts(pool, rank=3)
    folder = save_expert(merged, tmp_path / "all", task_type="SEQ_2_SEQ_LM")
    batch = make_batch(model, [5, 3])
    route(model, ExpertPool([merged]), router=Alike(), top_k=1)
    ours = model(**batch).logits
    theirs = PeftModel.from_pretrained(unroute(model), folder).eval()(**batch).logits
    assert_near(ours, theirs, BOUND.model)
    assert same(values(load_expert(folder)), values(merged))


@torch.no_grad()
def by_peft(model, folders, method, weights, *, seed=0, **options):
    """The merged LoRA layers of `add_weighted_adapter` on a copy of the real base."""
    peft_model = PeftModel.from_pretrained(copy.deepcopy(model), folders[0], "e0")
    for i, folder in enumerate(folders[1:], 1):
        peft_model.load_adapter(folder, f"e{i}")
    names = [f"e{i}" for i in range(len(folders))]
    torch.manual_seed(seed)
    peft_model.add_weighted_adapter(names, weights, "all", combination_type=method, **options)
    return {
        name.removeprefix("base_model.model."): layer.scaling["all"]
        * layer.lora_B["all"].weight
        @ layer.lora_A["all"].weight
        for name, layer in peft_model.named_modules()
        if isinstance(layer, LoraLayer)
    }


@pytest.mark.parametrize(
    ("family", "method"),
    [
        *(("llama", method) for method in PEFT_METHODS if "dare" not in method),
        ("gpt2", "magnitude_prune_svd"),
        ("t5", "ties"),
    ],
)
def test_equals_peft_on_the_base(model_and_pool, saved_experts, family, method):
    options = {"density": 0.4} if method != "linear" else {}
    equal = {} if method.endswith("_svd") else {"rank": 2}
    model, pool = model_and_pool(family, 4, **equal)
    weights = [0.5, 0.25, -0.5, 1.0]
    merged = merge_experts(pool, method=method, weights=weights, **options)
    wanted = by_peft(model, saved_experts(family, 4, **equal), method, weights, **options)
    assert merged.modules.keys() == wanted.keys()
    for name, delta in wanted.items():
        assert_near(product(merged.modules[name]), delta, BOUND.output)


def test_rslora_merges_as_the_plain_lora_of_its_scale(tmp_path):
    """PEFT's own merge of rsLoRA comes out sqrt(rank) times as large."""
    model, targets = make_model("llama"), [("q_proj",)] * 2
    rslora = save_experts(tmp_path / "rs", model, targets, rank=4, alpha=4, use_rslora=True)
    plain = save_experts(tmp_path / "plain", model, targets, rank=4, alpha=8)
    weights = [0.5, 0.25]
    merged = merge_experts(ExpertPool.load(rslora), method="linear", weights=weights)
    for name, delta in by_peft(model, plain, "linear", weights).items():
        assert_near(product(merged.modules[name]), delta, BOUND.output)


@pytest.mark.parametrize("method", [method for method in PEFT_METHODS if "dare" in method])
def test_dare_equals_peft_of_that_seed(tmp_path, method):
    """At one module: PEFT draws for one after the other, in the order the base has them."""
    model = make_model("llama")
    folders = save_experts(tmp_path, model, [["layers.0.mlp.up_proj"]] * 3, rank=2)
    weights, options = [0.5, 0.25, -0.5], {"density": 0.5, "seed": 3}
    merged = merge_experts(ExpertPool.load(folders), method=method, weights=weights, **options)
    (lora,) = merged.modules.values()
    (wanted,) = by_peft(model, folders, method, weights, **options).values()
    assert_near(product(lora), wanted, BOUND.output)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties_svd"])
def test_dare_depends_on_the_seed_alone(model_and_pool, method):
    _, pool = model_and_pool("llama", 4, rank=2)
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = values(merge_experts(pool, method=method, seed=5))
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(2)
    assert same(values(merge_experts(pool, method=method, seed=5)), first)
    assert not same(values(merge_experts(pool, method=method, seed=6)), first)


def test_peft_agrees_with_the_average(model_and_pool, saved_experts):
    """PEFT's "cat" and "svd" on ranks that differ: our average, whole and truncated."""
    model, pool = model_and_pool("llama", 4)
    folders, weights = saved_experts("llama", 4), [0.25] * 4
    whole = by_peft(model, folders, "cat", weights)
    short = by_peft(model, folders, "svd", weights, svd_rank=2)
    for ours, theirs in ((merge_experts(pool), whole), (merge_experts(pool, rank=2), short)):
        for name, lora in ours.modules.items():
            assert_near(product(lora), theirs[name], BOUND.output, size=whole[name])


@pytest.mark.parametrize("method", MERGE_METHODS)
def test_experts_stay_as_they_are(model_and_pool, method):
    _, pool = model_and_pool("llama", 3, rank=2)
    before = [values(expert) for expert in pool]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merged = merge_experts(pool, method=method)
    for lora in merged.modules.values():
        lora.a.fill_(7.0)  # shares no memory
        lora.b.fill_(7.0)
    assert all(same(values(e), b) for e, b in zip(pool, before, strict=True))
    assert all(expert.gates is not None for expert in pool)


@pytest.mark.parametrize("method", [m for m in PEFT_METHODS if not m.endswith("_svd")])
def test_unequal_ranks_name_the_experts_and_a_way_out(model_and_pool, method):
    _, pool = model_and_pool("llama", 6)
    with pytest.raises(ConfigError) as info:
        merge_experts(pool, method=method)
    text = str(info.value)
    assert "rank 1 (e0, e4), rank 2 (e1, e5), rank 3 (e2), rank 4 (e3)" in text
    assert method in text and "Choose average" in text
    assert merge_experts(pool, method=f"{method}_svd" if method != "linear" else "average")


def test_unequal_ranks_at_one_module(saved_experts):
    """Their largest ranks agree, which is all that PEFT itself looks at."""
    one = load_expert(saved_experts("llama", 2, rank=2)[0], name="one")
    site = sorted(one.modules)[0]
    lora = one.modules[site]
    other = replace(
        one, name="two", modules={**one.modules, site: LoraModule(lora.a[:1], lora.b[:, :1], 1.0)}
    )
    with pytest.raises(ConfigError, match=r"rank 1 \(two\), rank 2 \(one\) at .*" + site):
        merge_experts([one, other], method="linear")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"method": "mean"}, "no method is called 'mean'. Choose from: average, linear"),
        ({"rank": 0}, "rank must be at least 1"),
        ({"method": "linear", "rank": 2}, "linear keeps the experts' rank"),
        ({"density": 0.5}, "average keeps every entry"),
        ({"method": "linear", "density": 0.5}, "linear keeps every entry"),
        ({"method": "ties", "density": 0.0}, "density must be above 0"),
        ({"method": "dare_ties_svd", "density": 1.5}, "at most 1, got 1.5"),
        ({"weights": [1.0]}, "3 finite numbers"),
        ({"weights": [1.0, 2.0, float("nan")]}, "3 finite numbers"),
    ],
)
def test_bad_settings(model_and_pool, options, says):
    with pytest.raises(ConfigError) as info:
        merge_experts(model_and_pool("llama", 3, rank=2)[1], **options)
    assert says in str(info.value) and "\n" not in str(info.value)


def test_what_cannot_be_merged(model_and_pool, saved_experts):
    _, pool = model_and_pool("llama", 3)
    with pytest.raises(ConfigError, match="the pool is empty"):
        merge_experts([])
    with pytest.raises(ConfigError, match="two experts of this name"):
        merge_experts([pool.experts[0], pool.experts[0]])
    with pytest.raises(ConfigError, match="e0 alone, which PEFT would not prune"):
        merge_experts(pool.experts[:1], method="ties_svd")
    foreign = load_expert(saved_experts("gpt2", 1)[0], name="foreign")
    with pytest.raises(IncompatibleExpertError, match="foreign: belongs to another base"):
        merge_experts([*pool, foreign])
    e0 = replace(pool.experts[0], gates=None)
    wide = {n: LoraModule(x.a[:, :-1], x.b, x.scale) for n, x in e0.modules.items()}
    with pytest.raises(IncompatibleExpertError, match="wide: .*down_proj maps 30 to 24"):
        merge_experts([e0, replace(e0, name="wide", modules=wide)])


def test_the_base_is_not_needed_and_a_name_may_hold_dots(model_and_pool):
    expert = model_and_pool("llama", 1)[1].experts[0]
    named = [replace(expert, name=f"owner/v1.{i}") for i in range(2)]
    assert merge_experts(named, method="ties", name="both").name == "both"
