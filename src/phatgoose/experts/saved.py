"""Whole parameters of a module: modules_to_save, and biases that were trained."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from phatgoose.errors import UnsupportedAdapterError
from phatgoose.experts.base import linear_sizes
from phatgoose.experts.delta import Delta, OnBase
from phatgoose.experts.differences import (
    BIAS,
    WEIGHT,
    EmbeddingDifference,
    LinearDifference,
    ModuleDifference,
)
from phatgoose.experts.layers import difference, embed_scale_of, is_transposed


@final
@dataclass(frozen=True)
class SavedModule(OnBase):
    """A linear layer's, a norm's or an embedding's own parameters, or its bias alone.

    It adds what the module computes with these and does not with the base's.
    """

    listed: bool = True  # in modules_to_save; if not, PEFT changes what is tied to it as well

    kind: ClassVar[str] = "a module saved whole (modules_to_save, or a trained bias)"
    keys: ClassVar[frozenset[str]] = frozenset()
    optional: ClassVar[frozenset[str]] = frozenset({WEIGHT, BIAS})
    fields: ClassVar[Mapping[str, Any]] = {"modules_to_save": []}
    targeted: ClassVar[bool] = False
    place: ClassVar[str] = "module"

    @classmethod
    def fits(cls, keys: frozenset[str], module: str, config: Mapping[str, Any]) -> bool:
        return bool(keys) and keys <= cls.optional

    @classmethod
    def read(cls, tensors: Mapping[str, Tensor], scale: float) -> Delta:
        weight = tensors.get(WEIGHT)
        width = 0 if weight is None else weight.shape[-1]
        return cls(torch.zeros(0, width), torch.zeros(width, 0), 1.0, dict(tensors))

    @classmethod
    def read_of(
        cls, tensors: Mapping[str, Tensor], scale: float, module: str, config: Mapping[str, Any]
    ) -> Delta:
        names = config.get("modules_to_save") or []
        listed = any(module.endswith(name) for name in names if isinstance(name, str))
        return replace(cls.read(tensors, scale), listed=listed)  # type: ignore[call-arg]

    @property
    def gate_features(self) -> int | None:
        """Unknown for a bias, and for a matrix that may be [in, out]."""
        weight = self.tensors.get(WEIGHT)
        known = weight is not None and (weight.dim() == 1 or weight.shape[0] == weight.shape[1])
        return self.in_features if known else None

    def setting(self, module: str) -> Mapping[str, Any]:
        if WEIGHT not in self.tensors:
            return {"bias": "all"}
        return {"modules_to_save": [module]} if self.listed else {}

    def problem(self, layer: nn.Module) -> str | None:
        for name in self.tensors:
            if layer._parameters.get(name) is None:
                kind = type(layer).__name__
                return f"is saved whole with a {name}, and the base's {kind} has none"
        return None

    def on(self, layer: nn.Module, who: str) -> Delta:
        changed = {
            name: difference(layer, name, tensor, who) for name, tensor in self.tensors.items()
        }
        sizes = linear_sizes(layer)
        if sizes is not None:
            if WEIGHT in changed and is_transposed(layer):
                changed[WEIGHT] = changed[WEIGHT].T
            return LinearDifference(*nothing(*sizes), 1.0, changed)
        if isinstance(layer, nn.Embedding):
            rows = changed[WEIGHT] * embed_scale_of(layer)
            return EmbeddingDifference(*nothing(rows.shape[1]), 1.0, {WEIGHT: rows})
        if not is_norm(layer):
            raise UnsupportedAdapterError(
                f"{who}: saves a {type(layer).__name__} whole, which is neither a linear layer "
                "nor an embedding nor a norm. Train it without that one in modules_to_save."
            )
        width = next(iter(changed.values())).shape[-1]
        return ModuleDifference(*nothing(width), 1.0, changed)

    def also(self, module: str, model: nn.Module) -> Mapping[str, Delta]:
        if self.listed:
            return {}
        return tied_to(module, model, self.tensors.get(WEIGHT), module)


def nothing(features: int, outputs: int | None = None) -> tuple[Tensor, Tensor]:
    """Factors of rank 0."""
    return torch.zeros(0, features), torch.zeros(features if outputs is None else outputs, 0)


def is_norm(layer: nn.Module) -> bool:
    """Whether it is a layer of its own whose parameters are vectors."""
    own = dict(layer.named_parameters())
    direct = {name for name, value in layer._parameters.items() if value is not None}
    return bool(own) and set(own) == direct and all(value.dim() == 1 for value in own.values())


def tied_to(
    module: str, model: nn.Module, weight: Tensor | None, who: str
) -> Mapping[str, "SavedModule"]:
    """The modules whose weight is `module`'s, with the one that PEFT loads into both.

    Nothing, where it is the base's own.
    """
    layer: Any = model.get_submodule(module)
    if weight is None or not torch.any(difference(layer, WEIGHT, weight, who)):
        return {}
    saved: Any = SavedModule.read({WEIGHT: weight}, 1.0)
    return {
        name: saved
        for name, other in model.named_modules()
        if other is not layer and getattr(other, WEIGHT, None) is layer.weight
    }
