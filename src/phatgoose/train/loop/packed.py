"""Packs the parameters of many experts, so that one operation serves them all."""

from collections.abc import Iterator, Mapping
from math import prod

import torch
from jaxtyping import Float
from torch import Tensor, nn

Shape = tuple[int, ...]


class Packed:
    """fp32 parameters of E experts, all those of a device in one vector.

    An optimiser's step or a reduction over processes is one operation on a vector, however many
    experts and sites there are. `parameters[name]` is a leaf [E, *shape] that looks into it, and so
    does its gradient after `zero_grad`. Without `experts` there is one, and leaves are [*shape].
    """

    def __init__(
        self, shapes: Mapping[str, tuple[torch.device, Shape]], experts: int | None = None
    ) -> None:
        self.experts = experts or 1
        lead = () if experts is None else (experts,)
        self._places: dict[str, tuple[torch.device, int, Shape]] = {}
        sizes: dict[torch.device, int] = {}
        for name, (device, shape) in shapes.items():
            start = sizes.get(device, 0)
            self._places[name] = (device, start, (*lead, *shape))
            sizes[device] = start + self.experts * prod(shape)
        self._vectors = {
            device: nn.Parameter(torch.zeros(size, device=device)) for device, size in sizes.items()
        }
        self.parameters = {
            name: nn.Parameter(view)
            for name, view in self._views({d: v.data for d, v in self._vectors.items()})
        }

    @property
    def vectors(self) -> list[nn.Parameter]:
        """Return what an optimiser steps."""
        return list(self._vectors.values())

    @property
    def gradients(self) -> list[Float[Tensor, " N"]]:
        return [vector.grad for vector in self.vectors if vector.grad is not None]

    def moments(
        self, optimizer: torch.optim.Optimizer, moment: str
    ) -> Iterator[tuple[str, Tensor]]:
        """Return each parameter's part of what the optimiser keeps."""
        return self._views({d: optimizer.state[v][moment] for d, v in self._vectors.items()})

    def zero_grad(self) -> None:
        """Set gradients to zero, in place. What no batch uses keeps zeros."""
        for vector in self.vectors:
            if vector.grad is None:
                vector.grad = torch.zeros_like(vector)
            vector.grad.zero_()
        gradients = {device: v.grad for device, v in self._vectors.items() if v.grad is not None}
        for name, view in self._views(gradients):
            self.parameters[name].grad = view

    def norms(self) -> Float[Tensor, " E"]:
        """Compute the norm of each expert's gradient."""
        parts = [torch.linalg.vector_norm(part, dim=1) for part in self._by_expert()]
        stacked = torch.stack([part.to(parts[0].device) for part in parts])
        norms: Tensor = torch.linalg.vector_norm(stacked, dim=0)
        return norms

    def clip(self, norms: Float[Tensor, " E"], longest: float) -> None:
        """Shorten each expert's gradient to `longest`, as torch's clip_grad_norm_ does."""
        factors = (longest / (norms + 1e-6)).clamp(max=1.0).unsqueeze(1)
        on = {gradient.device: factors.to(gradient.device) for gradient in self.gradients}
        parts = self._by_expert()
        torch._foreach_mul_(parts, [on[part.device] for part in parts])

    def _by_expert(self) -> list[Float[Tensor, "E N"]]:
        """Return the gradients, one row for each expert."""
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        return [gradient.view(self.experts, -1) for gradient in gradients]

    def _views(self, vectors: Mapping[torch.device, Tensor]) -> Iterator[tuple[str, Tensor]]:
        for name, (device, start, shape) in self._places.items():
            yield name, vectors[device][start : start + prod(shape)].view(shape)
