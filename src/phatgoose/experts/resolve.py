"""What an expert comes to on one base, whose weights some kinds of adapters depend on."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import nn

from phatgoose.errors import IncompatibleExpertError
from phatgoose.experts.base import base_name
from phatgoose.experts.delta import Delta
from phatgoose.experts.expert import Expert


@dataclass(frozen=True)
class Resolved:
    """An expert with its modules as they are on a base."""

    expert: Expert
    signed_by: Mapping[str, str]  # by module, the one whose signature is its own, if another


def resolve(expert: Expert, model: nn.Module) -> Resolved:
    """The expert with what its adapter comes to on each layer of `model`.

    Raises IncompatibleExpertError where the base has not such layers, and UnsupportedAdapterError
    where it does not tell its weights.
    """
    layers = modules_of(model)
    modules: dict[str, Delta] = {}
    signed_by = {}
    for name, delta in expert.modules.items():
        if name not in layers:
            raise IncompatibleExpertError(f"{expert.name}: adapts {name}, which the base lacks.")
        modules[name] = delta.on(layers[name], f"{expert.name} at {name}")
        for other, more in delta.also(name, model).items():
            if other not in expert.modules:
                modules[other] = more.on(layers[other], f"{expert.name} at {other}")
                signed_by[other] = name
    return Resolved(replace(expert, modules=modules), signed_by)


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """The base's modules by name, as if there were no PEFT layers in it."""
    return {
        base_name(path): module
        for path, module in model.named_modules()
        if not hasattr(module, "base_layer")
    }
