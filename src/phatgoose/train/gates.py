"""Training the gates of one adapter, as published."""

import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from tqdm.auto import tqdm

from phatgoose.errors import ConfigError, TrainingError
from phatgoose.experts import GateRecord, Gates, adapter_hash, identify_base
from phatgoose.train.checkpoint import Progress, load_checkpoint, save_checkpoint
from phatgoose.train.gated import GatedAdapter

Batch = Mapping[str, Any]
Loss = Callable[[nn.Module, dict[str, Any]], Tensor]
CHECKPOINT_EVERY = 10  # steps


@dataclass(frozen=True, kw_only=True)
class GateTraining:
    """Settings of the gate phase; defaults as published (arXiv:2402.05859, section 4 and code)."""

    steps: int = 100
    learning_rate: float = 5e-3  # published with batches of 1024 sequences
    warmup_ratio: float = 0.06  # linear, then constant
    max_grad_norm: float = 1.0
    weight_decay: float = 0.0
    gradient_accumulation_steps: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"steps must be at least 1, got {self.steps}.")
        if not self.learning_rate > 0:
            raise ConfigError(f"learning_rate must be above 0, got {self.learning_rate}.")
        if not 0 <= self.warmup_ratio <= 1:
            raise ConfigError(f"warmup_ratio must be between 0 and 1, got {self.warmup_ratio}.")
        if not self.max_grad_norm > 0:
            raise ConfigError(f"max_grad_norm must be above 0, got {self.max_grad_norm}.")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed must be between 0 and 2**32 - 1, got {self.seed}.")
        if self.gradient_accumulation_steps < 1:
            raise ConfigError(
                "gradient_accumulation_steps must be at least 1, got "
                f"{self.gradient_accumulation_steps}."
            )


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
        model: a peft.PeftModel with a trained LoRA on linear layers.
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
    autocast = _autocast_dtype(autocast)
    gated = GatedAdapter(model)
    adapter = adapter_hash(gated.modules())
    accelerator = Accelerator()
    if accelerator.num_processes > 1 and not hasattr(model, "hf_device_map"):
        model.to(accelerator.device)
        for gate in gated.gates.values():
            gate.data = gate.data.to(accelerator.device)
    with seeded(seed), gated.installed():
        run = _Run(gated, settings, accelerator, loss or _model_loss, autocast)
        path = None if checkpoint is None else Path(checkpoint)
        done = run.train(batches, adapter, path, progress)
    return Gates(
        vectors={name: gate.detach().cpu() for name, gate in gated.gates.items()},
        record=GateRecord(
            base=identify_base(model.get_base_model(), tokenizer, name=base),
            adapter=adapter,
            training=asdict(settings),
            steps=done.step,
            examples=done.examples,
            tokens=done.tokens,
            first_loss=done.first_loss,
            last_loss=done.last_loss,
        ),
    )


