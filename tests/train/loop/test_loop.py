"""The loop over toy parameters: each expert clipped, stopped and named for itself."""

from itertools import repeat

import pytest
import torch
from accelerate import Accelerator

from phatgoose.errors import TrainingError
from phatgoose.train.loop.loop import Loop, Optimisation, Pass
from phatgoose.train.loop.packed import Packed

CPU = torch.device("cpu")
NAMES = ["one", "two", "three"]


def train(losses, steps=3, clip=1.0, rate=0.1, **how):
    """Train a weight [3, 2, 2] and a bias [3, 2] on `losses(weight, bias)`; what became of them."""
    packed = Packed({"weight": (CPU, (2, 2)), "bias": (CPU, (2,))}, len(NAMES))
    packed.parameters["weight"].data += torch.arange(12.0).view(3, 2, 2) + 1
    settings = Optimisation(
        steps=steps, rate=lambda step: rate / (step + 1), max_grad_norm=clip, weight_decay=0.1
    )
    forward = lambda _: Pass(  # noqa: E731
        losses(**packed.parameters), [1, 2, 3], torch.tensor([4, 5, 6])
    )
    loop = Loop(packed, settings, Accelerator(), names=NAMES)
    done = loop.train(repeat(None), forward, identity={}, checkpoint=None, progress=False, **how)
    return {name: value.detach().clone() for name, value in packed.parameters.items()}, done


def bowl(weight, bias):
    """Slopes of very different sizes."""
    size = torch.tensor([1e-3, 1.0, 1e3])
    return size * (weight.pow(2).sum((1, 2)) + (bias - 1).pow(2).sum(1))


@pytest.mark.parametrize("clip", [0.5, 1e9])
def test_each_expert_is_trained_as_if_alone(clip):
    found, done = train(bowl, clip=clip)
    for expert in range(3):
        weight = torch.arange(12.0).view(3, 2, 2)[expert] + 1
        alone = [weight.requires_grad_(), torch.zeros(2, requires_grad=True)]
        optimizer = torch.optim.AdamW(alone, weight_decay=0.1)
        for step in range(3):
            optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
            optimizer.zero_grad()
            bowl(*(torch.stack([p] * 3) for p in alone))[expert].backward()
            torch.nn.utils.clip_grad_norm_(alone, clip)
            optimizer.step()
        for name, wanted in zip(("weight", "bias"), alone, strict=True):
            torch.testing.assert_close(found[name][expert], wanted.detach())
    assert (done.step, done.examples, done.tokens) == (3, [3, 6, 9], [12, 15, 18])


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda x: x * torch.nan, "two: the loss is nan at step 1"),
        (lambda x: torch.sqrt(x * 0), "two: the gradient's norm is nan at step 1"),
    ],
)
def test_a_bad_expert_is_named(spoil, says):
    def losses(weight, bias):
        one, two, three = bowl(weight, bias)
        return torch.stack([one, spoil(two), three])

    with pytest.raises(TrainingError, match=says):
        train(losses)


def test_all_bad_experts_are_named():
    with pytest.raises(TrainingError, match="^one, two, three: the loss is inf"):
        train(lambda weight, bias: bowl(weight, bias) * torch.inf)


def test_parameters_on_one_device_are_one_vector():
    packed = Packed({"weight": (CPU, (2, 3)), "bias": (CPU, (2,))}, 4)
    assert [tuple(vector.shape) for vector in packed.vectors] == [(4 * 8,)]
    assert {name: tuple(p.shape) for name, p in packed.parameters.items()} == {
        "weight": (4, 2, 3),
        "bias": (4, 2),
    }
    packed.zero_grad()
    packed.parameters["bias"].sum().backward()
    assert packed.gradients[0].tolist() == [0.0] * 24 + [1.0] * 8
    packed.vectors[0].data.fill_(2)
    assert bool((packed.parameters["weight"] == 2).all())
