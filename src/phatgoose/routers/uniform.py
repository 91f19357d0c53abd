"""All experts alike."""

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from phatgoose.experts import Expert
from phatgoose.routers.base import Router


@final
class UniformRouter(Router):
    """Gives every expert the weight 1 / E, which is the average of their products B A."""

    name = "uniform"
    defaults = {"top_k": "all"}

    def signature(self, expert: Expert, module: str) -> Float[Tensor, " W"]:
        return torch.zeros(1)

    def score(
        self, x: Float[Tensor, "T I"], signatures: Float[Tensor, "E W"]
    ) -> Float[Tensor, "T E"]:
        return x.new_zeros(len(x), len(signatures), dtype=torch.float32)