class _Run:
    """One gate phase: the optimiser, and the loop."""

    def __init__(
        self,
        gated: GatedAdapter,
        settings: GateTraining,
        accelerator: Accelerator,
        loss: Loss,
        autocast: torch.dtype | None,
    ) -> None:
        self.gated = gated
        self.settings = settings
        self.accelerator = accelerator
        self.loss = loss
        self.gates = list(gated.gates.values())
        self.device = next(gated.model.parameters()).device
        self.autocast = autocast
        self.optimizer = torch.optim.AdamW(
            self.gates, lr=settings.learning_rate, weight_decay=settings.weight_decay
        )

    def train(
        self, batches: Iterable[Batch], adapter: str, checkpoint: Path | None, progress: bool
    ) -> Progress:
        """Take all steps, from the checkpoint on if there is one."""
        done = Progress()
        identity = {
            "adapter": adapter,
            "number of processes": str(self.accelerator.num_processes),
            "autocast": str(self.autocast),
            **{k: str(v) for k, v in asdict(self.settings).items()},
        }
        if checkpoint is not None and checkpoint.exists():
            done = load_checkpoint(checkpoint, identity, self.gated.gates, self.optimizer)
        micro = self.settings.gradient_accumulation_steps
        stream = self._mine(batches)
        remaining = self.settings.steps - done.step
        if remaining:
            _skip(stream, done.step * micro)
        bar = tqdm(
            total=self.settings.steps,
            initial=done.step,
            desc="gates",
            unit="step",
            disable=not (progress and self.accelerator.is_main_process),
        )
        with bar:
            while done.step < self.settings.steps:
                done = self._step(list(islice(stream, micro)), done)
                bar.set_postfix(loss=f"{done.last_loss:.3f}")
                bar.update()
                ended = done.step == self.settings.steps
                due = ended or done.step % CHECKPOINT_EVERY == 0
                if checkpoint is not None and due and self.accelerator.is_main_process:
                    save_checkpoint(checkpoint, identity, self.gated.gates, self.optimizer, done)
        return done

    def _step(self, batches: list[Batch], done: Progress) -> Progress:
        self._set_learning_rate(done.step)
        for gate in self.gates:
            gate.grad = torch.zeros_like(gate)  # a module this batch does not use has a zero too
        total = torch.zeros((), device=self.device)
        examples = tokens = 0
        for batch in batches:
            batch = {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
            rows, count = _size(batch)
            examples, tokens = examples + rows, tokens + count
            with self._autocast():
                value = self.loss(self.gated.model, batch) / len(batches)
            if not value.requires_grad:
                raise TrainingError(
                    "the loss does not depend on the gates. Give a loss that runs the model with "
                    "its adapter on, and checkpoint gradients with use_reentrant=False."
                )
            value.backward()
            total += value.detach()
        total = self._reduce_gradients(total)
        if not torch.isfinite(total):
            raise TrainingError(
                f"the loss is {float(total)} at step {done.step + 1}. Check the data for empty "
                "targets, or use bfloat16 or float32."
            )
        norm = torch.nn.utils.clip_grad_norm_(self.gates, self.settings.max_grad_norm)
        if not torch.isfinite(norm):
            raise TrainingError(
                f"the gradient's norm is {float(norm)} at step {done.step + 1}. Use bfloat16 or "
                "float32."
            )
        self.optimizer.step()
        processes = self.accelerator.num_processes
        return Progress(
            step=done.step + 1,
            examples=done.examples + examples * processes,
            tokens=done.tokens + tokens * processes,
            first_loss=float(total) if done.first_loss is None else done.first_loss,
            last_loss=float(total),
        )

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast)

    def _reduce_gradients(self, total: Tensor) -> Tensor:
        """Average gradients and loss over the processes; gates are small, so one message does."""
        if self.accelerator.num_processes == 1:
            return total
        gradients = [gate.grad for gate in self.gates if gate.grad is not None]  # _step made all
        message = torch.cat([total.view(1), *gradients])
        message = self.accelerator.reduce(message, reduction="mean")
        start = 1
        for gate in self.gates:
            gate.grad = message[start : start + gate.numel()].view_as(gate)
            start += gate.numel()
        return message[0]

    def _set_learning_rate(self, step: int) -> None:
        warmup = max(1, round(self.settings.warmup_ratio * self.settings.steps))
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * min(1.0, (step + 1) / warmup)

    def _mine(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """This process's share of the batches, starting again when they end."""
        from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard

        shared = isinstance(batches, DataLoaderShard | DataLoaderDispatcher)
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        endless = _again_and_again(batches)
        return endless if shared or processes == 1 else islice(endless, rank, None, processes)


def _autocast_dtype(asked: torch.dtype | None) -> torch.dtype | None:
    """What to autocast to: what was asked for, else what the launcher says.

    Accelerator.autocast() would follow whichever Trainer this process ran last.
    """
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked not in (None, torch.bfloat16) or (asked is None and launched not in ("no", "bf16")):
        raise ConfigError(f"autocast: torch.bfloat16 or None is wanted, got {asked or launched}.")
    return torch.bfloat16 if asked is None and launched == "bf16" else asked


def _again_and_again(batches: Iterable[Batch]) -> Iterator[Batch]:
    given = 0
    while True:
        before = given
        for batch in batches:
            given += 1
            yield batch
        if given == before:
            raise TrainingError(
                f"the batches ended after {given}. Pass a list or a DataLoader, which can start "
                "again, or ask for fewer steps."
            )


def _skip(stream: Iterator[Batch], count: int) -> None:
    for _ in islice(stream, count):
        pass


def _model_loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    value = model(**batch).loss
    if value is None:
        raise TrainingError("the model returned no loss. Give batches with labels, or pass loss=.")
    return value


def _size(batch: Batch) -> tuple[int, int]:
    """Examples and real tokens of a batch."""
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    if ids is None:
        return 0, 0
    return ids.shape[0], ids.numel() if mask is None else int(mask.sum())


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed every random generator, and put back what was there."""
    before = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        try:
            set_seed(seed)
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])
