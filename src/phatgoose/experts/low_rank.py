"""LoRA on a linear layer."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from phatgoose.experts.delta import LORA_A, LORA_B, Delta


@final
@dataclass(frozen=True)
class LoraModule(Delta):
    """One expert's LoRA at one site: it adds `scale * b @ a @ x`."""

    kind: ClassVar[str] = "LoRA"
    keys: ClassVar[frozenset[str]] = frozenset({LORA_A, LORA_B})

    @classmethod
    def read(cls, tensors: Mapping[str, Tensor], scale: float) -> Delta:
        return cls(tensors[LORA_A], tensors[LORA_B], scale)

    @classmethod
    def merged(cls, low: Delta, rest: Mapping[str, Tensor]) -> Delta:
        return cls(low.a, low.b, low.scale)
