"""From scores to a routing: keep the best K experts of each token and weigh them."""

from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from phatgoose.types import Routing

Scale = Literal["softmax", "unit"]


class Choosing(NamedTuple):
    """The knobs of a choice, as everything below a router takes them; see `choose_experts`.

    Operators take them last, one after the other.
    """

    top_k: int
    temperature: float
    unit: bool  # every kept expert has weight 1
    null_score: float | None

    def candidates(self, slots: int) -> int:
        """Count what there is to choose from: so many slots, and the null candidate."""
        return slots + (self.null_score is not None)

    def count(self, slots: int) -> int:
        """Return K, how many of them a token keeps."""
        return min(self.top_k, self.candidates(slots))

    def choose(self, scores: Float[Tensor, "*T C"], **more: Any) -> Routing:
        """Call `choose_experts` with these knobs, apart from those that are given."""
        knobs = {
            "top_k": self.top_k,
            "temperature": self.temperature,
            "scale": "unit" if self.unit else "softmax",
            "null_score": self.null_score,
        }
        return choose_experts(scores, **{**knobs, **more})


CHOOSING = "int top_k, float temperature, bool unit, float? null_score"  # in operators' schemas


def choose_experts(
    scores: Float[Tensor, "*T E"],
    top_k: int,
    *,
    temperature: float | Float[Tensor, "*#T 1"] = 1.0,
    scale: Scale = "softmax",
    null_score: float | None = None,
    keep: Int[Tensor, "*#T"] | None = None,
) -> Routing:
    """Keep the K = min(top_k, candidates) highest scores of each token, then weigh them.

    scale "softmax": w = softmax(kept scores / temperature), as published (arXiv:2402.05859, 3.2).
    scale "unit": every kept expert has weight 1, the strength its adapter was trained at.

    An expert scored -inf is no candidate. A token with fewer than K candidates has the slot -1 and
    the weight 0 in the places left over.

    `null_score` adds a candidate that stands for the base model alone. Where it is kept, it takes
    its part of the softmax and its slot is -1, so it adds nothing.

    `keep` is how many of the K places each token fills; without it, all.

    Ties go to the lower slot, and the null candidate comes last. Scores are compared in fp32.
    """
    scores = scores.float()
    candidates = scores.shape[-1]
    if null_score is not None:
        null = scores.new_full((*scores.shape[:-1], 1), null_score)
        scores = torch.cat([scores, null], dim=-1)
    order, found = _best(scores.detach(), min(top_k, scores.shape[-1]))
    if keep is not None:
        places = torch.arange(order.shape[-1], device=order.device)
        found = found & (places < keep.unsqueeze(-1))
    kept = scores.gather(-1, order).masked_fill(~found, -torch.inf)
    if scale == "softmax":
        # Where nothing is found, zeros in place of -inf keep NaN out of values and gradients.
        kept = torch.where(found.any(-1, keepdim=True), kept, 0.0)
        weights = (kept / temperature).softmax(dim=-1)
    else:
        weights = torch.ones_like(kept)
    return Routing(
        experts=order.masked_fill(~found | (order == candidates), -1),
        weights=weights.masked_fill(~found, 0.0),
    )


# Up to this many experts per token, one pass over the scores for each beats sorting them.
FEW_EXPERTS = 8


def _best(
    scores: Float[Tensor, "*T E"], count: int
) -> tuple[Int[Tensor, "*T K"], Bool[Tensor, "*T K"]]:
    """Returns the indices of the `count` highest scores, and which of them are candidates.

    The best comes first, and the lower index wins a tie.

    torch.topk leaves the order of equal scores open; prefill and decode must agree on it.
    """
    if not 0 < count <= FEW_EXPERTS:
        order = scores.argsort(dim=-1, descending=True, stable=True)[..., :count]
        return order, scores.gather(-1, order) > -torch.inf
    left, kept, places = scores.clone(), [], []
    for _ in range(count):
        best = left.argmax(dim=-1, keepdim=True)  # documented to return the first maximum
        places.append(best)
        kept.append(left.gather(-1, best))
        left.scatter_(-1, best, -torch.inf)
    return torch.cat(places, dim=-1), torch.cat(kept, dim=-1) > -torch.inf
