"""One pool of adapters of every kind: routed, mixed, saved, and taken off bit for bit."""

import warnings

import pytest
import torch
from peft import PeftModel
from torch import nn

from phatgoose import (
    ExpertPool,
    assign,
    load_expert,
    merge_experts,
    record,
    restrict,
    route,
    save_expert,
    unroute,
)
from phatgoose.errors import UnsupportedAdapterError
from phatgoose.experts.resolve import resolve
from tests.experts.matrix import VARIANTS, Family, by_peft, logits, make_adapter
from tests.models import make_batch, make_model, save_gates
from tests.tolerances import TOLERANCE, assert_near

KINDS = (
    "lora",
    "rslora",
    "dora, every linear layer",
    "lora_bias",
    "bias all",
    "embedding",
    "embedding, dora",
    "head",
    "saved head",
    "saved embedding",
    "saved norms",
    "saved linear layers",
    "tokens of both",
    "pissa",
    "bfloat16 file",
)
BOUND = TOLERANCE[torch.float32].model
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module", params=["gpt2", "llama", "qwen3-moe"])
def world(request, tmp_path_factory):
    """A family, and folders of one adapter of each kind, with random gates."""
    return make_world(Family(request.param), tmp_path_factory.mktemp("pool"))


@pytest.fixture(scope="module", params=["llama-biased", "qwen3-moe"])
def untied(request, tmp_path_factory):
    """Such that has a head of its own, so that PEFT can merge an adapter of its embedding alone."""
    return make_world(Family(request.param), tmp_path_factory.mktemp("pool"))


def make_world(family, root):
    kinds = [*KINDS, *(["experts, both"] if family.moe else [])]
    if family.moe:
        kinds.remove("lora_bias")  # which PEFT cannot merge where layers have no bias
    folders = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number, kind in enumerate(kinds):
            settings = VARIANTS[kind](family)
            folder = make_adapter(root / f"e{number:02}", family, settings, seed=number)
            save_gates(folder, make_model(family.name), seed=number)
            folders.append(folder)
    return family, folders


def merged(family, folder) -> nn.Module:
    """The base with an adapter merged into it, by PEFT."""
    model = PeftModel.from_pretrained(make_model(family.name), folder)
    return model.merge_and_unload().eval()


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_each_row_is_peft_s_own_forward(world, backend):
    family, folders = world
    model = make_model(family.name)
    plain = logits(model)
    pool = ExpertPool.load(folders)
    route(model, pool, "uniform", backend=backend)
    for folder in folders:
        with assign(model, [folder.name]):
            assert_near(logits(model), by_peft(family, folder), BOUND)
    for folder in folders[1:-1:3]:  # slots move
        pool.remove(folder.name)
    with assign(model, [folders[0].name, folders[-1].name]):
        rows = logits(model)
    assert_near(rows[0], by_peft(family, folders[0])[0], BOUND)
    assert_near(rows[1], by_peft(family, folders[-1])[1], BOUND)
    for folder in folders[1:-1:3]:
        pool.add(load_expert(folder))
        with assign(model, [folder.name]):
            assert_near(logits(model), by_peft(family, folder), BOUND)
    with restrict(model, []):
        assert torch.equal(logits(model), plain)
    unroute(model)
    assert torch.equal(logits(model), plain)
    assert all("phatgoose" not in name for name, _ in model.named_modules())


def test_saved_and_loaded_it_is_the_same_pool(world, tmp_path):
    family, folders = world
    pool = ExpertPool.load(folders)
    copies = [save_expert(expert, tmp_path / expert.name) for expert in pool]
    models = []
    for sources in (folders, copies):
        models.append(route(make_model(family.name), ExpertPool.load(sources)))
    assert torch.equal(logits(models[0]), logits(models[1]))
    for folder in copies:
        assert_near(by_peft(family, folder), by_peft(family, tmp_path / folder.name), BOUND)


def test_a_mean_of_all_is_the_mean_of_their_weights(untied):
    """Every kind but batched experts adds what is linear in the difference of its weights."""
    family, folders = untied
    base, wanted = make_model(family.name), make_model(family.name)
    pool = ExpertPool.load(folders[:-1] if family.moe else folders)  # the last is of such
    sites = {e.name: set(resolve(e, base).expert.modules) for e in pool}
    weights = {f.name: merged(family, f).state_dict() for f in folders if f.name in pool.names}
    with torch.no_grad():
        for name, parameter in wanted.named_parameters():
            module = name.rpartition(".")[0]
            users = [weights[e][name] for e in pool.names if module in sites[e]]
            if users:
                parameter.copy_(torch.stack(users).mean(0))
    route(base, pool, "uniform", top_k="all")
    assert_near(logits(base), logits(wanted), 3e-5)


