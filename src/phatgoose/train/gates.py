"""Training the gates of one adapter, as published."""

from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from phatgoose.errors import TrainingError
from phatgoose.experts import BaseIdentity, GateRecord, Gates, adapter_hash, identify_base
from phatgoose.train.checkpoint import Progress
from phatgoose.train.gated import GatedAdapter
from phatgoose.train.loop import Loop, Optimisation, Pass
from phatgoose.train.mixed import autocast_dtype, autocasting
from phatgoose.train.placement import device_of, place
from phatgoose.train.seeding import seeded
from phatgoose.train.settings import GateTraining
from phatgoose.train.stream import Batch, own_share, size

Loss = Callable[[nn.Module, dict[str, Any]], Tensor]


def train_gates(
    model: Any,
    batches: Iterable[Batch],
    *,
    steps: int = 100,
    learning_rate: float = 5e-3,
    seed: int = 0,
    gradient_accumulation_steps: int = 1,
    warmup_ratio: float = 0.06,
    max_grad_norm: float = 1.0,
    loss: Loss | None = None,
    autocast: torch.dtype | None = None,
    tokenizer: Any = None,
    base: str | None = None,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> Gates:
    """Train one gate per module of a PeftModel's active LoRA; the model comes back unchanged.

    Every adapted layer computes W u + scale * B A u * sigmoid(v·u) with v starting at zero; all
    else is frozen and LoRA dropout is off (arXiv:2402.05859, section 3.1). AdamW, linear warm-up,
    then a constant learning rate; gates stay in fp32, also under autocast.

    Args:
        model: a peft.PeftModel with a trained LoRA on linear layers. It may be spread by a
            device_map, or sharded by FSDP2 or DeepSpeed's ZeRO-3; under FSDP1 it is refused.
        batches: mappings of keyword arguments for the model, labels among them, as for
            transformers.Trainer. Gone through again if it ends early and can start again.
            Under `accelerate launch`, processes take turns at its batches.
        loss: `loss(model, batch)`; default `model(**batch).loss`.
        autocast: run the model in this dtype (torch.bfloat16); default: what `accelerate launch
            --mixed_precision` says, or else the model's own.
        tokenizer: if given, its fingerprint is kept, and a pool refuses another base's.
        base: the base's Hub id, where the model's config does not have it.
        checkpoint: a file to save progress in every few steps, and to go on from if it exists.

    Returns:
        The gates. `Gates.save(adapter_dir)` writes them beside the saved adapter.

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
    autocast = autocast_dtype(autocast)
    accelerator = Accelerator()
    if isinstance(model, nn.Module):
        place(model, accelerator)
    gated = GatedAdapter(model)
    adapter = adapter_hash(gated.modules())
    identity = {"adapter": adapter, **run_identity(settings, accelerator, autocast)}
    with seeded(seed), gated.installed():
        done = Loop(gated.packed, optimisation(settings), accelerator).train(
            own_share(batches, accelerator),
            _Forward(model, loss or _model_loss, autocast),
            identity=identity,
            checkpoint=None if checkpoint is None else Path(checkpoint),
            progress=progress,
        )
    return Gates(
        vectors={name: gate.detach().cpu() for name, gate in gated.gates.items()},
        record=make_record(
            identify_base(model.get_base_model(), tokenizer, name=base), adapter, settings, done
        ),
    )


def optimisation(settings: GateTraining) -> Optimisation:
    """What the loop has to know of the settings."""
    return Optimisation(
        steps=settings.steps,
        rate=settings.rate,
        max_grad_norm=settings.max_grad_norm,
        weight_decay=settings.weight_decay,
        micro=settings.gradient_accumulation_steps,
    )


def make_record(
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


def run_identity(
    settings: Any, accelerator: Accelerator, autocast: torch.dtype | None
) -> dict[str, str]:
    """What has to be the same for a run to go on from a checkpoint."""
    return {
        "number of processes": str(accelerator.num_processes),
        "autocast": str(autocast),
        **{key: str(value) for key, value in asdict(settings).items()},
    }


class _Forward:
    """One pass of one expert's micro-batch through the model."""

    def __init__(self, model: nn.Module, loss: Loss, autocast: torch.dtype | None) -> None:
        self.model = model
        self.loss = loss
        self.device = device_of(model)
        self.autocast = autocast

    def __call__(self, batch: Batch) -> Pass:
        rows, tokens = size(batch)
        batch = {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        with autocasting(self.device, self.autocast):
            value = self.loss(self.model, batch)
        return Pass(value.reshape(1), [rows], tokens.reshape(1))


def _model_loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    value = model(**batch).loss
    if value is None:
        raise TrainingError("the model returned no loss. Give batches with labels, or pass loss=.")
    return value
