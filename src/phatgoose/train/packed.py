"""Parameters of many experts, packed so that one operation serves them all."""

from collections.abc import Iterator, Mapping
from math import prod

import torch
from jaxtyping import Float
from torch import Tensor, nn

Shape = tuple[int, ...]


class Packed:
    """fp32 parameters, one row [N] an expert and one matrix [E, N] a device.

    A norm, a clip, an optimiser's step or a reduction over processes is one operation on a matrix,
    however many sites there are. `parameters[name]` is a leaf [E, *shape] that looks into it, and
    after `zero_grad` so does its gradient. Without `experts` there is one, and leaves are [*shape].
    """

    def __init__(
        self, shapes: Mapping[str, tuple[torch.device, Shape]], experts: int | None = None
    ) -> None:
        self.experts = experts or 1
        self._lead = () if experts is None else (experts,)
        self._places: dict[str, tuple[torch.device, int, Shape]] = {}
        sizes: dict[torch.device, int] = {}
        for name, (device, shape) in shapes.items():
            start = sizes.get(device, 0)
            self._places[name] = (device, start, shape)
            sizes[device] = start + prod(shape)
        self._matrices = {
            device: nn.Parameter(torch.zeros(self.experts, size, device=device))
            for device, size in sizes.items()
        }
        self.parameters = {
            name: nn.Parameter(view)
            for name, view in self.views({d: m.data for d, m in self._matrices.items()})
        }

    @property
    def matrices(self) -> list[nn.Parameter]:
        """What an optimiser steps."""
        return list(self._matrices.values())

    def views(
        self, matrices: Mapping[torch.device, Float[Tensor, "E N"]]
    ) -> Iterator[tuple[str, Tensor]]:
        """Each parameter's part of matrices that are laid out like these."""
        for name, (device, start, shape) in self._places.items():
            part = matrices[device][:, start : start + prod(shape)]
            yield name, part.view(*self._lead, *shape)

    def moments(self, optimizer: torch.optim.Optimizer, moment: str) -> Iterator[tuple[str, Tensor]]:
        """Each parameter's part of what the optimiser keeps."""
        return self.views({d: optimizer.state[m][moment] for d, m in self._matrices.items()})

    def zero_grad(self) -> None:
        """Gradients of zero, in place; what no batch uses keeps them."""
        for matrix in self.matrices:
            if matrix.grad is None:
                matrix.grad = torch.zeros_like(matrix)
            matrix.grad.zero_()
        for name, view in self.views({d: m.grad for d, m in self._matrices.items()}):  # type: ignore[misc]
            self.parameters[name].grad = view

    @property
    def gradients(self) -> list[Float[Tensor, "E N"]]:
        return [matrix.grad for matrix in self.matrices if matrix.grad is not None]

    def norms(self) -> Float[Tensor, " E"]:
        """The norm of each expert's gradient."""
        parts = [torch.linalg.vector_norm(gradient, dim=1) for gradient in self.gradients]
        return torch.linalg.vector_norm(torch.stack([p.to(parts[0].device) for p in parts]), dim=0)

    def clip(self, norms: Float[Tensor, " E"], longest: float) -> None:
        """Shorten each expert's gradient to `longest`, as torch's clip_grad_norm_ does."""
        factors = (longest / (norms + 1e-6)).clamp(max=1.0).unsqueeze(1)
        for gradient in self.gradients:
            gradient.mul_(factors.to(gradient.device))
