"""LoRA whose initialisation took a part of the base's weight away: PiSSA and OLoRA."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from phatgoose.experts.delta import LORA_A, LORA_B, Delta, OnBase
from phatgoose.experts.layers import weight_of
from phatgoose.experts.low_rank import LoraModule

INIT = "init_lora_weights"
INITIAL = ("pissa", "olora")  # that can be computed again from the base's weight alone


@final
@dataclass(frozen=True)
class InitialLora(OnBase):
    """scale * (B A - B0 A0) x, where B0 A0 is what the initialisation took from the base.

    PEFT computes it again from the base whenever it loads such an adapter: the first R singular
    triples (PiSSA, arXiv:2404.02948) or columns of Q and rows of R (OLoRA, arXiv:2406.01775).
    """

    init: str = ""

    kind: ClassVar[str] = "a LoRA by PiSSA or OLoRA"
    keys: ClassVar[frozenset[str]] = frozenset({LORA_A, LORA_B})

    @classmethod
    def fits(cls, keys: frozenset[str], module: str, config: Mapping[str, Any]) -> bool:
        return super().fits(keys, module, config) and initial(config) is not None

    @classmethod
    def read_of(
        cls, tensors: Mapping[str, Tensor], scale: float, module: str, config: Mapping[str, Any]
    ) -> Delta:
        return cls(tensors[LORA_A], tensors[LORA_B], scale, init=initial(config) or "")

    @property
    def trained(self) -> tuple[Tensor, ...]:
        return (self.b,)

    @property
    def hashed(self) -> Mapping[str, Tensor]:
        return {self.init: torch.ones(1)}

    def setting(self, module: str) -> Mapping[str, Any]:
        return {"target_modules": [module], INIT: self.init}

    def on(self, layer: nn.Module, who: str) -> Delta:
        weight = weight_of(layer, who)
        if self.init == "pissa":
            u, s, vh = torch.linalg.svd(weight, full_matrices=False)
            b0, a0 = u[:, : self.rank] * s[: self.rank], vh[: self.rank]
        else:
            q, r = torch.linalg.qr(weight)
            b0, a0 = q[:, : self.rank] * self.scale, r[: self.rank]
        a, b = (half.detach().to(weight.device).float() for half in (self.a, self.b))
        return LoraModule(torch.cat([a, a0]), torch.cat([self.scale * b, -b0], dim=1), 1.0)


def initial(config: Mapping[str, Any]) -> str | None:
    """Which of INITIAL a config names."""
    said = config.get(INIT)
    name = said.lower() if isinstance(said, str) else ""
    return name if name in INITIAL else None
