"""Trains many experts, some at a time. Those of one group train in one pass over the base."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import sha256
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from phatgoose.errors import ConfigError
from phatgoose.experts import Delta, Expert, LoraModule, adapter_hash
from phatgoose.experts.resolve import Resolved, resolve
from phatgoose.train.joint.model import JointModel, joint_stream
from phatgoose.train.joint.stacks import GatedStack, LoraStack, Stack, sites_of
from phatgoose.train.loop.checkpoint import Progress
from phatgoose.train.loop.loop import Loop
from phatgoose.train.loop.packed import Packed
from phatgoose.train.loop.placement import device_of
from phatgoose.train.loop.run import Run, optimisation
from phatgoose.train.loop.seeding import seeded
from phatgoose.train.loop.stream import Batch
from phatgoose.train.settings import AdapterTraining, GateTraining

Modules = Mapping[str, Delta]


def in_groups(names: Sequence[str], together: int | None) -> Iterator[list[str]]:
    """Yield the names in turn, so many at a time. Raises ConfigError if that is below one."""
    if together is not None and together < 1:
        raise ConfigError(f"together must be at least 1, got {together}.")
    size = together or max(1, len(names))
    for start in range(0, len(names), size):
        yield list(names[start : start + size])


def group_name(names: Sequence[str]) -> str:
    """Make a short name for a group's files."""
    return sha256(repr(list(names)).encode()).hexdigest()[:12]


class Group:
    """Some experts that train in one pass. A subclass says which parameters of theirs."""

    what: ClassVar[str]  # the parameters' name: in checkpoints' names, and beside the progress bar
    dropout: ClassVar[bool] = False  # whether the base's dropout is on

    def __init__(
        self,
        names: Sequence[str],
        settings: AdapterTraining | GateTraining,
        run: Run,
        *,
        packed: Packed,
        joint: JointModel,
    ) -> None:
        self.names = list(names)
        self.settings = settings
        self.run = run
        self.packed = packed
        self.joint = joint

    def train(
        self,
        batches: Mapping[str, Iterable[Batch]],
        *,
        identity: Mapping[str, str],
        numbered: str = "",
    ) -> Progress:
        """Train on each expert's batches; `identity` tells this group's checkpoint from others."""
        run, seed = self.run, self.settings.seed
        loop = Loop(
            self.packed,
            optimisation(self.settings),
            run.accelerator,
            names=self.names,
            what=f"{self.what}{numbered}",
        )
        file = f"{self.what}-{group_name(self.names)}.safetensors"
        with seeded(seed), self.joint.installed(dropout=self.dropout):
            return loop.train(
                joint_stream(batches, run.accelerator, seed),
                self.joint,
                identity={**identity, **run.identity(self.settings)},
                checkpoint=run.checkpoint and run.checkpoint / file,
                progress=run.progress,
            )


def _own(resolved: Resolved) -> Modules:
    """List the modules that have gates of their own."""
    modules = resolved.expert.modules
    return {site: delta for site, delta in modules.items() if site not in resolved.signed_by}


@final
class GateGroup(Group):
    """Gates of adapters that stay as they are."""

    what = "gates"

    def __init__(
        self, model: Any, adapters: Mapping[str, Modules], settings: GateTraining, run: Run
    ) -> None:
        self.adapters = adapters
        self.hashes = {name: adapter_hash(modules) for name, modules in adapters.items()}
        every = [resolve(Expert(name, modules), model) for name, modules in adapters.items()]
        own = {e.expert.name: _own(e) for e in every}
        sites = {site: [modules.get(site) for modules in own.values()] for site in sites_of(own)}
        shapes = {}
        for site, modules in sites.items():
            features = next(m.in_features for m in modules if m is not None)
            shapes[site] = device_of(model.get_submodule(site)), (features,)
        packed = Packed(shapes, len(adapters))
        dtype = run.autocast or torch.float32  # what PEFT computes an adapter in
        stacks = {
            site: GatedStack(modules, packed.parameters[site], dtype)
            for site, modules in sites.items()
        }
        more = []
        for number, each in enumerate(every):  # what is tied to a module goes by its gate
            for site, source in each.signed_by.items():
                alone = [
                    None if n != number else each.expert.modules[site] for n in range(len(every))
                ]
                more.append((site, GatedStack(alone, packed.parameters[source], dtype)))
        joint = JointModel(model, stacks, autocast=run.autocast, more=more)
        super().__init__(list(adapters), settings, run, packed=packed, joint=joint)

    def vectors(self, expert: int) -> dict[str, Tensor]:
        """Copy one expert's gates."""
        return {
            site: self.packed.parameters[site].detach()[expert].to("cpu", copy=True)
            for site in self.adapters[self.names[expert]]
        }


@final
class AdapterGroup(Group):
    """LoRAs of one shape, each of which starts from its own of `first`."""

    what = "adapters"
    dropout = True

    def __init__(
        self,
        model: Any,
        first: Sequence[Modules],
        names: Sequence[str],
        settings: AdapterTraining,
        run: Run,
    ) -> None:
        self.shape = first[0]
        self.dtype = getattr(torch, settings.save_dtype)
        shapes = {}
        for site, module in self.shape.items():
            device = device_of(model.get_submodule(site))
            shapes[f"{site} a"] = (device, tuple(module.a.shape))
            shapes[f"{site} b"] = (device, tuple(module.b.shape))
        packed = Packed(shapes, len(names))
        stacks: dict[str, Stack] = {}
        for site, module in self.shape.items():
            a, b = packed.parameters[f"{site} a"], packed.parameters[f"{site} b"]
            a.data.copy_(torch.stack([modules[site].a for modules in first]))
            stacks[site] = LoraStack(a, b, scale=module.scale, dropout=settings.dropout)
        joint = JointModel(model, stacks, autocast=run.autocast)
        super().__init__(names, settings, run, packed=packed, joint=joint)

    def modules(self, expert: int) -> dict[str, LoraModule]:
        """Return one expert's adapter, in the dtype that it is saved in."""
        parameters, made = self.packed.parameters, {}
        for site, module in self.shape.items():
            a, b = (
                parameters[f"{site} {half}"].detach()[expert].to("cpu", self.dtype, copy=True)
                for half in "ab"
            )
            made[site] = LoraModule(a, b, module.scale)
        return made
