"""Runs one site's LoRAs of many experts, each for its own tokens, as batched products."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from phatgoose.experts import Delta
from phatgoose.experts.delta import Call
from phatgoose.nn.rest import Rests
from phatgoose.train.joint.rows import Rows


class Stack(ABC):
    """What one site adds to the base's output, for each expert's tokens."""

    @property
    def rank(self) -> int:
        """Of the factors; 0 where there are none."""
        return 1

    def add_rest(
        self, output: Float[Tensor, "*B_L O"], x: Float[Tensor, "*B_L I"], rows: Rows, call: Call
    ) -> Float[Tensor, "*B_L O"]:
        """Return the base's output with what the stack adds beside two factors."""
        return output

    @abstractmethod
    def halves(
        self, x: Float[Tensor, "G T I"], rows: Rows
    ) -> tuple[Float[Tensor, "G T R"], Float[Tensor, "G R O"]]:
        """Return two factors of it: tokens brought down to a rank, and the way up."""


@final
class GatedStack(Stack):
    """(scale * B A x + rest) * sigmoid(v·x), of which v alone is trained.

    An expert of lower rank has zeros in its last rows, and one that leaves the site alone has
    nothing else: both add exactly nothing, and its gate gets a gradient of exactly zero.
    """

    def __init__(
        self,
        modules: Sequence[Delta | None],
        gates: Float[nn.Parameter, "E I"],
        dtype: torch.dtype,  # of the way up; the way down is in fp32, as the gate is
    ) -> None:
        known = [module for module in modules if module is not None]
        rank, first = max(module.rank for module in known), known[0]
        a = torch.zeros(len(modules), first.in_features, rank)
        b = torch.zeros(len(modules), rank, first.out_features, dtype=dtype)
        for expert, module in enumerate(modules):
            if module is not None:
                a[expert, :, : module.rank] = module.a.detach().T
                b[expert, : module.rank] = module.b.detach().float().T * module.scale
        self.gates = gates
        self.rests = Rests()
        like = torch.zeros(1, len(modules), 0, 0, device=gates.device)
        for expert, module in enumerate(modules):
            self.rests.write(0, expert, module, like)
        self.a = a.to(gates.device)  # in one go, not one by one
        self.b = b.to(gates.device)

    @property
    def rank(self) -> int:
        return self.a.shape[2]

    def add_rest(
        self, output: Float[Tensor, "*B_L O"], x: Float[Tensor, "*B_L I"], rows: Rows, call: Call
    ) -> Float[Tensor, "*B_L O"]:
        if not self.rests.any:
            return output
        owners = rows.owners.to(x.device)
        owners = owners.repeat_interleave(x.shape[:-1].numel() // len(owners))
        dots = (x.reshape(len(owners), -1).float() * self.gates[owners]).sum(-1)
        weights = torch.sigmoid(dots).unsqueeze(-1)
        return self.rests.add(0, call, x, output, owners.unsqueeze(-1), weights)

    def halves(
        self, x: Float[Tensor, "G T I"], rows: Rows
    ) -> tuple[Float[Tensor, "G T R"], Float[Tensor, "G R O"]]:
        with torch.autocast(x.device.type, enabled=False):
            z, dots = _Down.apply(x, rows.each(self.a), rows.each(self.gates))
            # Scaling R numbers a token is the same as scaling O, and cheaper.
            return z * torch.sigmoid(dots).unsqueeze(-1), rows.each(self.b)


@final
class LoraStack(Stack):
    """scale * B A dropout(x), both matrices trained."""

    def __init__(
        self,
        a: Float[nn.Parameter, "E R I"],
        b: Float[nn.Parameter, "E O R"],
        *,
        scale: float,
        dropout: float,
    ) -> None:
        self.a = a
        self.b = b
        self.scale = scale
        self.dropout = dropout

    def halves(
        self, x: Float[Tensor, "G T I"], rows: Rows
    ) -> tuple[Float[Tensor, "G T R"], Float[Tensor, "G R O"]]:
        x = F.dropout(x.to(self.a.dtype), self.dropout)
        return torch.bmm(x, rows.each(self.a).mT) * self.scale, rows.each(self.b).mT


def add_stack(
    output: Float[Tensor, "*B_L O"], x: Float[Tensor, "*B_L I"], stack: Stack, rows: Rows
) -> Float[Tensor, "*B_L O"]:
    """Add the stack's output to the base's, in the latter's dtype."""
    z, up = stack.halves(rows.batched(x), rows)
    if torch.is_autocast_enabled(x.device.type) or z.dtype == up.dtype == output.dtype:
        whole = torch.baddbmm(rows.batched(output), z, up)
    else:
        whole = rows.batched(output) + torch.bmm(z.to(up.dtype), up)
    return whole.to(output.dtype).view(output.shape)


class _Down(torch.autograd.Function):
    """A x and v·x in fp32, for a frozen A.

    Goes through x once each way, and keeps it as it came, where autograd would go twice and keep a
    copy in fp32: beside a skinny product, moving x is all the cost.
    """

    @staticmethod
    def forward(ctx, x, a, v):  # type: ignore[no-untyped-def]
        """x [G T I], a [G I R], v [G I]; returns [G T R] and [G T]."""
        ctx.save_for_backward(x, a, v)
        both = torch.bmm(x.float(), torch.cat([a, v.unsqueeze(-1)], dim=-1))
        return both[..., :-1], both[..., -1]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, slope_z, slope_dots):  # type: ignore[no-untyped-def]
        x, a, v = ctx.saved_tensors
        along_x = None
        if ctx.needs_input_grad[0]:
            slopes = torch.cat([slope_z, slope_dots.unsqueeze(-1)], dim=-1)
            both = torch.cat([a, v.unsqueeze(-1)], dim=-1)
            along_x = torch.bmm(slopes, both.mT).to(x.dtype)
        return along_x, None, torch.bmm(slope_dots.unsqueeze(1), x.float()).squeeze(1)


def sites_of(adapters: Mapping[str, Mapping[str, Delta]]) -> list[str]:
    """List every site that some adapter has, in the order of first mention."""
    return list(dict.fromkeys(name for modules in adapters.values() for name in modules))
