"""The loop that all phases share: AdamW with a norm to clip at for each expert."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from jaxtyping import Float, Shaped
from torch import Tensor
from tqdm.auto import tqdm

from phatgoose.errors import TrainingError
from phatgoose.locks import claimed
from phatgoose.train.loop.checkpoint import Progress, load_checkpoint, save_checkpoint
from phatgoose.train.loop.packed import Packed
from phatgoose.train.loop.stream import skip

T = TypeVar("T")
CHECKPOINT_EVERY = 10  # steps


@dataclass(frozen=True, kw_only=True)
class Optimisation:
    """What the loop has to know of a phase's settings."""

    steps: int
    rate: Callable[[int], float]  # the learning rate of a step, counted from zero
    max_grad_norm: float
    weight_decay: float
    micro: int = 1  # micro-batches a step
    checkpoint_every: int = CHECKPOINT_EVERY


@dataclass(frozen=True)
class Pass:
    """A forward pass over one micro-batch, by expert."""

    losses: Float[Tensor, " E"]  # nats per target token, with their graph
    examples: Sequence[int]
    tokens: Shaped[Tensor, " E"]


class Loop:
    """Trains packed parameters; experts share steps and rate, and nothing else."""

    def __init__(
        self,
        packed: Packed,
        settings: Optimisation,
        accelerator: Accelerator,
        *,
        names: Sequence[str] = (),
        what: str = "gates",
        check: Callable[[], None] | None = None,
    ) -> None:
        self.packed = packed
        self.settings = settings
        self.accelerator = accelerator
        self.names = names
        self.what = what
        self.check = check  # called once, after a first backward and before anything is updated
        self.optimizer = torch.optim.AdamW(
            packed.vectors, lr=settings.rate(0), weight_decay=settings.weight_decay
        )

    def train(
        self,
        stream: Iterator[T],
        forward: Callable[[T], Pass],
        *,
        identity: Mapping[str, str],
        checkpoint: Path | None,
        progress: bool,
    ) -> Progress:
        """Take all steps, from the checkpoint on if there is one.

        Raises ConfigError where another process trains with this checkpoint.
        """
        saves = checkpoint if self.accelerator.is_main_process else None
        with self._claimed(saves):
            before = Progress.none(self.packed.experts)
            if checkpoint is not None and checkpoint.exists():
                before = load_checkpoint(checkpoint, identity, self.packed, self.optimizer)
            done = before
            for done in self._steps(stream, forward, before, progress=progress):
                ended = done.step == self.settings.steps
                due = ended or done.step % self.settings.checkpoint_every == 0
                if saves is not None and due:
                    save_checkpoint(saves, identity, self.packed, self.optimizer, done)
        return done

    def _claimed(self, checkpoint: Path | None) -> AbstractContextManager[None]:
        if checkpoint is None:
            return nullcontext()
        return claimed(checkpoint.with_name(f".{checkpoint.name}.lock"), str(checkpoint))

    def _steps(
        self, stream: Iterator[T], forward: Callable[[T], Pass], done: Progress, *, progress: bool
    ) -> Iterator[Progress]:
        """Take the steps that are left, and yield after each of them."""
        settings = self.settings
        if done.step < settings.steps:
            skip(stream, done.step * settings.micro)
        bar = tqdm(
            total=settings.steps,
            initial=done.step,
            desc=self.what,
            unit="step",
            disable=not (progress and self.accelerator.is_main_process),
        )
        with bar:
            while done.step < settings.steps:
                done = self._step(list(islice(stream, settings.micro)), forward, done)
                losses = done.last_loss or []
                bar.set_postfix(loss=f"{sum(losses) / len(losses):.3f}")
                bar.update()
                yield done

    def _step(self, batches: list[T], forward: Callable[[T], Pass], done: Progress) -> Progress:
        rate = self.settings.rate(done.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.packed.zero_grad()
        totals: Any = 0.0  # [3 E]: losses, examples, tokens
        for batch in batches:
            one = forward(batch)
            if not one.losses.requires_grad:
                self._checked()
                raise TrainingError(
                    f"the loss does not depend on the {self.what}. Give a loss that runs the model "
                    "with its adapter on, and checkpoint gradients with use_reentrant=False."
                )
            # Each expert's loss depends on its own parameters alone, so one sum serves all.
            (one.losses.sum() / len(batches)).backward()
            losses = one.losses.detach().float() / len(batches)
            on_device = losses.device.type != "cpu"  # then a copy to it need not be waited for
            counts = [
                count.to(losses, non_blocking=on_device)
                for count in (torch.tensor(one.examples), one.tokens)
            ]
            totals = totals + torch.stack([losses, *counts])
        self._checked()
        totals = self._reduce(totals)
        norms = self.packed.norms()
        # The only time a step waits for the device.
        losses, examples, tokens, lengths = torch.cat([totals, norms.to(totals)[None]]).tolist()
        self._refuse("loss", losses, done.step + 1)
        self._refuse("gradient's norm", lengths, done.step + 1)
        self.packed.clip(norms, self.settings.max_grad_norm)
        self.optimizer.step()
        return Progress(
            step=done.step + 1,
            examples=[a + round(b) for a, b in zip(done.examples, examples, strict=True)],
            tokens=[a + round(b) for a, b in zip(done.tokens, tokens, strict=True)],
            first_loss=done.first_loss or losses,
            last_loss=losses,
        )

    def _checked(self) -> None:
        if self.check is not None:
            self.check()
            self.check = None

    def _reduce(self, totals: Float[Tensor, "3 E"]) -> Float[Tensor, "3 E"]:
        """Average gradients and losses over the processes, and add up the counts."""
        processes = self.accelerator.num_processes
        if processes == 1:
            return totals
        for gradient in self.packed.gradients:
            gradient.copy_(self.accelerator.reduce(gradient, reduction="mean"))
        totals = self.accelerator.reduce(totals, reduction="mean")
        return torch.cat([totals[:1], totals[1:] * processes])

    def _refuse(self, what: str, values: Sequence[float], step: int) -> None:
        """Stop before anything is updated, naming every expert whose value is not finite."""
        bad = [i for i, value in enumerate(values) if not abs(value) < float("inf")]
        if not bad:
            return
        who = f"{', '.join(self.names[i] for i in bad)}: " if self.names else ""
        data = "Check the data for empty targets, or use" if what == "loss" else "Use"
        raise TrainingError(
            f"{who}the {what} is {values[bad[0]]} at step {step}. {data} bfloat16 or float32."
        )
