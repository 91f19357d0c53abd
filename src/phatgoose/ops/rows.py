"""Gives the rows of a batch what they ask for: fixed mixtures, and knobs of their own."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from phatgoose.ops.choose import Choosing
from phatgoose.types import Routing


class Rows(NamedTuple):
    """What the row of each token asks. M is the most experts that any of them may use.

    Where `top_k` is 0, the mixture is fixed, and the scores have no say.
    """

    slots: Tensor  # int64 [T, M]: the experts of a fixed mixture; -1 where it has no more
    weights: Tensor  # fp32 [T, M]: theirs
    top_k: Tensor  # int64 [T], at most M
    temperature: Tensor  # fp32 [T]
    scale: Tensor  # fp32 [T]: multiplies the weights, chosen or fixed

    def choose(
        self, scores: Float[Tensor, "T *S C"], opened: Bool[Tensor, "*S C"], choosing: Choosing
    ) -> Routing:
        """Choose for the rows that are routed, and give the others their mixtures: [T, *S, M].

        Slots that are not open are to score -inf already.
        """
        shape = (len(scores), *[1] * (scores.dim() - 2))
        places = self.slots.shape[1]
        routing = choosing.choose(
            scores,
            top_k=places,
            temperature=self.temperature.view(*shape, 1),
            keep=self.top_k.view(shape),
        )
        missing = (0, places - routing.experts.shape[-1])
        experts = F.pad(routing.experts, missing, value=-1)
        weights = F.pad(routing.weights, missing) * self.scale.view(*shape, 1)
        fixed, given = (self.top_k == 0).view(*shape, 1), self.mixtures(opened)
        return Routing(
            experts=torch.where(fixed, given.experts, experts),
            weights=torch.where(fixed, given.weights, weights),
        )

    def mixtures(self, opened: Bool[Tensor, "*S C"]) -> Routing:
        """Return the fixed mixtures [T, *S, M]. An expert whose slot is not open adds nothing."""
        between = [1] * (opened.dim() - 1)
        tokens, places = self.slots.shape
        slots = self.slots.view(tokens, *between, places)
        weights = (self.weights * self.scale.unsqueeze(1)).view(slots.shape)
        present = opened[..., self.slots.clamp_min(0)].movedim(-2, 0) & (slots >= 0)
        return Routing(torch.where(present, slots, -1), weights * present)
