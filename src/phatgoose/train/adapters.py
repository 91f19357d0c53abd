"""Training LoRAs for many tasks of one base in one pass over it."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from hashlib import sha256
from itertools import count
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from phatgoose.errors import ConfigError
from phatgoose.experts import LoraModule
from phatgoose.experts.base import base_name
from phatgoose.experts.lora import lora_of, write_adapter
from phatgoose.files import new_folder
from phatgoose.tasks import Encoded, collate
from phatgoose.train.adapter import MAX_GRAD_NORM, AdapterTraining
from phatgoose.train.checkpoint import Progress
from phatgoose.train.gates import run_identity
from phatgoose.train.groups import group_name, in_groups
from phatgoose.train.joint import JointModel, check_model, joint_stream
from phatgoose.train.loop import CHECKPOINT_EVERY, Loop, Optimisation
from phatgoose.train.mixed import autocast_dtype
from phatgoose.train.packed import Packed
from phatgoose.train.placement import device_of, place
from phatgoose.train.seeding import seeded
from phatgoose.train.stacks import LoraStack
from phatgoose.train.stream import Batch

Modules = dict[str, LoraModule]


def train_adapters_together(
    model: Any,
    tasks: Mapping[str, Sequence[Encoded]],
    output_dir: str | Path,
    settings: AdapterTraining | None = None,
    *,
    pad: int,
    together: int | None = None,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> dict[str, Modules]:
    """Train a LoRA for each task, all at once; each is what `train_adapter` gives for it alone.

    Initial values, order of the examples, schedule, clipping and rounding are `train_adapter`'s;
    with dropout the draws differ. Each adapter is saved to a PEFT folder in `output_dir`, named
    like its task. Returns their modules, for `train_gates_together`.

    Args:
        model: the plain transformers base, decoder-only or encoder-decoder; comes back unchanged.
        tasks: encoded examples by the task's name.
        together: how many to train at once, the others after them; default: all.
        checkpoint: a folder to save progress in, and to go on from.

    Raises:
        ConfigError: a task without examples, a setting out of range, or a model that is refused.
        TrainingError: a task's loss is not finite; it is named, and none has been updated.
    """
    settings = settings or AdapterTraining()
    if not tasks:
        raise ConfigError("tasks: there are none to train. Give at least one.")
    for name, encoded in tasks.items():
        if not encoded:
            raise ConfigError(f"{name}: there are no examples to train on. Give at least one.")
    check_model(model)
    groups = list(in_groups(list(tasks), together))
    accelerator = Accelerator()
    place(model, accelerator)
    first, config = _initial(model, settings)
    modules: dict[str, Modules] = {}
    for number, names in enumerate(groups, start=1):
        group = _Group(model, first, names, settings, accelerator=accelerator)
        group.train(
            {name: tasks[name] for name in names},
            None if checkpoint is None else Path(checkpoint),
            pad=pad,
            progress=progress,
            what=f"adapters {number}/{len(groups)}" if len(groups) > 1 else "adapters",
        )
        for expert, name in enumerate(names):
            modules[name] = group.modules(expert)
            if accelerator.is_main_process:
                _save(Path(output_dir) / name, config, modules[name])
    accelerator.wait_for_everyone()
    return {
        name: {site: LoraModule(m.a.float(), m.b.float(), m.scale) for site, m in found.items()}
        for name, found in modules.items()
    }


class _Group:
    """The tasks that train in one pass."""

    def __init__(
        self,
        model: Any,
        first: Modules,
        names: Sequence[str],
        settings: AdapterTraining,
        *,
        accelerator: Accelerator,
    ) -> None:
        self.first = first
        self.names = names
        self.settings = settings
        self.accelerator = accelerator
        self.autocast = autocast_dtype(torch.bfloat16 if settings.bf16 else None)
        shapes = {}
        for site, module in first.items():
            device = device_of(model.get_submodule(site))
            shapes[f"{site} a"] = (device, tuple(module.a.shape))
            shapes[f"{site} b"] = (device, tuple(module.b.shape))
        self.packed = Packed(shapes, len(names))
        parameters, stacks = self.packed.parameters, {}
        for site, module in first.items():
            a, b = parameters[f"{site} a"], parameters[f"{site} b"]
            a.data.copy_(module.a.expand_as(a))
            stacks[site] = LoraStack(a, b, scale=module.scale, dropout=settings.dropout)
        self.joint = JointModel(model, stacks, autocast=self.autocast)

    def train(
        self,
        tasks: Mapping[str, Sequence[Encoded]],
        checkpoints: Path | None,
        *,
        pad: int,
        progress: bool,
        what: str,
    ) -> Progress:
        settings = self.settings
        seq2seq = bool(self.joint.model.config.is_encoder_decoder)
        batches = {
            name: _batches(encoded, settings, pad=pad, seq2seq=seq2seq)
            for name, encoded in tasks.items()
        }
        optimisation = Optimisation(
            steps=settings.steps,
            rate=settings.rate,
            max_grad_norm=MAX_GRAD_NORM,
            weight_decay=settings.weight_decay,
            # Adapters are large beside gates, so there are at most some twenty checkpoints.
            checkpoint_every=max(CHECKPOINT_EVERY, settings.steps // 20),
        )
        identity = {
            "set of examples": sha256(repr(tasks).encode()).hexdigest(),
            **run_identity(settings, self.accelerator, self.autocast),
        }
        path = checkpoints and checkpoints / f"adapters-{group_name(self.names)}.safetensors"
        loop = Loop(self.packed, optimisation, self.accelerator, names=self.names, what=what)
        with seeded(settings.seed), self.joint.installed(dropout=True):
            return loop.train(
                joint_stream(batches, self.accelerator, settings.seed),
                self.joint,
                identity=identity,
                checkpoint=path,
                progress=progress,
            )

    def modules(self, expert: int) -> Modules:
        """One task's adapter, in the dtype it is saved in."""
        dtype, parameters = getattr(torch, self.settings.save_dtype), self.packed.parameters
        made = {}
        for site, module in self.first.items():
            a, b = (
                parameters[f"{site} {half}"].detach()[expert].to("cpu", dtype, copy=True)
                for half in "ab"
            )
            made[site] = LoraModule(a, b, module.scale)
        return made


