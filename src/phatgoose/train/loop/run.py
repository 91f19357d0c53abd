"""Says how a phase is run, whatever it trains."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from phatgoose.train.loop.loop import CHECKPOINT_EVERY, Optimisation
from phatgoose.train.loop.mixed import autocast_dtype
from phatgoose.train.settings import MAX_GRAD_NORM, AdapterTraining, GateTraining


@dataclass(frozen=True, kw_only=True)
class Run:
    """The processes and the precision of a phase, and what is kept and told on the way."""

    accelerator: Accelerator
    autocast: torch.dtype | None
    checkpoint: Path | None  # a file; for groups of experts a folder, with a file for each group
    progress: bool

    @classmethod
    def start(
        cls, *, autocast: torch.dtype | None, checkpoint: str | Path | None, progress: bool
    ) -> "Run":
        """Raises ConfigError where `autocast`, or what the launcher says of it, is not bfloat16."""
        dtype = autocast_dtype(autocast)
        return cls(
            accelerator=Accelerator(),
            autocast=dtype,
            checkpoint=None if checkpoint is None else Path(checkpoint),
            progress=progress,
        )

    def identity(self, settings: Any) -> dict[str, str]:
        """Return what has to be the same for a run to go on from a checkpoint."""
        return {
            "number of processes": str(self.accelerator.num_processes),
            "autocast": str(self.autocast),
            **{key: str(value) for key, value in asdict(settings).items()},
        }


def optimisation(settings: AdapterTraining | GateTraining) -> Optimisation:
    """Return what the loop has to know of a phase."""
    if isinstance(settings, GateTraining):
        return Optimisation(
            steps=settings.steps,
            rate=settings.rate,
            max_grad_norm=settings.max_grad_norm,
            weight_decay=settings.weight_decay,
            micro=settings.gradient_accumulation_steps,
        )
    return Optimisation(
        steps=settings.steps,
        rate=settings.rate,
        max_grad_norm=MAX_GRAD_NORM,
        weight_decay=settings.weight_decay,
        # Adapters are large beside gates, so there are at most some twenty checkpoints.
        checkpoint_every=max(CHECKPOINT_EVERY, settings.steps // 20),
    )
