"""What experts add beside their low-rank products: stacked by slot, added in plain torch."""

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from phatgoose.experts.delta import Call, Delta, Mixture


class Rests(nn.Module):
    """The `rest` of a bank's experts, by part and kind; empty where all are plain LoRA.

    Buffers are not persistent. They keep their addresses while no expert with a new kind of rest,
    or a larger one, joins.
    """

    def __init__(self) -> None:
        super().__init__()
        self.groups: dict[int, list[Group]] = {}  # by part

    @property
    def any(self) -> bool:
        """Whether there is anything to add."""
        return bool(self.groups)

    def reserve(self, capacity: int) -> None:
        """Make room for so many slots; what is stays."""
        for group in self._all():
            group.reserve(capacity)

    def write(
        self, part: int, slot: int, delta: Delta | None, like: Float[Tensor, "S C R I"]
    ) -> None:
        """Put the rest of an expert, or nothing, into a slot; the capacity is that of `like`."""
        rest = {} if delta is None else delta.rest
        wanted = None if delta is None or not rest else (type(delta), frozenset(rest))
        for group in self.groups.get(part, []):
            if group.holds != wanted:
                group.clear(slot)
        if delta is not None and wanted is not None:
            groups = self.groups.setdefault(part, [])
            if all(group.holds != wanted for group in groups):
                groups.append(Group(wanted, like))
            group = next(group for group in groups if group.holds == wanted)
            group.write(slot, delta, like.dtype)
        self._tidy()

    def remove(self, slot: int, last: int) -> None:
        """Close the gap that a slot leaves; `last` slots were in use."""
        for group in self._all():
            group.remove(slot, last)
        self._tidy()

    def add(
        self,
        part: int,
        call: Call,
        x: Tensor,
        base: Tensor,
        experts: Int[Tensor, "T K"],
        weights: Float[Tensor, "T K"],
    ) -> Tensor:
        """The base's output at a part, and what the chosen experts add beside low-rank products."""
        if part not in self.groups:
            return base
        flat, x = base.reshape(-1, base.shape[-1]), x.reshape(-1, x.shape[-1])
        output = flat.clone()
        for group in self.groups[part]:
            output = group.add(output, flat, x, experts, weights, call)
        return output.view(base.shape)

    def _all(self) -> Iterator["Group"]:
        for groups in self.groups.values():
            yield from groups

    def _tidy(self) -> None:
        """Keep the groups that some slot uses, also as submodules, which follow the model."""
        kept = {part: [g for g in groups if g.rows] for part, groups in self.groups.items()}
        self.groups = {part: groups for part, groups in kept.items() if groups}
        self._modules.clear()
        for number, group in enumerate(self._all()):
            self.add_module(str(number), group)


class Group(nn.Module):
    """The rest of those experts of a part that have the same tensors, one row for each."""

    row_of: Int[Tensor, " C"]  # -1 where the slot has none

    def __init__(
        self, holds: tuple[type[Delta], frozenset[str]], like: Float[Tensor, "S C R I"]
    ) -> None:
        super().__init__()
        self.holds = holds
        self.rows: dict[int, int] = {}  # by slot
        self._free: list[int] = []
        self._names = {key: f"rest{number}" for number, key in enumerate(sorted(holds[1]))}
        rows = torch.full((like.shape[1],), -1, dtype=torch.long, device=like.device)
        self.register_buffer("row_of", rows, persistent=False)

    def reserve(self, capacity: int) -> None:
        missing = capacity - len(self.row_of)
        if missing > 0:
            self.row_of = nn.functional.pad(self.row_of, (0, missing), value=-1)

    def write(self, slot: int, delta: Delta, dtype: torch.dtype) -> None:
        row = self.rows.get(slot)
        if row is None:
            row = self._free.pop() if self._free else len(self.rows)
            self.rows[slot] = row
        for key, tensor in delta.rest.items():
            self._write(self._names[key], row, tensor, dtype)
        self._tell()

    def clear(self, slot: int) -> None:
        row = self.rows.pop(slot, None)
        if row is not None:
            self._free.append(row)
            self._tell()

    def remove(self, slot: int, last: int) -> None:
        self.clear(slot)
        self.rows = {other - (other > slot): row for other, row in self.rows.items()}
        self._tell()

    def add(
        self,
        output: Tensor,
        base: Tensor,
        x: Tensor,
        experts: Int[Tensor, "T K"],
        weights: Float[Tensor, "T K"],
        call: Call,
    ) -> Tensor:
        mine = torch.where(experts < 0, -1, self.row_of[experts.clamp_min(0)])
        rest = {key: getattr(self, name) for key, name in self._names.items()}
        return self.holds[0].add_rest(output, base, x, Mixture(rest, mine, weights), call)

    def _tell(self) -> None:
        rows = [self.rows.get(slot, -1) for slot in range(len(self.row_of))]
        self.row_of.copy_(torch.tensor(rows))

    def _write(self, name: str, row: int, tensor: Tensor, dtype: torch.dtype) -> None:
        """Put a tensor into a row, in room of its size; zeros fill what is larger."""
        held: Tensor | None = self._buffers.get(name)
        shape = tensor.shape if held is None else map(max, tensor.shape, held.shape[1:])
        count = row + 1 if held is None else max(row + 1, len(held))
        wanted = (count, *shape)
        if held is None or tuple(held.shape) != wanted:
            # Small ones are kept exactly: what multiplies the base's output is close to zero.
            if tensor.dim() < 2:
                dtype = torch.promote_types(dtype, torch.float32)
            grown = torch.zeros(wanted, dtype=dtype, device=self.row_of.device)
            if held is not None:
                grown[tuple(slice(0, size) for size in held.shape)] = held
            self.register_buffer(name, grown, persistent=False)
            held = grown
        place = held[row]
        place.zero_()[tuple(slice(0, size) for size in tensor.shape)] = tensor
