"""From scores to a routing: keep the best K experts of each token and weigh them."""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from phatgoose.types import Routing

Scale = Literal["softmax", "unit"]


def choose_experts(
    scores: Float[Tensor, "T E"],
    top_k: int,
    *,
    temperature: float = 1.0,
    scale: Scale = "softmax",
    null_score: float | None = None,
) -> Routing:
    """Keep the K = min(top_k, candidates) highest scores of each token, then weigh them.

    scale "softmax": w = softmax(kept scores / temperature), as published (arXiv:2402.05859, 3.2).
    scale "unit": every kept expert has weight 1, the strength its adapter was trained at.

    `null_score` adds a candidate that stands for the base model alone: where it is among the kept
    it takes its share of the softmax and the slot is -1, so nothing is added for it.

    Ties go to the lower slot, the null candidate last. Scores are compared in fp32.
    """
    scores = scores.float()
    candidates = scores.shape[-1]
    if null_score is not None:
        scores = torch.cat([scores, scores.new_full((scores.shape[0], 1), null_score)], dim=-1)
    order = _best(scores, min(top_k, scores.shape[-1]))
    kept = scores.gather(-1, order)
    null = order == candidates
    if scale == "softmax":
        weights = (kept / temperature).softmax(dim=-1)
    else:
        weights = torch.ones_like(kept)
    return Routing(experts=order.masked_fill(null, -1), weights=weights)


# Up to this many experts per token, one pass over the scores for each beats sorting them.
FEW_EXPERTS = 8


def _best(scores: Float[Tensor, "T E"], count: int) -> Int[Tensor, "T K"]:
    """Indices of the `count` highest scores, best first, ties to the lower index.

    torch.topk leaves the order of equal scores open; prefill and decode must agree on it.
    """
    # -inf means "taken" below, so a score of -inf (a router's ban) has to stay above it.
    scores = scores.detach().clamp_min(torch.finfo(scores.dtype).min)
    if not 0 < count <= FEW_EXPERTS:
        return scores.argsort(dim=-1, descending=True, stable=True)[:, :count]
    left, order = scores, []
    for _ in range(count):
        best = left.argmax(dim=-1, keepdim=True)  # documented to return the first maximum
        left.scatter_(-1, best, -torch.inf)  # the clamp made it a tensor of its own
        order.append(best)
    return torch.cat(order, dim=-1)
