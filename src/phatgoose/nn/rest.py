"""What experts add beside their low-rank products: stacked by slot, added in plain torch."""

from collections.abc import Mapping

from jaxtyping import Float, Int
from torch import Tensor, nn

from phatgoose.experts.delta import Delta


class Rests(nn.Module):
    """The `rest` of a bank's experts, by part and kind; empty where all are plain LoRA.

    Zeros add nothing, so a slot whose expert has no such thing holds zeros. Buffers keep their
    address while the bank does not grow, and are not persistent.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kinds: dict[int, dict[type[Delta], dict[str, str]]] = {}  # buffers by part and name

    def reserve(self, capacity: int) -> None:
        """Make room for so many slots; what is stays."""
        for name, stacked in list(self.named_buffers()):
            if len(stacked) < capacity:
                grown = stacked.new_zeros(capacity, *stacked.shape[1:])
                grown[: len(stacked)] = stacked
                setattr(self, name, grown)

    def write(
        self, part: int, slot: int, delta: Delta | None, like: Float[Tensor, "S C R I"]
    ) -> None:
        """Put the rest of an expert, or nothing, into a slot; the capacity is that of `like`."""
        for name in self._names(part):
            self.get_buffer(name)[slot] = 0.0
        if delta is None or not delta.rest:
            return
        mine = self.kinds.setdefault(part, {}).setdefault(type(delta), {})
        for key, tensor in delta.rest.items():
            if key not in mine:
                mine[key] = f"part{part}_{type(delta).__name__}_{key}"
                stacked = like.new_zeros(like.shape[1], *tensor.shape)
                self.register_buffer(mine[key], stacked, persistent=False)
            self.get_buffer(mine[key])[slot] = tensor

    def remove(self, slot: int, last: int) -> None:
        """Close the gap that a slot leaves; `last` slots were in use."""
        for stacked in self.buffers():
            stacked[slot : last - 1] = stacked[slot + 1 : last].clone()
            stacked[last - 1] = 0.0

    def add(
        self,
        part: int,
        x: Tensor,
        base: Tensor,
        experts: Int[Tensor, "T K"],
        weights: Float[Tensor, "T K"],
    ) -> Tensor:
        """The base's output at a part, and what the chosen experts add beside low-rank products."""
        flat, output = base.reshape(-1, base.shape[-1]), base.reshape(-1, base.shape[-1]).clone()
        x = x.reshape(-1, x.shape[-1])
        for kind, names in self.kinds.get(part, {}).items():
            rest: Mapping[str, Tensor] = {key: getattr(self, n) for key, n in names.items()}
            output = kind.add_rest(output, flat, x, rest, experts, weights)
        return output.view(base.shape)

    def _names(self, part: int) -> list[str]:
        return [name for names in self.kinds.get(part, {}).values() for name in names.values()]
