"""Trains gates as published, for one adapter or for many in one pass over the base."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from phatgoose.errors import (
    ConfigError,
    IncompatibleExpertError,
    TrainingError,
    UntrainedAdapterError,
)
from phatgoose.experts import (
    BaseIdentity,
    Delta,
    Expert,
    GateRecord,
    Gates,
    adapter_hash,
    identify_base,
)
from phatgoose.experts.hub import locate
from phatgoose.experts.lora import read_adapter
from phatgoose.experts.renames import renamed_for
from phatgoose.experts.verify import check_modules, check_numbers
from phatgoose.train.gated_adapter import GatedAdapter
from phatgoose.train.joint.groups import GateGroup, in_groups
from phatgoose.train.joint.model import check_model
from phatgoose.train.loop.checkpoint import Progress
from phatgoose.train.loop.loop import Loop, Pass
from phatgoose.train.loop.mixed import autocasting
from phatgoose.train.loop.placement import device_of, place
from phatgoose.train.loop.run import Run, optimisation
from phatgoose.train.loop.seeding import seeded
from phatgoose.train.loop.stream import Batch, own_share, size
from phatgoose.train.loop.targets import batch_losses
from phatgoose.train.settings import GateTraining

Adapter = str | Path | Expert | Mapping[str, Delta]
Loss = Callable[[nn.Module, dict[str, Any]], Tensor]
Modules = Mapping[str, Delta]


def train_gates(
    model: Any,
    batches: Iterable[Batch],
    *,
    steps: int = GateTraining.steps,
    learning_rate: float = GateTraining.learning_rate,
    seed: int = GateTraining.seed,
    gradient_accumulation_steps: int = GateTraining.gradient_accumulation_steps,
    warmup_ratio: float = GateTraining.warmup_ratio,
    max_grad_norm: float = GateTraining.max_grad_norm,
    loss: Loss | None = None,
    autocast: torch.dtype | None = None,
    tokenizer: Any = None,
    base: str | None = None,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> Gates:
    """Train one gate per module of a PeftModel's active LoRA; the model comes back unchanged.

    Every adapted layer computes W u + scale * B A u * sigmoid(v·u), and v starts at zero. All else
    is frozen and LoRA dropout is off (arXiv:2402.05859, section 3.1). The optimiser is AdamW with a
    linear warm-up and then a constant learning rate. Gates stay in fp32, also under autocast.

    Args:
        model: a peft.PeftModel with a trained LoRA on linear layers. It may be spread by a
            device_map, or sharded by FSDP2 or DeepSpeed's ZeRO-3; under FSDP1 it is refused.
        batches: mappings of keyword arguments for the model, labels among them, as for
            transformers.Trainer. Gone through again if it ends early and can start again.
            Under `accelerate launch`, processes take turns at its batches.
        loss: `loss(model, batch)`; default `model(**batch).loss`, whose logits are computed only
            where there are labels.
        autocast: run the model in this dtype (torch.bfloat16); default: what `accelerate launch
            --mixed_precision` says, or else the model's own.
        tokenizer: if given, its fingerprint is kept, and a pool refuses another base's.
        base: the base's Hub id, where the model's config does not have it.
        checkpoint: a file to save progress in every few steps, and to go on from if it exists.

    Returns the gates; `Gates.save(adapter_dir)` writes them beside the saved adapter.

    Raises:
        UntrainedAdapterError: every lora_B is zero.
        UnsupportedAdapterError, ConfigError: not a plain LoRA, or a setting out of range.
        TrainingError: the batches end too early, or the loss is not finite.
    """
    settings = GateTraining(
        steps=steps,
        learning_rate=learning_rate,
        warmup_ratio=warmup_ratio,
        max_grad_norm=max_grad_norm,
        gradient_accumulation_steps=gradient_accumulation_steps,
        seed=seed,
    )
    run = Run.start(autocast=autocast, checkpoint=checkpoint, progress=progress)
    vectors, adapter, done = _train_alone(model, batches, settings, run, loss or model_loss)
    identity = identify_base(model.get_base_model(), tokenizer, name=base)
    return Gates(vectors, _record(identity, adapter, settings, done))


def train_gates_together(
    model: Any,
    adapters: Mapping[str, Adapter],
    batches: Mapping[str, Iterable[Batch]],
    *,
    together: int | None = None,
    steps: int = GateTraining.steps,
    learning_rate: float = GateTraining.learning_rate,
    seed: int = GateTraining.seed,
    gradient_accumulation_steps: int = GateTraining.gradient_accumulation_steps,
    warmup_ratio: float = GateTraining.warmup_ratio,
    max_grad_norm: float = GateTraining.max_grad_norm,
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

    The other settings are those of `train_gates`.

    Raises what `train_gates` raises, and:
        ConfigError: names or settings that do not fit, or a model or batch that is refused.
        IncompatibleExpertError: an adapter is not one of this base, or holds NaN.
        TrainingError: an expert's loss is not finite; it is named, and none has been updated.
        ExpertFormatError, ExpertNotFoundError: a folder cannot be read.
    """
    settings = GateTraining(
        steps=steps,
        learning_rate=learning_rate,
        warmup_ratio=warmup_ratio,
        max_grad_norm=max_grad_norm,
        gradient_accumulation_steps=gradient_accumulation_steps,
        seed=seed,
    )
    run = Run.start(autocast=autocast, checkpoint=checkpoint, progress=progress)
    return train_together(
        model, adapters, batches, settings, run, tokenizer=tokenizer, base=base, together=together
    )


