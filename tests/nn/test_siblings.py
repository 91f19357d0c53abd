"""Layers that read one input share a bank, and nothing a layer gives tells whether they do."""

import contextlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import BertConfig, BertLMHeadModel

from phatgoose import ExpertPool, record, restrict, route
from phatgoose.nn import Bank, group_siblings
from phatgoose.nn.siblings import CROSS_ATTENTION, SIBLINGS
from phatgoose.nn.site import Site
from phatgoose.pool import routed_model
from tests.models import LINEARS, make_batch, make_model, save_experts
from tests.tolerances import TOLERANCE, assert_near

NEAR = TOLERANCE[torch.float32].output
ATTENTION = "model.layers.0.self_attn."
QKV = ("q_proj", "k_proj", "v_proj")
# No expert adapts all; one adapts a single layer, one the layer that is nobody's sibling.
SOME = [("q_proj", "v_proj"), ("k_proj",), ("k_proj", "v_proj"), ("v_proj", "o_proj")]
CALLS = [(*QKV, "gate_proj", "up_proj"), *SOME]


# ---------------------------------------------------------------- which layers those are


def make_bert():
    """With cross-attention, whose layers are called as those of its self-attention are."""
    config = BertConfig(
        vocab_size=53,
        hidden_size=24,
        intermediate_size=31,
        num_hidden_layers=2,
        num_attention_heads=3,
        is_decoder=True,
        add_cross_attention=True,
    )
    return BertLMHeadModel(config).eval()


@pytest.mark.parametrize("family", [*LINEARS, "bert"])
def test_siblings_read_the_very_same_tensor_and_others_do_not(family):
    model = make_bert() if family == "bert" else make_model(family)
    batch = make_batch(model, [4, 7])
    if family == "bert":
        batch["encoder_hidden_states"] = torch.randn(2, 5, 24)
    leaves = LINEARS.get(family, ("query", "key", "value", "dense"))
    read = {}
    for name, layer in model.named_modules():
        if name.rpartition(".")[2] in leaves:
            layer.register_forward_pre_hook(
                lambda _, inputs, name=name: read.update({name: inputs[0]})
            )
    model(**batch)
    wanted, order = {}, [*read]  # they ran in this order
    for name, x in read.items():
        wanted.setdefault((name.rpartition(".")[0], id(x)), []).append(name)
    assert sorted(group_siblings(sorted(order))) == sorted(map(tuple, wanted.values()))


def test_the_rest_of_the_name_tells_the_groups_apart():
    names = [f"h.{i}.{kind}.{leaf}" for i in (0, 1) for kind in "ab" for leaf in ("v", "k", "q")]
    groups = [tuple(f"h.{i}.{kind}.{leaf}" for leaf in "qkv") for i in (0, 1) for kind in "ab"]
    assert group_siblings(names) == groups
    assert group_siblings(["q", "wi_1", "v", "q_proj"]) == [("q", "v"), ("wi_1",), ("q_proj",)]
    assert group_siblings([]) == []


LEAVES = [leaf for known in SIBLINGS for leaf in known]
NAMES = st.lists(
    st.lists(st.sampled_from(["a", "b", *CROSS_ATTENTION]), max_size=2).flatmap(
        lambda parents: st.sampled_from([*LEAVES, "o", "fc"]).map(
            lambda leaf: ".".join([*parents, leaf])
        )
    ),
    unique=True,
)


@given(NAMES)
def test_groups_partition_the_names(names):
    groups = group_siblings(names)
    assert sorted(name for group in groups for name in group) == sorted(names)
    for group in groups:
        assert len({name.rpartition(".")[0] for name in group}) == 1
        leaves = [name.rpartition(".")[2] for name in group]
        if len(group) > 1:
            (known,) = [known for known in SIBLINGS if leaves[0] in known]
            assert leaves == [leaf for leaf in known if leaf in leaves]


@given(NAMES, st.randoms(use_true_random=False))
def test_the_order_of_the_names_only_orders_the_groups(names, random):
    mixed = random.sample(names, len(names))
    assert sorted(group_siblings(mixed)) == sorted(group_siblings(names))


# ---------------------------------------------------------------- the same, banks shared or not


@contextlib.contextmanager
def no_siblings():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(routed_model, "group_siblings", lambda names: [(name,) for name in names])
        yield


def make_two(family, folders, **settings):
    """Routed models alike, but that in the second no layers share a bank; and their pools."""
    pools = [ExpertPool.load(folders) for _ in range(2)]
    shared = route(make_model(family), pools[0], **settings)
    with no_siblings():
        single = route(make_model(family), pools[1], **settings)
    parts = [max(bank.parts for bank in banks(model)) for model in (shared, single)]
    assert parts[0] > 1 == parts[1]
    return shared, single, pools


