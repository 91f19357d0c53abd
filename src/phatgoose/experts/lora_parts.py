"""LoRA on a linear layer that comes with more: DoRA, biases, a copy of the base's own weight."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from phatgoose.errors import IncompatibleExpertError, UnsupportedAdapterError
from phatgoose.experts.delta import LORA_A, LORA_B, Delta
from phatgoose.experts.differences import BIAS, FACTOR, WEIGHT, LinearDifference
from phatgoose.experts.initial import initial
from phatgoose.experts.layers import difference, is_transposed, weight_of
from phatgoose.experts.low_rank import LoraModule
from phatgoose.experts.saved import tied_to

LORA_BIAS, MAGNITUDE = "lora_B.bias", "lora_magnitude_vector"
BASE_WEIGHT, BASE_BIAS = "base_layer.weight", "base_layer.bias"
WORDS = {
    MAGNITUDE: "DoRA",
    LORA_BIAS: "a LoRA with a bias",
    BASE_BIAS: "a LoRA with the layer's bias",
    BASE_WEIGHT: "a LoRA with the layer's whole weight",
}


@final
@dataclass(frozen=True)
class LoraParts(Delta):
    """A LoRA and some of: DoRA's magnitude [O], lora_B's bias, the layer's own weight and bias.

    With the base's weight W, DoRA is m / ||W + s B A|| (W + s B A) x, of rows' norms
    (arXiv:2402.09353, section 4). PEFT saves the weight of a layer named lm_head or embed_tokens
    beside its LoRA. It is nearly always the base's own, and then makes no difference.
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    keys: ClassVar[frozenset[str]] = frozenset({LORA_A, LORA_B})
    optional: ClassVar[frozenset[str]] = frozenset(WORDS)
    fields: ClassVar[Mapping[str, Any]] = {"use_dora": True, "lora_bias": True}

    @property
    def kind(self) -> str:  # type: ignore[override]
        return " and ".join(words for key, words in WORDS.items() if key in self.tensors)

    @classmethod
    def read(cls, tensors: Mapping[str, Tensor], scale: float) -> Delta:
        more = {key: tensor for key, tensor in tensors.items() if key in cls.optional}
        return cls(tensors[LORA_A], tensors[LORA_B], scale, more)

    @classmethod
    def read_of(
        cls, tensors: Mapping[str, Tensor], scale: float, module: str, config: Mapping[str, Any]
    ) -> Delta:
        if initial(config) and MAGNITUDE in tensors:
            raise UnsupportedAdapterError(
                f"{module}: is DoRA begun by {initial(config)}, which changed the base's weights "
                "as well. Save the adapter converted to plain LoRA "
                "(PEFT: path_initial_model_for_weight_conversion)."
            )
        return cls.read(tensors, scale)

    @classmethod
    def merged(cls, low: Delta, rest: Mapping[str, Tensor]) -> Delta:
        return cls(low.a, low.b, low.scale, {LORA_BIAS: rest[BIAS] / low.scale})

    @property
    def others(self) -> Mapping[str, Tensor]:
        return self.tensors

    @property
    def hashed(self) -> Mapping[str, Tensor]:
        return {key: tensor for key, tensor in self.tensors.items() if key != BASE_WEIGHT}

    @property
    def needs_base(self) -> bool:
        return bool(self.tensors.keys() - {LORA_BIAS})

    @property
    def trained(self) -> tuple[Tensor, ...]:
        return (self.b,)

    @property
    def rest(self) -> Mapping[str, Tensor]:
        """Of a LoRA with nothing but a bias; else only the layer can tell."""
        if self.needs_base:
            return {}
        return {BIAS: self.scale * self.tensors[LORA_BIAS].detach().float()}

    add_rest = staticmethod(LinearDifference.add_rest)

    def setting(self, module: str) -> Mapping[str, Any]:
        found: dict[str, Any] = {"target_modules": [module]}
        found |= {"use_dora": True} if MAGNITUDE in self.tensors else {}
        return found | ({"lora_bias": True} if LORA_BIAS in self.tensors else {})

    def on(self, layer: nn.Module, who: str) -> Delta:
        rest: dict[str, Tensor] = {}
        b = self.b
        if LORA_BIAS in self.tensors:
            rest[BIAS] = self.scale * self.tensors[LORA_BIAS].detach().float()
        if BASE_BIAS in self.tensors:
            own = difference(layer, "bias", self.tensors[BASE_BIAS], who)
            rest[BIAS] = rest[BIAS].to(own.device) + own if BIAS in rest else own
        if BASE_WEIGHT in self.tensors:
            changed = difference(layer, "weight", self.tensors[BASE_WEIGHT], who)
            if torch.any(changed):
                rest[WEIGHT] = changed.T if is_transposed(layer) else changed
        if MAGNITUDE in self.tensors:
            b = self._rescale(layer, rest, who)
        kept = {key: tensor for key, tensor in rest.items() if key == FACTOR or torch.any(tensor)}
        if not kept:
            return LoraModule(self.a, b, self.scale)
        return LinearDifference(self.a, b, self.scale, kept)

    def also(self, module: str, model: nn.Module) -> Mapping[str, Delta]:
        return tied_to(module, model, self.tensors.get(BASE_WEIGHT), module)

    def _rescale(self, layer: nn.Module, rest: dict[str, Tensor], who: str) -> Tensor:
        """DoRA's factor on all that the layer and the LoRA give but a bias; returns B with it."""
        weight = weight_of(layer, who)
        device = weight.device
        if WEIGHT in rest:
            weight = weight + rest[WEIGHT]
        a, b = self.a.detach().to(device).float(), self.b.detach().to(device).float()
        magnitude = self.tensors[MAGNITUDE].detach().to(device).float()
        if magnitude.numel() != len(b):
            raise IncompatibleExpertError(
                f"{who}: has a magnitude of {list(magnitude.shape)} for {len(b)} outputs. Save the "
                "adapter again."
            )
        norms = (weight + self.scale * (b @ a)).norm(dim=1)
        factor = magnitude.flatten() / norms
        if WEIGHT in rest:
            rest[WEIGHT] = rest[WEIGHT] * factor.unsqueeze(1)
        if isinstance(getattr(layer, "bias", None), Tensor):
            bias = (1 - factor) * layer.bias.detach().float()  # type: ignore[union-attr, operator]
            rest[BIAS] = rest[BIAS].to(device) + bias if BIAS in rest else bias
        rest[FACTOR] = factor - 1
        rescaled: Tensor = factor.unsqueeze(1) * b
        return rescaled
