"""The experts of linear layers that read the same input, stacked once and kept in place."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from phatgoose.experts import Delta
from phatgoose.nn.rest import Rests
from phatgoose.ops import BACKENDS, Gates, choose_backend, pieces_of

MASKS = 64  # of different restrictions, that a bank keeps


class Bank(nn.Module):
    """The stacked signatures and LoRA factors of the experts that adapt one layer, or several.

    Layers that read the same input (queries, keys and values, say) are the S parts of one bank, so
    that a token is scored for all of them at once. A slot is an expert; `present` says which parts
    it adapts. Slots follow the pool's order. Buffers have spare capacity, so adding an expert
    writes into them and removing one closes the gap; their addresses and shapes stay, as compiled
    models and CUDA graphs need. They are not persistent: a routed model's state_dict is that of
    the plain model. The b's carry each expert's scale.
    """

    signatures: Float[Tensor, "S C W"]  # fp32, whatever the model is cast to
    pieces: Float[Tensor, "M I"]  # the signatures for tensor cores, and padding; or they themselves
    sums: Float[Tensor, "S C"]  # of each signature, fp32
    a: Float[Tensor, "S C R I"]  # shorter ranks are padded with zeros
    present: Bool[Tensor, "S C"]
    open: Bool[Tensor, "S C"]  # present, and allowed at the moment

    def __init__(
        self,
        in_features: int,
        out_features: Sequence[int],
        *,
        device: torch.device,
        dtype: torch.dtype,
        backend: str = "auto",
        standardises: bool = True,
    ) -> None:
        super().__init__()
        self.members: list[int] = []  # the pool's index of each slot's expert
        self.ranks: list[int] = []  # the longest of each slot's expert
        self.sites: set[int] = set()  # the parts whose layers are routed
        self.parts = len(out_features)
        shapes: list[tuple[str, tuple[int, ...], torch.dtype]] = [
            ("signatures", (self.parts, 0, in_features if standardises else 0), torch.float32),
            ("sums", (self.parts, 0), torch.float32),
            ("a", (self.parts, 0, 0, in_features), dtype),
            ("present", (self.parts, 0), torch.bool),
            ("open", (self.parts, 0), torch.bool),
        ]
        shapes += [(f"b{part}", (0, size, 0), dtype) for part, size in enumerate(out_features)]
        for name, shape, kind in shapes:
            buffer = torch.zeros(shape, device=device, dtype=kind)
            self.register_buffer(name, buffer, persistent=False)
        self.register_buffer("pieces", None, persistent=False)
        self.rests = Rests()
        self._allowed: frozenset[int] | None = None
        self._masks: dict[tuple[range, int, frozenset[int] | None], Tensor] = {}
        self._asked = backend
        self._standardises = standardises  # see Router; W = I then
        self._split()

    def __len__(self) -> int:
        return len(self.members)

    def halves(self) -> Float[Tensor, "2 S C I"]:
        """`pieces` without padding, where they are not the signatures themselves."""
        return self.pieces[: 2 * self.signatures.shape[:2].numel()].view(2, *self.signatures.shape)

    def b(self, part: int) -> Float[Tensor, "C O R"]:
        b: Tensor = getattr(self, f"b{part}")
        return b

    def view(self, parts: range) -> tuple[Gates, Tensor]:
        """What scores tokens at these parts, and a [S, C, R, I].

        Spare slots are left out, because sums over them may be rounded differently and are slow on
        a CPU. They stay in a compiled model, which must not depend on how many experts there are,
        and for a backend whose results do not depend on spare slots.
        """
        if torch.compiler.is_compiling():
            return self._view(parts, self.capacity)
        found = self._views.get(parts)
        if found is None:
            slots = self.capacity if BACKENDS[self.backend].spare_slots else len(self)
            found = self._views[parts] = self._view(parts, slots)
        return found

    def _view(self, parts: range, slots: int) -> tuple[Gates, Tensor]:
        mine = slice(parts.start, parts.stop)
        if self.pieces is self.signatures:
            signatures = self.signatures[mine, :slots].flatten(0, 1)
        elif len(parts) == self.parts:
            signatures = self.pieces
        else:
            signatures = self.halves()[:, mine].flatten(0, 2)
        gates = Gates(signatures, self.sums[mine, :slots], self.open[mine, :slots])
        return gates, self.a[mine, :slots]

    def opened(
        self, parts: range, slots: int, allowed: frozenset[int] | None
    ) -> Bool[Tensor, "S C"]:
        """Which of the first slots these of the pool's experts (None: all of them) have.

        Like `open`, which compiled models and CUDA graphs read, but for one forward alone.
        """
        key = (parts, slots, allowed)
        found = self._masks.get(key)
        if found is None:
            found = self.present[parts.start : parts.stop, :slots]
            if allowed is not None:
                mine = [member in allowed for member in self.members]
                mine += [False] * (slots - len(mine))
                found = found & torch.tensor(mine, dtype=torch.bool).to(found.device)
            if len(self._masks) >= MASKS:
                self._masks.clear()
            self._masks[key] = found
        return found

    @property
    def capacity(self) -> int:
        return self.a.shape[1]

    def reserve(self, capacity: int, rank: int, width: int = 0) -> None:
        """Make room for experts of up to `rank`, with signatures of up to `width`."""
        room = self.capacity
        if width > self.signatures.shape[2]:
            self.signatures = _grown(self.signatures, (self.parts, room, width))
            self._split()
        # Growing copies the whole bank, so a bank that grows again takes room for more.
        capacity = room if capacity <= room else max(capacity, 2 * room)
        rank = max(rank, self.a.shape[2])
        if (capacity, rank) == (room, self.a.shape[2]):
            return
        for name in ("signatures", "sums", "present", "open"):
            buffer = self.get_buffer(name)
            setattr(self, name, _grown(buffer, (self.parts, capacity, *buffer.shape[2:])))
        self.a = _grown(self.a, (self.parts, capacity, rank, self.a.shape[3]))
        for part in range(self.parts):
            b = self.b(part)
            setattr(self, f"b{part}", _grown(b, (capacity, b.shape[1], rank)))
        self.rests.reserve(capacity)
        self._split()

    def append(self, member: int, parts: Mapping[int, tuple[Float[Tensor, " I"], Delta]]) -> None:
        """Put an expert, the pool's number `member`, into the next slot: signature and LoRA."""
        slot, rank = len(self.members), _rank(parts)
        width = max((len(signature) for signature, _ in parts.values()), default=0)
        self.reserve(slot + 1, rank, width)
        self.members.append(member)
        self.ranks.append(rank)
        self._write(slot, parts)

    def replace(self, slot: int, parts: Mapping[int, tuple[Float[Tensor, " I"], Delta]]) -> None:
        """Put another expert, or none, into a slot. It must not need more room than there is."""
        self.ranks[slot] = _rank(parts)
        self._write(slot, parts)

    def _write(self, slot: int, parts: Mapping[int, tuple[Tensor, Delta]]) -> None:
        for part, (signature, lora) in parts.items():
            self.signatures[part, slot].zero_()[: len(signature)] = signature
            self.a[part, slot].zero_()[: lora.rank] = lora.a
            b = lora.b.to(self.a.device).float() * lora.scale
            self.b(part)[slot].zero_()[:, : lora.rank] = b
            self.rests.write(part, slot, lora, self.a)
            self.present[part, slot] = True
        for part in set(range(self.parts)) - set(parts):
            self.rests.write(part, slot, None, self.a)
            self.signatures[part, slot] = 0.0
            self.present[part, slot] = False
        self._refresh(slice(slot, slot + 1))

    def remove(self, member: int) -> None:
        """Take the pool's expert `member` out. Later ones move down, here and in the pool."""
        if member in self.members:
            slot, last = self.members.index(member), len(self.members)
            stacked = [self.signatures, self.a, self.present]
            for buffer in (*stacked, *(self.b(p).unsqueeze(0) for p in range(self.parts))):
                buffer[:, slot : last - 1] = buffer[:, slot + 1 : last].clone()
            self.rests.remove(slot, last)
            self.present[:, last - 1] = False
            del self.members[slot], self.ranks[slot]
            self._refresh(slice(slot, last))
        self.members = [other - (other > member) for other in self.members]
        self._masks.clear()

    def allow(self, allowed: frozenset[int] | None) -> None:
        """Open only these of the pool's experts (None: all of them), in place."""
        self._allowed = allowed
        self._open()

    def trim(self, least: int = 0) -> None:
        """Drop ranks, down to `least`, that no expert here has: zeros can change the rounding."""
        rank = max([least, *self.ranks])
        if rank < self.a.shape[2]:
            self.a = self.a[:, :, :rank].clone()
            for part in range(self.parts):
                setattr(self, f"b{part}", self.b(part)[:, :, :rank].clone())
            self._views.clear()

    def _refresh(self, slots: slice) -> None:
        """Bring what is derived from the signatures of some slots up to date, in place."""
        changed = self.signatures[:, slots]
        self.sums[:, slots] = changed.sum(-1)
        self._views.clear()
        self._masks.clear()
        if self.pieces is not self.signatures:
            self.halves()[:, :, slots] = pieces_of(changed, self.a.dtype)
        self._open()

    def _open(self) -> None:
        opened = [self._allowed is None or member in self._allowed for member in self.members]
        opened += [False] * (self.capacity - len(opened))
        self.open.copy_(self.present & torch.tensor(opened, dtype=torch.bool).to(self.open.device))

    def _split(self) -> None:
        """Settle the backend, and make `pieces` anew, for buffers of another kind or size."""
        self._views: dict[range, tuple[Gates, Tensor]] = {}
        self._masks.clear()
        self.backend = choose_backend(self._asked, self.a.device.type, self.a.dtype)
        self.pieces = self.signatures
        if self._standardises and BACKENDS[self.backend].halves_gates(self.a.dtype):
            rows = 2 * self.signatures.shape[:2].numel()
            rows += -rows % 64  # cuBLAS is several times as slow where it is no multiple of this
            self.pieces = self.a.new_zeros(rows, self.signatures.shape[2])
            self.halves().copy_(pieces_of(self.signatures, self.a.dtype))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Follow the model from device to device; only the LoRA factors follow its dtype."""
        kept = self.signatures
        super()._apply(fn, recurse)
        if self.signatures.dtype != torch.float32:
            self.signatures = kept.to(self.signatures.device)
        self.sums = self.signatures.sum(-1)
        self._split()
        return self


def _rank(parts: Mapping[int, tuple[Tensor, Delta]]) -> int:
    return max((lora.rank for _, lora in parts.values()), default=0)


def _grown(buffer: Tensor, shape: tuple[int, ...]) -> Tensor:
    grown = buffer.new_zeros(shape)
    grown[tuple(slice(0, size) for size in buffer.shape)] = buffer
    return grown
