"""The definition of the routed sum, and the backend that computes it as it is written."""

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from phatgoose.ops.backends.base import Backend, Down
from phatgoose.types import Routing


def routed_lora_reference(
    x: Float[Tensor, "T I"],
    a: Float[Tensor, "E R I"],
    b: Float[Tensor, "E O R"],
    routing: Routing,
) -> Float[Tensor, "T O"]:
    """Compute the definition. `b` carries each expert's scale; a slot of -1 adds nothing.

    It computes in fp32 and returns x's dtype. arXiv:2402.05859, section 3.2. It gathers [T K R I],
    so it is for tests and small inputs.
    """
    slots = routing.experts.clamp_min(0)
    weights = routing.weights * (routing.experts >= 0)
    z = torch.einsum("tkri,ti->tkr", a[slots].float(), x.float())
    y = torch.einsum("tkor,tkr,tk->to", b[slots].float(), z, weights)
    return y.to(x.dtype)


@final
class ReferenceBackend(Backend):
    """Gathers the factors of every pair. It is slow, and it is the definition."""

    automatic = False

    def empty_down(self, x: Tensor, a: Tensor, chosen: int) -> Down:
        z = x.new_empty(x.shape[0], a.shape[0], chosen, a.shape[2], dtype=torch.float32)
        return Down(z, *_no_plan(x))

    def routed_down(self, x: Tensor, a: Tensor, experts: Tensor, weights: Tensor) -> Down:
        every = torch.arange(experts.shape[1], device=a.device).view(1, -1, 1)
        rows = a[every, experts.clamp_min(0)].float()
        z = torch.einsum("tskri,ti,tsk->tskr", rows, x.float(), weights * (experts >= 0))
        return Down(z, *_no_plan(x))

    def routed_up_(self, output: Tensor, b: Tensor, down: Down, experts: Tensor, part: int) -> None:
        mine = b[experts[:, part].clamp_min(0)].float()
        output.add_(torch.einsum("tkor,tkr->to", mine, down.z[:, part]).to(output.dtype))


def _no_plan(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(0, dtype=torch.int32), x.new_empty(0, 0, dtype=torch.int32)
