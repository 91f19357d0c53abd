"""The pool of a running model: which expert is in which slot, and how that changes."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from phatgoose.errors import ConfigError, IncompatibleExpertError, RoutingError
from phatgoose.experts import (
    BaseIdentity,
    Delta,
    Expert,
    LoraModule,
    adapter_hash,
    identify_base,
)
from phatgoose.experts.bases import tell_bases
from phatgoose.experts.renames import renamed_for
from phatgoose.experts.signatures import vectors_hash
from phatgoose.experts.verify import check_modules, check_numbers, check_range
from phatgoose.nn import Bank
from phatgoose.serve.pool.settings import ServeSettings, gated, served_router


@dataclass(frozen=True)
class Place:
    """A module of the base: a layer of vLLM's, or one of those packed into it."""

    layer: str  # its name in vLLM's model
    number: int  # its place among the layer's parts
    parts: int  # how many modules the layer stands for
    shards: tuple[int, ...]  # of the layer's outputs, those that are this module's


@runtime_checkable
class Places(Protocol):
    """Where the modules of the base are in the model of this rank; the engine knows."""

    def find(self, module: str, who: str) -> Place | None:
        """None where the module is on another pipeline stage. Raises RoutingError, in the name of
        `who`, where it cannot be routed."""

    def slice_of(
        self, place: Place, lora: Delta, signature: Tensor, *, gated: bool
    ) -> tuple[Delta, Tensor]:
        """What this tensor-parallel rank needs of a LoRA [R, I], [O, R] and a signature [W]."""


Adapted = tuple[Place, Delta, Tensor]


@dataclass(frozen=True)
class Resident:
    """An expert in a slot, without its tensors."""

    name: str
    source: str | None  # the folder it was loaded from
    sha256: str  # of what it adds and what it is chosen by
    rank: int
    modules: int


@dataclass(frozen=True)
class Slice:
    """This rank's slice of an expert at one layer: by part, and each whole signature's sum."""

    parts: Mapping[int, tuple[Tensor, Delta]]
    sums: Mapping[int, Tensor]


@dataclass(frozen=True)
class Prepared:
    resident: Resident
    slot: int
    slices: Mapping[str, Slice]
    worth: Tensor | None  # of every token id [V], where evidence is wanted


