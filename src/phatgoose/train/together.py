"""Training the gates of many adapters of one base in one pass over it."""

from collections.abc import Iterable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from phatgoose.errors import (
    ConfigError,
    IncompatibleExpertError,
    UntrainedAdapterError,
)
from phatgoose.experts import Expert, Gates, LoraModule, adapter_hash, identify_base
from phatgoose.experts.hub import locate
from phatgoose.experts.lora import read_adapter
from phatgoose.experts.verify import check_modules, check_numbers
from phatgoose.train.gates import make_record, optimisation, run_identity
from phatgoose.train.groups import group_name, in_groups
from phatgoose.train.joint import JointModel, check_model, joint_stream
from phatgoose.train.loop import Loop
from phatgoose.train.mixed import autocast_dtype
from phatgoose.train.packed import Packed
from phatgoose.train.placement import device_of, place
from phatgoose.train.seeding import seeded
from phatgoose.train.settings import GateTraining
from phatgoose.train.stacks import GatedStack, sites_of
from phatgoose.train.stream import Batch

Adapter = str | Path | Expert | Mapping[str, LoraModule]
Modules = Mapping[str, LoraModule]


def train_gates_together(
    model: Any,
    adapters: Mapping[str, Adapter],
    batches: Mapping[str, Iterable[Batch]],
    *,
    together: int | None = None,
    steps: int = 100,
    learning_rate: float = 5e-3,
    seed: int = 0,
    gradient_accumulation_steps: int = 1,
    warmup_ratio: float = 0.06,
    max_grad_norm: float = 1.0,
    autocast: torch.dtype | None = None,
    tokenizer: Any = None,
    base: str | None = None,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> dict[str, Gates]:
    """Train the gates of many adapters at once; each gets what `train_gates` would give it alone.

    Every step takes one micro-batch of each expert and runs all of them through the base together,
    each expert's rows through its own LoRA and gate. Losses, clipping and updates are each
    expert's own; ranks, adapted modules and batch sizes may differ.

    Args:
        model: the plain transformers base, decoder-only or encoder-decoder; comes back unchanged.
            It may be spread or sharded, as for `train_gates`.
        adapters: by name, a PEFT LoRA's folder or Hub id, an `Expert`, or its modules.
        batches: by the same names, what `train_gates` takes: mappings with `input_ids` and
            `labels`. They are padded on the right to a common length.
        together: how many to train at once, the others after them; default: all. Fewer take
            less memory.
        checkpoint: a folder to save progress in every few steps, and to go on from. Experts that
            are done are not trained again.

    The other settings are `train_gates`'s.

    Raises:
        ConfigError: names or settings that do not fit, or a model or batch that is refused.
        IncompatibleExpertError: an adapter is not one of this base, or holds NaN.
        UntrainedAdapterError: an adapter's lora_B are all zero.
        TrainingError: batches end too early, or an expert's loss is not finite; it is named, and
            no expert has been updated in that step.
        ExpertFormatError, ExpertNotFoundError, UnsupportedAdapterError: a folder cannot be read.
    """
    settings = GateTraining(
        steps=steps,
        learning_rate=learning_rate,
        warmup_ratio=warmup_ratio,
        max_grad_norm=max_grad_norm,
        gradient_accumulation_steps=gradient_accumulation_steps,
        seed=seed,
    )
    autocast = autocast_dtype(autocast)
    check_names(adapters, batches)
    check_model(model)
    groups = list(in_groups(list(adapters), together))
    for name, adapter in adapters.items():  # all of them, before any is trained
        check_adapter(name, read_modules(adapter), model)
    accelerator = Accelerator()
    place(model, accelerator)
    identity = identify_base(model, tokenizer, name=base)
    gates = {}
    for number, names in enumerate(groups, start=1):
        group = _Group(
            model,
            {name: read_modules(adapters[name]) for name in names},
            settings,
            accelerator=accelerator,
            autocast=autocast,
        )
        what = f"gates {number}/{len(groups)}" if len(groups) > 1 else "gates"
        done = group.train(
            {name: batches[name] for name in names},
            None if checkpoint is None else Path(checkpoint),
            progress=progress,
            what=what,
        )
        for expert, name in enumerate(names):
            record = make_record(identity, group.hashes[name], settings, done, expert)
            gates[name] = Gates(group.vectors(expert), record)
    return gates


class _Group:
    """The experts that train in one pass."""

    def __init__(
        self,
        model: Any,
        adapters: Mapping[str, Modules],
        settings: GateTraining,
        *,
        accelerator: Accelerator,
        autocast: torch.dtype | None,
    ) -> None:
        self.settings = settings
        self.accelerator = accelerator
        self.autocast = autocast
        self.adapters = adapters
        self.hashes = {name: adapter_hash(modules) for name, modules in adapters.items()}
        sites = {
            site: [modules.get(site) for modules in adapters.values()]
            for site in sites_of(adapters)
        }
        features = {
            site: next(m.in_features for m in modules if m is not None)
            for site, modules in sites.items()
        }
        self.packed = Packed(
            {
                site: (device_of(model.get_submodule(site)), (size,))
                for site, size in features.items()
            },
            len(adapters),
        )
        dtype = autocast or torch.float32  # what PEFT computes an adapter in
        stacks = {
            site: GatedStack(modules, self.packed.parameters[site], dtype)
            for site, modules in sites.items()
        }
        self.joint = JointModel(model, stacks, autocast=autocast)

    def train(
        self,
        batches: Mapping[str, Iterable[Batch]],
        checkpoints: Path | None,
        *,
        progress: bool,
        what: str,
    ) -> Any:
        names, seed = list(batches), self.settings.seed
        loop = Loop(
            self.packed, optimisation(self.settings), self.accelerator, names=names, what=what
        )
        identity = {
            "adapter": sha256(repr(self.hashes).encode()).hexdigest(),
            **run_identity(self.settings, self.accelerator, self.autocast),
        }
        path = checkpoints and checkpoints / f"gates-{group_name(names)}.safetensors"
        with seeded(seed), self.joint.installed():
            return loop.train(
                joint_stream(batches, self.accelerator, seed),
                self.joint,
                identity=identity,
                checkpoint=path,
                progress=progress,
            )

    def vectors(self, expert: int) -> dict[str, torch.Tensor]:
        """One expert's gates, a copy of their own."""
        name = list(self.adapters)[expert]
        return {
            site: self.packed.parameters[site].detach()[expert].to("cpu", copy=True)
            for site in self.adapters[name]
        }


def check_names(adapters: Mapping[str, Any], batches: Mapping[str, Any]) -> None:
    """Raise ConfigError unless both have the same names, and there are some."""
    if not adapters:
        raise ConfigError("adapters: there are none to train. Give at least one.")
    for one, other, missing in (
        (adapters, batches, "has no batches"),
        (batches, adapters, "has batches but no adapter"),
    ):
        alone = sorted(set(one) - set(other))
        if alone:
            raise ConfigError(f"{alone[0]}: {missing}. Give both by the same names.")


def read_modules(adapter: Adapter) -> Modules:
    """An adapter's LoRAs by site, from wherever they are."""
    if isinstance(adapter, Expert):
        return adapter.modules
    if isinstance(adapter, str | Path):
        return read_adapter(locate(adapter))[1]
    return adapter


def check_adapter(name: str, modules: Modules, model: Any) -> None:
    """Refuse an adapter that is not of this base, holds NaN, or is untrained."""
    expert = Expert(name, modules, gates=None, base_name=None)
    for problem in (*check_numbers(expert), *check_modules(expert, model)):
        raise IncompatibleExpertError(problem)
    if not any(torch.any(module.b) for module in modules.values()):
        raise UntrainedAdapterError(
            f"{name}: every lora_B is zero, so its gates would get no gradient. Train the adapter "
            "first, then its gates."
        )