@pytest.mark.parametrize("settings", [{}, {"top_k": 3, "null_score": 0.1, "capacity": 7}])
@pytest.mark.parametrize("family", ["llama", "t5", "t5-gated"])
def test_the_same_logits_and_trace(family, settings, saved_experts):
    shared, single, _ = make_two(family, saved_experts(family, 4), **settings)
    batch = make_batch(shared, [4, 7])
    found = []
    for model in (shared, single):
        with record(model) as trace, torch.no_grad():
            found.append((model(**batch).logits, trace))
    assert_near(found[0][0], found[1][0], NEAR)
    assert found[0][1].experts.keys() == found[1][1].experts.keys()
    for module, chosen in found[0][1].experts.items():
        assert torch.equal(chosen, found[1][1].experts[module])


def test_experts_that_adapt_some_of_the_siblings(tmp_path):
    """Now these, now others, in a bank that was there before or in a new one."""
    folders = save_experts(tmp_path, make_model("llama"), SOME)
    shared, single, pools = make_two("llama", [folders[0], folders[3]])
    batch = make_batch(shared, [4, 7])

    def compare():
        logits = []
        for model in (shared, single):
            with torch.no_grad():
                logits.append(model(**batch).logits)
            assert_near(model(**batch).logits, logits[-1], NEAR)  # gradients wanted
        assert_near(*logits, NEAR)

    compare()
    for change, which in (("add", 1), ("add", 2), ("remove", 0), ("remove", 1), ("add", 0)):
        for pool in pools:
            if change == "add":
                pool.add(folders[which])
            else:
                pool.remove(f"e{which}")
        compare()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folders = save_experts(tmp_path_factory.mktemp("calls"), make_model("llama"), CALLS)
    return make_two("llama", folders), folders


@pytest.fixture
def two(made):
    """Two models, as `make_two` makes them, in which no input is on its way through a bank."""
    for model in made[0][:2]:
        model._phatgoose.state.forward().shared.clear()
    return made


def banks(model):
    return [module for module in model.modules() if isinstance(module, Bank)]


@given(
    st.lists(
        st.one_of(
            st.tuples(st.sampled_from(QKV), st.integers(0, 2), st.booleans()),  # call a layer
            st.tuples(st.just("write"), st.integers(0, 2)),  # to an input, in place
            st.sampled_from([("allow", ("e0", "e1")), ("allow", ("e2",)), ("allow", ())]),
            st.sampled_from([("remove",), ("add",)]),
            st.just(("forward",)),  # of the whole model
        ),
        max_size=12,
    )
)
def test_layers_called_one_by_one_in_any_order(made, actions):
    (shared, single, pools), folders = made
    random = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, 3, 24, generator=random) for _ in range(2)]
    inputs.append(inputs[0][:])  # the same memory as another tensor
    batch = make_batch(shared, [3])
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: [pool.add(folders[4]) for pool in pools if len(pool) < 5])
        for kind, *what in actions:
            if kind == "write":
                inputs[what[0]].neg_()
            elif kind == "allow":
                for model in (shared, single):
                    stack.enter_context(restrict(model, what[0]))
            elif kind == "add":
                for pool in pools:
                    if len(pool) < 5:
                        pool.add(folders[4])
            elif kind == "remove":
                for pool in pools:
                    if len(pool) == 5:
                        with contextlib.suppress(KeyError):
                            pool.remove("e4")
            elif kind == "forward":
                compare([model(**batch).logits for model in (shared, single)])
            else:
                which, gradients = what
                with torch.set_grad_enabled(gradients):
                    layers = [model.get_submodule(ATTENTION + kind) for model in (shared, single)]
                    compare([layer(inputs[which]) for layer in layers])


def compare(outputs):
    assert outputs[0].requires_grad == outputs[1].requires_grad
    assert_near(*outputs, NEAR)


def attention(model):
    return [model.get_submodule(ATTENTION + leaf) for leaf in QKV]


@contextlib.contextmanager
def routings_counted():
    """A list that gets the parts of every routing."""
    counted, original = [], Site._route

    def counting(self, forward, x, parts):
        counted.append(parts)
        return original(self, forward, x, parts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Site, "_route", counting)
        yield counted


def test_a_forward_routes_once_for_all_siblings(two):
    (shared, single, _), _ = two
    batch = make_batch(shared, [4, 7])
    for model in (shared, single):
        for gradients in (False, True, False):
            with routings_counted() as counted, torch.set_grad_enabled(gradients):
                model(**batch)
            assert len(counted) == len(banks(model))


def test_siblings_share_again_after_one_of_them_was_called_alone(two):
    (shared, _, _), _ = two
    batch = make_batch(shared, [4, 7])
    with torch.no_grad():
        attention(shared)[0](torch.ones(1, 24))
        shared(**batch)
        with routings_counted() as counted:
            shared(**batch)
    assert len(counted) == len(banks(shared))


def test_siblings_still_share_after_one_of_them_lost_its_last_expert(tmp_path):
    folders = save_experts(
        tmp_path, make_model("llama", layers=1), [QKV, QKV, ("q_proj", "v_proj")]
    )
    pool = ExpertPool.load([folders[0], folders[2]])
    model = route(make_model("llama", layers=1), pool, top_k=1)
    batch = make_batch(model, [4])
    pool.remove("e0")  # nobody adapts k_proj any more
    for _ in range(3):
        with routings_counted() as counted, torch.no_grad():
            model(**batch)
        assert len(counted) == 1
    assert not model._phatgoose.state.forward().shared  # no input is kept


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, contextlib.nullcontext])
def test_an_input_written_to_between_siblings_is_routed_again(mode, two):
    (shared, single, _), _ = two
    with mode():
        x = torch.randn(2, 3, 24, generator=torch.Generator().manual_seed(0))
        for found, wanted in zip(attention(shared), attention(single), strict=True):
            assert_near(found(x), wanted(x), NEAR)
            x.mul_(-2).add_(0.3)