def test_a_merge_is_the_sum_of_their_weights(untied, tmp_path):
    family, folders = untied
    pool = ExpertPool.load(folders[:-1] if family.moe else folders)
    with pytest.raises(UnsupportedAdapterError, match="depends on the base"):
        merge_experts(pool)
    base, wanted = make_model(family.name), make_model(family.name)
    weights = [merged(family, f).state_dict() for f in folders if f.name in pool.names]
    with torch.no_grad():
        for name, parameter in wanted.named_parameters():
            differences = [each[name] - parameter for each in weights]
            parameter += torch.stack(differences).mean(0)
    one = save_expert(merge_experts(pool, base=base), tmp_path / "one")
    assert_near(by_peft(family, one), logits(wanted), 3e-5)
    route(base, ExpertPool.load([one]), "uniform")
    assert_near(logits(base), logits(wanted), 3e-5)


def test_each_token_mixes_what_its_experts_give(untied):
    """Under top-2, every site gives base + sum of w (expert - base), by PEFT's own modules."""
    family, folders = untied
    model, pool = make_model(family.name), ExpertPool.load(folders)
    experts = {folder.name: merged(family, folder) for folder in folders}
    calls = {}
    modules = {name for expert in pool for name in expert.modules}

    def keep(name, place):
        def hook(layer, args, kwargs, output):
            given = calls.setdefault(name, {})
            given[place] = (args, kwargs, output.detach().clone())

        return hook

    for name in modules:
        model.get_submodule(name).register_forward_hook(keep(name, "base"), with_kwargs=True)
    route(model, pool, top_k=2)
    for name in modules:
        model.get_submodule(name).register_forward_hook(keep(name, "routed"), with_kwargs=True)
    batch = make_batch(model, [5, 5])
    with torch.no_grad(), record(model) as trace:
        model(**batch)
        for name in sorted(modules):
            args, kwargs, base = calls[name]["base"]
            flat = base.reshape(-1, base.shape[-1])
            wanted = flat.clone()
            for number, expert in enumerate(pool.names):
                mine = trace_weight(trace, name, number)
                if not mine.any():
                    continue
                other = experts[expert].get_submodule(name)(*args, **kwargs)
                wanted += mine.unsqueeze(-1) * (other.reshape(flat.shape) - flat)
            assert_near(calls[name]["routed"][2].reshape(flat.shape), wanted, 1e-5)


def trace_weight(trace, module, expert):
    """How much each token takes of one expert; read while recording."""
    (_, _, routing) = trace._seen[module][-1]
    return (routing.weights * (routing.experts == expert)).sum(-1)


@pytest.mark.parametrize("router", ["phatgoose", "uniform", "adapter_evidence"])
def test_an_output_head_is_routed_and_recorded_by_its_last_tokens(router, tmp_path):
    """`generate` asks the head for the last token alone, which has a context all the same."""
    family = Family("llama")
    model = make_model(family.name)
    for number, kind in enumerate(["head", "saved embedding and head", "dora"]):
        folder = make_adapter(tmp_path / f"e{number}", family, VARIANTS[kind](family), seed=number)
        save_gates(folder, model, seed=number)
    route(model, ExpertPool.load(tmp_path), router)
    ids = make_batch(model, [5, 5])["input_ids"]
    with record(model) as trace:
        model.generate(ids, max_new_tokens=3, do_sample=False)
    assert trace.streams["lm_head"] == "head"
    assert len(trace.experts["lm_head"]) == 2 * 3
    assert trace.tokens["head"].position.tolist() == [4, 4, 5, 5, 6, 6]
    with record(model) as trace, torch.no_grad():
        model(ids)
    assert trace.streams["lm_head"] == "decoder" and len(trace.experts["lm_head"]) == 2 * 5


def test_routers_by_singular_vectors_say_what_to_do(tmp_path):
    family = Family("llama")
    make_adapter(tmp_path / "e", family, VARIANTS["dora"](family))
    with pytest.raises(UnsupportedAdapterError, match="plain LoRA only.*Choose adapter_evidence"):
        route(make_model(family.name), ExpertPool.load(tmp_path), "arrow")
