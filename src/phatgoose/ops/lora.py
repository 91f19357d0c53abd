"""The routed sum of LoRA outputs: y_t = sum_k w_tk * B_e A_e x_t with e = experts[t, k]."""

import torch
from jaxtyping import Float
from torch import Tensor

from phatgoose.types import Routing

# Up to this many token-expert pairs, gathering each pair's factors is cheaper than sorting.
FEW_PAIRS = 64


def routed_lora_reference(
    x: Float[Tensor, "T I"],
    a: Float[Tensor, "E R I"],
    b: Float[Tensor, "E O R"],
    routing: Routing,
) -> Float[Tensor, "T O"]:
    """The definition. `b` already carries each expert's scale; a slot of -1 adds nothing.

    Computes in fp32; returns x's dtype. arXiv:2402.05859, section 3.2. Gathers [T K R I], so it is
    for tests and small inputs.
    """
    slots = routing.experts.clamp_min(0)
    weights = routing.weights * (routing.experts >= 0)
    z = torch.einsum("tkri,ti->tkr", a[slots].float(), x.float())
    y = torch.einsum("tkor,tkr,tk->to", b[slots].float(), z, weights)
    return y.to(x.dtype)


def routed_lora(
    x: Float[Tensor, "T I"],
    a: Float[Tensor, "E R I"],
    b: Float[Tensor, "E O R"],
    routing: Routing,
) -> Float[Tensor, "T O"]:
    """Same value as `routed_lora_reference`; work and memory grow with T * K, not with E.

    Products run in the factors' dtype and are summed in fp32; the result has x's dtype.
    Differentiable in x, a, b and the weights.
    """
    if routing.experts.numel() <= FEW_PAIRS:
        return _by_pair(x, a, b, routing)
    return _by_expert(x, a, b, routing)


def _by_pair(x: Tensor, a: Tensor, b: Tensor, routing: Routing) -> Tensor:
    """Gather the factors of each token-expert pair: least overhead while decoding."""
    tokens, chosen = routing.experts.shape
    slots = routing.experts.clamp_min(0).flatten()
    weights = (routing.weights * (routing.experts >= 0)).flatten()
    pairs = x.to(a.dtype).repeat_interleave(chosen, dim=0)  # [T*K I]
    z = torch.bmm(a[slots], pairs.unsqueeze(-1))  # [T*K R 1]
    z = (z.float() * weights.view(-1, 1, 1)).to(b.dtype)
    y = torch.bmm(b[slots], z).view(tokens, chosen, b.shape[1])
    return y.float().sum(1).to(x.dtype)


def _by_expert(x: Tensor, a: Tensor, b: Tensor, routing: Routing) -> Tensor:
    """Sort the pairs by expert, then two plain products for each expert that was chosen."""
    chosen = routing.experts.shape[1]
    slots, order = routing.experts.flatten().sort(stable=True)
    counts = torch.bincount(slots + 1, minlength=a.shape[0] + 1).tolist()
    y = x.new_zeros(x.shape[0], b.shape[1], dtype=torch.float32)
    start = counts[0]  # pairs without an expert come first
    for expert, count in enumerate(counts[1:]):
        if not count:
            continue
        pairs = order[start : start + count]
        tokens = pairs.div(chosen, rounding_mode="floor")
        weights = routing.weights.flatten()[pairs].unsqueeze(-1)
        z = (x[tokens].to(a.dtype) @ a[expert].T).float() * weights  # [pairs R]
        y.index_add_(0, tokens, (z.to(b.dtype) @ b[expert].T).float())
        start += count
    return y.to(x.dtype)
