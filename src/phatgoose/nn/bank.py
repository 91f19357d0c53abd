"""One site's experts, stacked once and kept in place."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from phatgoose.experts import LoraModule


class Bank(nn.Module):
    """The stacked signatures and LoRA factors of the experts that adapt one linear layer.

    Slots follow the pool's order. Buffers have spare capacity, so adding an expert writes into
    them and removing one closes the gap; both leave other sites alone. They are not persistent:
    a routed model's state_dict is that of the plain model. `b` carries each expert's scale.
    """

    signatures: Float[Tensor, "C I"]  # fp32, whatever the model is cast to
    a: Float[Tensor, "C R I"]  # shorter ranks are padded with zeros
    b: Float[Tensor, "C O R"]

    def __init__(
        self, in_features: int, out_features: int, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.members: list[int] = []  # the pool's index of each slot's expert
        self.ranks: list[int] = []  # of each slot's expert
        for name, shape, kind in (
            ("signatures", (0, in_features), torch.float32),
            ("a", (0, 0, in_features), dtype),
            ("b", (0, out_features, 0), dtype),
        ):
            self.register_buffer(
                name, torch.zeros(shape, device=device, dtype=kind), persistent=False
            )

    def __len__(self) -> int:
        return len(self.members)

    def reserve(self, capacity: int, rank: int) -> None:
        """Make room for `capacity` experts of up to `rank`; what is there stays."""
        room = self.a.shape[0]
        # Growing copies the whole bank, so a bank that grows again takes room for more.
        capacity = room if capacity <= room else max(capacity, 2 * room)
        rank = max(rank, self.a.shape[1])
        if (capacity, rank) == tuple(self.a.shape[:2]):
            return
        self.signatures = _grown(self.signatures, (capacity, self.signatures.shape[1]))
        self.a = _grown(self.a, (capacity, rank, self.a.shape[2]))
        self.b = _grown(self.b, (capacity, self.b.shape[1], rank))

    def append(self, member: int, signature: Float[Tensor, " I"], lora: LoraModule) -> None:
        """Put an expert, the pool's number `member`, into the next slot."""
        slot = len(self.members)
        self.reserve(slot + 1, lora.rank)
        self.signatures[slot] = signature
        self.a[slot].zero_()[: lora.rank] = lora.a
        self.b[slot].zero_()[:, : lora.rank] = lora.b.float() * lora.scale
        self.members.append(member)
        self.ranks.append(lora.rank)

    def remove(self, member: int) -> None:
        """Take the pool's expert `member` out; later ones move down, here and in the pool."""
        if member in self.members:
            slot = self.members.index(member)
            for buffer in (self.signatures, self.a, self.b):
                buffer[slot : len(self) - 1] = buffer[slot + 1 : len(self)].clone()
            del self.members[slot], self.ranks[slot]
        self.members = [other - (other > member) for other in self.members]

    def trim(self) -> None:
        """Drop ranks that no expert here has: their zeros can change how a product is rounded."""
        rank = max(self.ranks, default=0)
        if rank < self.a.shape[1]:
            self.a, self.b = self.a[:, :rank].clone(), self.b[:, :, :rank].clone()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Follow the model from device to device; only the LoRA factors follow its dtype."""
        kept = self.signatures
        super()._apply(fn, recurse)
        if self.signatures.dtype != torch.float32:
            self.signatures = kept.to(self.signatures.device)
        return self


def _grown(buffer: Tensor, shape: tuple[int, ...]) -> Tensor:
    grown = buffer.new_zeros(shape)
    grown[tuple(slice(0, size) for size in buffer.shape)] = buffer
    return grown
