"""A routed layer in every mode a torch module can be used in."""

import copy
import io
import pickle

import pytest
import torch
from peft import PeftModel

from phatgoose import record, restrict, route, unroute
from phatgoose.errors import RoutingError
from phatgoose.nn import Bank
from tests.models import make_batch
from tests.routers.counting import CountingRouter
from tests.tolerances import TOLERANCE, assert_near

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing")  # its old name

FAMILIES = ["llama", "gpt2", "t5"]


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def banks(model):
    return [module for module in model.modules() if isinstance(module, Bank)]


def test_only_adapted_layers_are_touched(model_and_pool):
    model, pool = model_and_pool("llama", 3)
    pool.remove("e0")  # the one that adapts every layer
    route(model, pool)
    adapted = set(pool["e1"].modules) | set(pool["e2"].modules)
    touched = {
        name
        for name, module in model.named_modules()
        if module._forward_hooks and module not in (model, model.model)
    }
    assert touched == adapted


@pytest.mark.parametrize("favourite", range(4))
def test_a_prior_is_for_the_experts_it_names(favourite, model_and_pool):
    """At every layer, whichever experts adapt it and whichever are allowed."""

    class Favour(CountingRouter):
        def prior(self, context, experts):
            prior = torch.zeros(context.batch * context.length, len(experts))
            prior[:, favourite] = 100.0
            return prior

    model, pool = model_and_pool()
    route(model, pool, Favour())
    name = pool.names[favourite]
    for allowed in (pool.names, [*pool.names[2:], name]):
        with restrict(model, allowed), record(model) as trace:
            logits(model, make_batch(model, [3]))
        for module in pool[name].modules:
            assert trace.experts[module][:, 0].tolist() == [favourite] * 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("family", FAMILIES)
def test_cast_then_route_is_route_then_cast(family, dtype, model_and_pool):
    model, pool = model_and_pool(family)
    batch = make_batch(model, [4, 7])
    early = route(copy.deepcopy(model).to(dtype), pool)
    late = route(model, pool).to(dtype)
    for bank in banks(late):
        assert bank.signatures.dtype == torch.float32
        assert {bank.b(part).dtype for part in range(bank.parts)} == {bank.a.dtype} == {dtype}
    found = logits(late, batch)
    assert found.dtype == dtype
    assert torch.equal(found, logits(early, batch))


def test_output_keeps_the_layer_s_dtype_under_autocast(model_and_pool):
    model, pool = model_and_pool()
    route(model, pool)
    seen = []
    layer = model.get_submodule("model.layers.0.self_attn.q_proj")
    layer.register_forward_hook(lambda *args: seen.append(args[-1].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        logits(model, make_batch(model, [4, 7]))
    assert seen == [torch.bfloat16]


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_the_plain_adapter(family, model_and_pool):
    model, pool = model_and_pool(family)
    batch = make_batch(model, [4, 7])
    peft = PeftModel.from_pretrained(copy.deepcopy(model), pool["e1"].folder).get_base_model()
    route(model, pool)
    slope = torch.randn(logits(model, batch).shape, generator=torch.Generator().manual_seed(0))
    with restrict(model, ["e1"]):
        (model(**batch).logits * slope).sum().backward()
    peft.requires_grad_(True)
    (peft(**batch).logits * slope).sum().backward()
    wanted = {
        name.replace(".base_layer", ""): parameter.grad
        for name, parameter in peft.named_parameters()
    }
    for name, parameter in model.named_parameters():
        assert_near(parameter.grad, wanted[name], TOLERANCE[torch.float32].delta)


def test_gradient_checkpointing_gives_the_same_gradients(model_and_pool):
    model, pool = model_and_pool()
    batch = make_batch(model, [4, 7])
    route(model, pool).train()
    grown = []
    for switch in (model.gradient_checkpointing_disable, model.gradient_checkpointing_enable):
        switch()
        model.zero_grad()
        model(**batch).logits.square().mean().backward()
        grown.append([parameter.grad.clone() for parameter in model.parameters()])
    for found, wanted in zip(*grown, strict=True):
        assert_near(found, wanted, TOLERANCE[torch.float32].output)


def test_gradient_checkpointing_with_a_prior_is_refused(model_and_pool):
    model, pool = model_and_pool()
    route(model, pool, CountingRouter()).train()
    model.gradient_checkpointing_enable()
    loss = model(**make_batch(model, [4, 7])).logits.sum()
    with pytest.raises(RoutingError, match="gradient checkpointing"):
        loss.backward()


def test_inference_mode_leaves_the_model_trainable(model_and_pool):
    model, pool = model_and_pool()
    batch = make_batch(model, [4, 7])
    wanted = logits(route(model, pool), batch)
    with torch.inference_mode():
        found = model(**batch).logits
    assert torch.equal(found, wanted)
    model(**batch).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_training_and_evaluation_route_alike(model_and_pool):
    model, pool = model_and_pool()  # without dropout
    batch = make_batch(model, [4, 7])
    route(model, pool)
    assert torch.equal(logits(model.train(), batch), logits(model.eval(), batch))


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved_by_torch(model):
    torch.save(model, file := io.BytesIO())
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("make_copy", [copy.deepcopy, pickled, saved_by_torch])
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_routed_model_is_not_copied(family, make_copy, model_and_pool):
    model, pool = model_and_pool(family)
    batch = make_batch(model, [4, 7])
    plain = logits(model, batch)
    route(model, pool)
    for part in (model, model.get_decoder(), next(iter(pool["e0"].modules))):
        part = model.get_submodule(part) if isinstance(part, str) else part
        with pytest.raises(RoutingError, match=r"neither copied nor pickled.*unroute\(model\)"):
            make_copy(part)
    copied = make_copy(unroute(model))
    assert torch.equal(logits(copied, batch), plain)
    assert torch.equal(logits(route(copied, pool), batch), logits(route(model, pool), batch))