def test_gradients_are_those_of_layers_on_their_own(two):
    (shared, single, _), _ = two
    found = []
    for model in (shared, single):
        x = torch.randn(2, 3, 24, generator=torch.Generator().manual_seed(0), requires_grad=True)
        with torch.no_grad():
            attention(model)[0](x)  # for its value alone
        loss = sum(layer(x).square().sum() for layer in attention(model))
        parameters = [layer.weight for layer in attention(model)]
        found.append(torch.autograd.grad(loss, [x, *parameters]))
    for shared_grad, single_grad in zip(*found, strict=True):
        assert_near(shared_grad, single_grad, NEAR)


def test_a_sibling_that_wants_gradients_after_one_that_does_not(two):
    (shared, single, _), _ = two
    found = []
    for model in (shared, single):
        x = torch.randn(2, 3, 24, generator=torch.Generator().manual_seed(0), requires_grad=True)
        first, *others = attention(model)
        with torch.no_grad():
            first(x)
        outputs = [layer(x) for layer in others]
        found.append([*outputs, torch.autograd.grad(sum(map(torch.sum, outputs)), x)[0]])
    for each in zip(*found, strict=True):
        assert_near(*each, NEAR)


@pytest.mark.parametrize("trained", QKV)
def test_gradients_where_one_sibling_alone_is_trained(trained, two):
    """So that the others want no gradients, though they read the same input."""
    (shared, single, _), _ = two
    x = torch.randn(2, 3, 24, generator=torch.Generator().manual_seed(0))
    found = []
    for model in (shared, single):
        model.requires_grad_(False)
        try:
            weight = model.get_submodule(ATTENTION + trained).weight.requires_grad_()
            outputs = [layer(x) for layer in attention(model)]
            loss = sum(output.square().sum() for output in outputs)
            found.append([*outputs, *torch.autograd.grad(loss, [weight])])
        finally:
            model.requires_grad_(True)
    for each in zip(*found, strict=True):
        assert_near(*each, NEAR)


# ---------------------------------------------------------------- other people's hooks


@pytest.mark.parametrize("early", [True, False], ids=["before routing", "after routing"])
@pytest.mark.parametrize("gradients", [False, True])
def test_a_hook_that_keeps_the_base_output_finds_it_unchanged(gradients, early, model_and_pool):
    model, pool = model_and_pool()
    layer = model.get_submodule(ATTENTION + "q_proj")
    x = torch.randn(2, 3, 24, generator=torch.Generator().manual_seed(0))
    plain = layer(x).detach()
    kept = []

    def keep(_, __, output):
        kept.append(output)

    if early:
        layer.register_forward_hook(keep)
    route(model, pool)
    if not early:
        layer.register_forward_hook(keep, prepend=True)
    with torch.set_grad_enabled(gradients):
        found = layer(x)
    assert torch.equal(kept[0], plain)
    assert not torch.equal(found, plain)


def test_a_global_hook_that_keeps_the_base_output_finds_it_unchanged(model_and_pool):
    model, pool = model_and_pool()
    layer = model.get_submodule(ATTENTION + "q_proj")
    x = torch.randn(2, 3, 24, generator=torch.Generator().manual_seed(0))
    plain = layer(x).detach()
    route(model, pool)
    kept = []
    handle = nn.modules.module.register_module_forward_hook(lambda *args: kept.append(args[2]))
    try:
        with torch.no_grad():
            layer(x)
    finally:
        handle.remove()
    assert torch.equal(kept[0], plain)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("early", [True, False], ids=["before routing", "after routing"])
def test_a_hook_that_changes_the_input_changes_what_is_routed(early, gradients, saved_experts):
    """Of one layer alone: its siblings go on with the input as it was."""
    found = []
    for pad in (contextlib.nullcontext, no_siblings):
        model, pool = make_model("llama"), ExpertPool.load(saved_experts("llama", 4))
        layers = attention(model)
        x = torch.randn(2, 3, 24, generator=torch.Generator().manual_seed(0))

        def change(_, inputs):
            return (inputs[0].flip(-1) - 0.5,)

        with pad():
            if early:
                layers[0].register_forward_pre_hook(change)
            route(model, pool)
            if not early:
                layers[0].register_forward_pre_hook(change)
        with torch.set_grad_enabled(gradients):
            found.append([layer(x) for layer in layers])
    for each in zip(*found, strict=True):
        assert_near(*each, NEAR)
    plain = route(make_model("llama"), ExpertPool.load(saved_experts("llama", 4)))
    wanted = plain.get_submodule(ATTENTION + "q_proj")(x.flip(-1) - 0.5)
    assert_near(found[0][0], wanted, NEAR)
