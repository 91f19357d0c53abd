"""LoRA that is computed around lora_B, where a gate cannot be: found out before the first step."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from phatgoose import train_gates
from phatgoose.errors import TrainingError, UnsupportedAdapterError
from phatgoose.tasks import Encoded
from phatgoose.train import AdapterTraining, adapters, train_adapter
from phatgoose.train.gated_adapter import GatedAdapter
from tests.train.toys import llama, make, make_batches, same

NAME = "model.layers.0.self_attn.q_proj"


def halves(layer):
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


def delta(layer, x):
    a, b = halves(layer)
    return (x @ a.T) @ b.T * layer.scaling["default"]


def patch_layer(layer):
    """The layer's own forward, by the weights."""
    layer.forward = lambda x: layer.base_layer(x) + delta(layer, x)


class Fused(torch.autograd.Function):
    """A kernel of its own, whose gradients torch does not see through."""

    @staticmethod
    def forward(ctx, x, a, b, scale):
        ctx.save_for_backward(x, a, b)
        ctx.scale = scale
        return (x @ a.T) @ b.T * scale

    @staticmethod
    def backward(ctx, grad):
        x, a, b = ctx.saved_tensors
        grad = grad * ctx.scale
        rows, wanted = x.flatten(0, -2), grad.flatten(0, -2)
        return grad @ b @ a, (wanted @ b).T @ rows, wanted.T @ (rows @ a.T), None


def patch_kernel(layer):
    layer.forward = lambda x: (
        layer.base_layer(x) + Fused.apply(x, *halves(layer), layer.scaling["default"])
    )


def layers_of(model):
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and len(module.lora_A)
    }


def train(model, **settings):
    return train_gates(model, make_batches(2), steps=2, progress=False, **settings)


@pytest.mark.parametrize("patch", [patch_layer, patch_kernel])
@pytest.mark.parametrize("many", [False, True])
def test_patched_layers(patch, many):
    """One of them too: the loss would depend on the other gates, and this one would stay zero."""
    model = make()
    layers = layers_of(model)
    for layer in layers.values() if many else [layers[NAME]]:
        patch(layer)
    with pytest.raises(TrainingError, match=NAME + ".*without calling lora_B.*unsloth"):
        train(model)
    for name, parameter in model.named_parameters():
        assert parameter.grad is None
        assert parameter.requires_grad == ("lora_" in name)


def test_a_fused_parent():
    """An MLP that never calls its layers, as unsloth's does not."""
    model = make(target_modules=["gate_proj", "up_proj", "down_proj", "q_proj"])
    mlp = model.get_base_model().model.layers[1].mlp

    def forward(x):
        def linear(layer, x):
            return x @ layer.base_layer.weight.T + delta(layer, x)

        return linear(mlp.down_proj, mlp.act_fn(linear(mlp.gate_proj, x)) * linear(mlp.up_proj, x))

    mlp.forward = forward
    with pytest.raises(TrainingError, match=r"layers\.1\.mlp.* and 2 more layers compute"):
        train(model)


def test_a_layer_that_no_batch_reaches_is_no_fault(monkeypatch):
    """An expert of a mixture that gets no token: its gate stays zero, the others are as ever."""
    found = []
    for looks in (True, False):
        if not looks:
            monkeypatch.setattr(GatedAdapter, "check_reached", lambda *_: None)
        model = make()
        model.get_base_model().model.layers[0].mlp.forward = torch.zeros_like
        found.append(train(model))
    assert same(found[0].vectors, found[1].vectors)
    for name, vector in found[0].vectors.items():
        assert vector.any() != name.startswith("model.layers.0.mlp."), name


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # the inner ones
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_within_checkpoints(reentrant):
    """A block of the user's own inside those of transformers."""
    plain, nested = make(), make()
    wanted = train(plain)
    base = nested.get_base_model()
    base.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for layer in base.model.layers:
        forward = layer.mlp.forward
        layer.mlp.forward = lambda x, forward=forward: checkpoint(
            forward, x, use_reentrant=reentrant
        )
    gates = train(nested)
    for name, vector in gates.vectors.items():
        torch.testing.assert_close(vector, wanted.vectors[name], rtol=1e-4, atol=1e-6)


def test_a_target_without_gates_is_refused_before_the_adapter_is_trained(tmp_path, monkeypatch):
    def fails(*_):
        raise AssertionError("it is trained")

    monkeypatch.setattr("transformers.Trainer.train", fails)
    settings = AdapterTraining(target_modules=["embed_tokens"], steps=1)
    rows = [Encoded([3, 4, 5], [6, 1])]
    with pytest.raises(UnsupportedAdapterError, match="LoRA on the embedding"):
        train_adapter(llama(), rows, tmp_path / "new", settings, pad=0, progress=False)

    def unreadable(_):
        raise UnsupportedAdapterError("not a plain LoRA")

    monkeypatch.setattr(adapters, "read_adapter", unreadable)
    settings = AdapterTraining(target_modules=["q_proj"], steps=1)
    with pytest.raises(UnsupportedAdapterError, match="not a plain LoRA"):
        train_adapter(llama(), rows, tmp_path / "new", settings, pad=0, progress=False)
    assert not (tmp_path / "new").exists()