def _initial(model: Any, settings: AdapterTraining) -> tuple[Modules, dict[str, Any]]:
    """The adapter as PEFT initialises it on this model, and its config; the model is as before."""
    from peft import get_peft_model
    from peft.tuners.lora import LoraLayer

    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with seeded(settings.seed):
        seq2seq = bool(model.config.is_encoder_decoder)
        peft_model: Any = get_peft_model(model, settings.lora_config(seq2seq=seq2seq))
    try:
        layers = {
            base_name(path): layer
            for path, layer in peft_model.named_modules()
            if isinstance(layer, LoraLayer)
        }
        modules = {site: lora_of(layer, "default") for site, layer in layers.items()}
        config = {**peft_model.peft_config["default"].to_dict(), "inference_mode": True}
    finally:
        peft_model.unload()
        if hasattr(model, "peft_config"):
            del model.peft_config
        for parameter in trainable:
            parameter.requires_grad_(True)
    return modules, config


def _batches(
    encoded: Sequence[Encoded], settings: AdapterTraining, *, pad: int, seq2seq: bool
) -> Iterator[Batch]:
    """Batches without end, in the order in which transformers.Trainer takes them."""
    generator = torch.Generator()
    for epoch in count():
        generator.manual_seed(settings.seed + epoch)
        order = torch.randperm(len(encoded), generator=generator).tolist()
        for start in range(0, len(order), settings.batch_size):
            rows = [encoded[i] for i in order[start : start + settings.batch_size]]
            yield collate(rows, pad=pad, seq2seq=seq2seq)


def _save(folder: Path, config: Mapping[str, Any], modules: Mapping[str, LoraModule]) -> None:
    """Write an adapter into a new folder, or over the one that is there."""
    with nullcontext(folder) if folder.exists() else new_folder(folder) as place:
        write_adapter(place, config, modules)