def train_together(
    model: Any,
    adapters: Mapping[str, Adapter],
    batches: Mapping[str, Iterable[Batch]],
    settings: GateTraining,
    run: Run,
    *,
    tokenizer: Any,
    base: str | None = None,
    together: int | None = None,
) -> dict[str, Gates]:
    """`train_gates_together`, for those who have the settings as one."""
    check_names(adapters, batches)
    check_model(model)
    groups = list(in_groups(list(adapters), together))
    for name, adapter in adapters.items():  # all of them, before any is trained
        check_adapter(name, read_modules(adapter), model)
    place(model, run.accelerator)
    identity = identify_base(model, tokenizer, name=base)
    gates = {}
    for number, names in enumerate(groups, start=1):
        modules = {name: read_modules(adapters[name]) for name in names}
        group = GateGroup(model, modules, settings, run)
        done = group.train(
            {name: batches[name] for name in names},
            identity={"adapter": sha256(repr(group.hashes).encode()).hexdigest()},
            numbered=f" {number}/{len(groups)}" if len(groups) > 1 else "",
        )
        for expert, name in enumerate(names):
            record = _record(identity, group.hashes[name], settings, done, expert)
            gates[name] = Gates(group.vectors(expert), record)
    return gates


def _train_alone(
    model: Any, batches: Iterable[Batch], settings: GateTraining, run: Run, loss: Loss
) -> tuple[dict[str, Tensor], str, Progress]:
    """One adapter's gates, the adapter's hash, and what was done."""
    if isinstance(model, nn.Module):
        place(model, run.accelerator)
    gated = GatedAdapter(model)
    adapter = adapter_hash(gated.modules())
    forward = _Forward(model, loss, run.autocast)

    def check() -> None:
        lacking = torch.tensor(len(gated.unscaled), device=run.accelerator.device)
        if run.accelerator.reduce(lacking):  # all processes run a sharded model, or none
            gated.check_reached(forward.once_more)

    with seeded(settings.seed), gated.installed():
        done = Loop(gated.packed, optimisation(settings), run.accelerator, check=check).train(
            own_share(batches, run.accelerator),
            forward,
            identity={"adapter": adapter, **run.identity(settings)},
            checkpoint=run.checkpoint,
            progress=run.progress,
        )
    return {name: gate.detach().cpu() for name, gate in gated.gates.items()}, adapter, done


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
    expert = Expert(name, modules)
    if renamed_for(expert, model) is not expert:
        raise IncompatibleExpertError(
            f"{name}: calls its modules as an older transformers did ({next(iter(modules))}), and "
            "gates go by today's names. Write it anew with these: "
            f"phatgoose experts convert {name} --out FOLDER --base BASE"
        )
    for problem in (*check_numbers(expert), *check_modules(expert, model)):
        raise IncompatibleExpertError(problem)
    if not any(torch.any(tensor) for module in modules.values() for tensor in module.trained):
        raise UntrainedAdapterError(
            f"{name}: every lora_B is zero, so its gates would get no gradient. Train the adapter "
            "first, then its gates."
        )


def _record(
    base: BaseIdentity, adapter: str, settings: GateTraining, done: Progress, expert: int = 0
) -> GateRecord:
    """What is kept of one expert's gate phase."""
    return GateRecord(
        base=base,
        adapter=adapter,
        training=asdict(settings),
        steps=done.step,
        examples=done.examples[expert],
        tokens=done.tokens[expert],
        first_loss=None if done.first_loss is None else done.first_loss[expert],
        last_loss=None if done.last_loss is None else done.last_loss[expert],
    )


class _Forward:
    """One pass of one expert's micro-batch through the model."""

    def __init__(self, model: nn.Module, loss: Loss, autocast: torch.dtype | None) -> None:
        self.model = model
        self.loss = loss
        self.device = device_of(model)
        self.autocast = autocast
        self.last: Any = None

    def __call__(self, batch: Batch) -> Pass:
        rows, tokens = size(batch)
        if isinstance(batch, Mapping):  # else the loss makes something of it
            batch = {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        self.last = batch
        with autocasting(self.device, self.autocast):
            value = self.loss(self.model, batch)
        return Pass(value.reshape(1), [rows], tokens.reshape(1))

    def once_more(self) -> None:
        """The last pass again, and its backward."""
        with autocasting(self.device, self.autocast):
            value = self.loss(self.model, self.last)
        if value.requires_grad:
            value.backward()


def model_loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """The model's own loss, with logits only where there are labels."""
    losses = batch_losses(model, batch)
    value = model(**batch).loss if losses is None else losses.mean()
    if value is None:
        raise TrainingError("the model returned no loss. Give batches with labels, or pass loss=.")
    return value