class Slots:
    """Experts by slot. A slot has the same number in the banks of all layers and ranks.

    An expert is prepared, which may fail and changes nothing, then committed, which cannot fail
    and writes into buffers that stay where they are.
    """

    def __init__(
        self, places: Places, base: nn.Module, base_name: str, settings: ServeSettings
    ) -> None:
        self.settings = settings
        self.banks: dict[str, Bank] = {}
        self.generation = 0
        self.residents: list[Resident | None] = []
        self.prepared: Prepared | None = None
        self.on_change: Callable[[Sequence[str | None]], None] = lambda names: None
        self._places, self._base, self._base_name = places, base, base_name
        self.router = served_router(settings.router)
        self.gated = gated(self.router)
        self.background: str | None = None  # a hash of the text that evidence is relative to
        self.weigh: Callable[[Expert], Tensor] | None = None  # worth of every token id [V]
        self.on_worth: Callable[[int, Tensor | None], None] = lambda slot, worth: None

    @property
    def names(self) -> list[str | None]:
        """By slot."""
        return [resident.name if resident else None for resident in self.residents]

    def adapted(self, expert: Expert) -> dict[str, list[Adapted]]:
        """By layer of this rank, the modules the expert adapts there.

        Raises MissingGateError, or RoutingError; see `Places.find`.
        """
        found: dict[str, list[Adapted]] = {}
        for module, lora in expert.modules.items():
            who = f"vLLM: {expert.name} at {module}"
            lora = lora.plain(who, "Route it on transformers, leave it out")
            signature = self.router.signature(expert, module)
            if self.gated:
                signature = F.pad(signature, (0, lora.in_features - len(signature)))
            place = self._places.find(module, expert.name)
            if place is not None:
                found.setdefault(place.layer, []).append((place, lora, signature))
        return found

    def width(self, features: int, rank: int) -> int:
        """Width of the longest signature of an expert of this rank at a layer of such an input."""
        if self.gated:
            return 0  # what a rank keeps of its gate is as wide as its input
        nothing = LoraModule(torch.zeros(rank, features), torch.zeros(rank, rank), 1.0)
        return len(self.router.signature(Expert("nothing", {"layer": nothing}), "layer"))

    def slices(self, adapted: Mapping[str, list[Adapted]]) -> dict[str, Slice]:
        """What this rank needs of the modules that an expert adapts."""
        made = {}
        for name, mine in adapted.items():
            parts, sums = {}, {}
            for place, lora, signature in mine:
                lora_slice, signature_slice = self._places.slice_of(
                    place, lora, signature, gated=self.gated
                )
                parts[place.number] = (signature_slice, lora_slice)
                # Of the whole signature: a rank that holds a slice of it needs the sum to score.
                sums[place.number] = signature.sum()
            made[name] = Slice(parts, sums)
        return made

    def resident(self, expert: Expert) -> Resident:
        # An expert from a folder was found to be the adapter that its gates name.
        if expert.folder is not None and expert.gates is not None:
            adapter = expert.gates.adapter
        else:
            adapter = adapter_hash(expert.modules)
        hashed = hashlib.sha256(adapter.encode())
        if self.router.weighs_ids and self.router.needs in expert.signatures:
            hashed.update(vectors_hash(self.router.kept(expert)).encode())
        for name in sorted(expert.modules):
            signature = self.router.signature(expert, name).detach().to("cpu", torch.float32)
            hashed.update(name.encode() + signature.contiguous().numpy().tobytes())
        return Resident(
            name=expert.name,
            source=str(expert.folder) if expert.folder else None,
            sha256=hashed.hexdigest(),
            rank=max(module.rank for module in expert.modules.values()),
            modules=len(expert.modules),
        )

    def fill(self, banks: dict[str, Bank], residents: Sequence[Resident], capacity: int) -> None:
        """Take over banks that hold these experts in their first slots."""
        self.banks = banks
        self.residents = [*residents, *[None] * (capacity - len(residents))]

    def prepare(self, expert: Expert) -> Resident:
        """Check an expert and hold it ready, in place of one held before.

        Raises ConfigError where there is no room for it, IncompatibleExpertError, and what
        `adapted` raises.
        """
        self.prepared = None
        expert = renamed_for(expert, self._base)
        if expert.name in self.names:
            raise ConfigError(f"{expert.name}: the pool has an expert of this name. Remove it.")
        if None not in self.residents:
            raise ConfigError(
                f"{expert.name}: all {len(self.residents)} slots are taken. Remove an expert, or "
                "start with a larger capacity."
            )
        for problem in check_numbers(expert):
            raise IncompatibleExpertError(problem)
        identity = check_base(expert, self._base, self._base_name)
        tell_bases([expert], identity, same_base=self.settings.same_base)
        for dtype in {bank.a.dtype for bank in self.banks.values()}:
            check_range(expert, dtype)
        adapted = self.adapted(expert)
        for name, mine in adapted.items():
            self._check_room(expert, name, mine)
        worth = self.weigh(expert) if self.weigh else None
        resident = self.resident(expert)
        slot = self.residents.index(None)
        self.prepared = Prepared(resident, slot, self.slices(adapted), worth)
        return resident

    def commit(self) -> None:
        """Write the prepared expert into its slot. Raises ConfigError if there is none."""
        if self.prepared is None:
            raise ConfigError("phatgoose: no expert is prepared, so there is none to commit.")
        ready, self.prepared = self.prepared, None
        for name, bank in self.banks.items():
            write(bank, ready.slot, ready.slices.get(name))
        self.on_worth(ready.slot, ready.worth)
        self._changed(ready.slot, ready.resident)

    def abort(self) -> None:
        self.prepared = None

    def remove(self, name: str) -> None:
        """Close an expert's slot, for another to have. Raises ConfigError if it is not there."""
        if name not in self.names:
            raise ConfigError(
                f"{name}: no expert of this name in the pool. It has: "
                f"{', '.join(filter(None, self.names))}."
            )
        slot = self.names.index(name)
        for bank in self.banks.values():
            write(bank, slot, None)
        self.on_worth(slot, None)
        self._changed(slot, None)

    def describe(self) -> dict[str, Any]:
        """For people and other programs; the same on every rank."""
        return {
            "generation": self.generation,
            "fingerprint": self.fingerprint(),
            "capacity": len(self.residents),
            "mixture": self.settings.mixture(len(self.residents)),
            "scale": self.settings.routing.scale,
            "max_rank": self.settings.max_rank
            or max((bank.a.shape[2] for bank in self.banks.values()), default=0),
            "experts": [asdict(resident) for resident in self.residents if resident],
        }

    def fingerprint(self) -> str:
        """Hash all that decides how a token is served: experts in any order, router, settings."""
        experts = sorted(
            (resident.name, resident.sha256) for resident in self.residents if resident
        )
        settings = self.settings
        return digest([experts, settings.router, asdict(settings.routing), self.background])

    def _check_room(self, expert: Expert, name: str, mine: list[Adapted]) -> None:
        bank = self.banks.get(name)
        if bank is None:
            raise RoutingError(
                f"{expert.name}: adapts {name}, which no expert did at the start, so there is no "
                'room at it. Name its kind in "targets" of additional_config["phatgoose"].'
            )
        rank, room = max(lora.rank for _, lora, _ in mine), bank.a.shape[2]
        if rank > room:
            raise ConfigError(
                f"{expert.name}: has rank {rank} at {name}, there is room for {room}. Start with "
                f"max_rank of at least {rank}."
            )

    def _changed(self, slot: int, resident: Resident | None) -> None:
        self.residents[slot] = resident
        self.generation += 1
        self.on_change(self.names)


def write(bank: Bank, slot: int, found: Slice | None) -> None:
    """Put a slice of an expert, or nothing, into a slot, which may be the one after the last."""
    parts = found.parts if found else {}
    if slot == len(bank):
        bank.append(slot, parts)
    else:
        bank.replace(slot, parts)
    for number, total in (found.sums if found else {}).items():
        bank.sums[number, slot] = total


def check_base(expert: Expert, base: nn.Module, name: str) -> BaseIdentity:
    """Raise IncompatibleExpertError unless the expert may be of this base; return what that is."""
    identity = identify_base(base, name=name)
    difference = expert.base and expert.base.difference(identity)
    if difference:
        raise IncompatibleExpertError(
            f"{expert.name}: was made for another base than {name}: {difference}."
        )
    for problem in check_modules(expert, base):
        raise IncompatibleExpertError(problem)
    return identity


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
