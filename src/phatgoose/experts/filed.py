"""Differences on a base put back into what a file can hold, for adapters made of others."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from phatgoose.errors import UnsupportedAdapterError
from phatgoose.experts.delta import Delta
from phatgoose.experts.differences import (
    BIAS,
    DOWN,
    FACTOR,
    UP,
    WEIGHT,
    Difference,
    EmbeddingDifference,
    LinearDifference,
)
from phatgoose.experts.layers import embed_scale_of, weight_of
from phatgoose.experts.lora_parts import LORA_BIAS, LoraParts
from phatgoose.experts.low_rank import LoraModule
from phatgoose.experts.saved import SavedModule


def summable(delta: Delta, layer: nn.Module, who: str) -> Delta:
    """The same difference in tensors whose sum over adapters is the difference of the sum.

    Raises UnsupportedAdapterError for LoRA on batched experts, whose sum no file can hold.
    """
    if isinstance(delta, EmbeddingDifference):
        rows = torch.zeros_like(weight_of(layer, who))
        rest = delta.rest
        if DOWN in rest:
            rows = rows + rest[DOWN] @ rest[UP]
        if WEIGHT in rest:
            rows = rows + rest[WEIGHT]
        if FACTOR in rest:
            rows = rows + rest[FACTOR] * weight_of(layer, who) * embed_scale_of(layer)
        return EmbeddingDifference(delta.a, delta.b, 1.0, {WEIGHT: rows})
    if isinstance(delta, Difference) and any(":" in key for key in delta.rest):
        raise UnsupportedAdapterError(
            f"{who}: is LoRA on batched experts of a mixture, whose sum no adapter can hold. Route "
            "it instead, or leave the expert out of the merge."
        )
    return delta


def filed(delta: Delta, layer: nn.Module, who: str) -> Delta:
    """The kind of adapter that adds this difference on the base, as a file holds it.

    At a linear layer that is a LoRA, of full rank where the difference has one: PEFT loads it, and
    it does not depend on the base. Norms and embeddings are saved whole.
    """
    if not isinstance(delta, Difference):
        return delta
    if not isinstance(delta, LinearDifference):
        return _saved(
            {name: _stored(layer, name, rest) for name, rest in delta.rest.items()}, layer
        )
    rest, a, b, scale = delta.rest, delta.a, delta.b, delta.scale
    bias = rest.get(BIAS)
    if FACTOR in rest or WEIGHT in rest:
        weight = weight_of(layer, who)
        a, b = (half.to(weight.device).float() for half in (a, b))
        change = scale * (b @ a) + rest.get(WEIGHT, 0) + _times(rest.get(FACTOR), weight)
        a, b, scale = *_whole(change.cpu()), 1.0
        own = getattr(layer, BIAS, None)
        if FACTOR in rest and isinstance(own, Tensor):
            more = rest[FACTOR] * own.detach().float()
            bias = more if bias is None else bias + more
    if bias is None or not torch.any(bias):
        return LoraModule(a, b, scale)
    return LoraParts(a, b, scale, {LORA_BIAS: bias.cpu() / scale})


def alike(modules: Mapping[str, Delta]) -> dict[str, Delta]:
    """The modules with a bias of zero at every LoRA, where some have one: PEFT has all or none."""
    if not any(isinstance(delta, LoraParts) for delta in modules.values()):
        return dict(modules)
    return {
        name: LoraParts(d.a, d.b, d.scale, {LORA_BIAS: torch.zeros(d.out_features)})
        if isinstance(d, LoraModule)
        else d
        for name, d in modules.items()
    }


def _whole(change: Tensor) -> tuple[Tensor, Tensor]:
    """Two factors of a matrix, itself and the identity, the smaller one."""
    outputs, inputs = change.shape
    if outputs < inputs:
        return change, torch.eye(outputs)
    return torch.eye(inputs), change


def _saved(tensors: dict[str, Tensor], layer: nn.Module) -> Delta:
    if isinstance(layer, nn.Embedding):
        own = layer.weight.detach().float().cpu()
        tensors = {WEIGHT: own + (tensors[WEIGHT] - own) / embed_scale_of(layer)}
    return SavedModule.read(tensors, 1.0)


def _stored(layer: nn.Module, name: str, change: Tensor) -> Tensor:
    own: Tensor = getattr(layer, name)
    return (own.detach().float() + change.to(own.device)).cpu()


def _times(factor: Tensor | None, weight: Tensor) -> Tensor:
    if factor is None:
        return torch.zeros_like(weight)
    return factor.to(weight.device).view(-1, *[1] * (weight.dim() - 1)) * weight
