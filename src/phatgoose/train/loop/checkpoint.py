"""Keeps the progress of a training phase on disk, to go on from after an interrupt."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from phatgoose.errors import ConfigError
from phatgoose.experts.tensors import read_tensors
from phatgoose.files import write_tensors
from phatgoose.train.loop.packed import Packed

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Progress:
    """How far a phase is: steps, and for each expert what it saw and its loss."""

    step: int
    examples: list[int]
    tokens: list[int]
    first_loss: list[float] | None = None
    last_loss: list[float] | None = None

    @classmethod
    def none(cls, experts: int) -> "Progress":
        return cls(0, [0] * experts, [0] * experts)


def save_checkpoint(
    path: Path,
    identity: Mapping[str, str],
    packed: Packed,
    optimizer: torch.optim.Optimizer,
    done: Progress,
) -> None:
    """Write parameters, AdamW moments and progress into one safetensors file, atomically."""
    tensors = {f"value {name}": value.data for name, value in packed.parameters.items()}
    for moment in MOMENTS:
        tensors |= {f"{moment} {name}": part for name, part in packed.moments(optimizer, moment)}
    metadata = {"identity": json.dumps(dict(identity)), "progress": json.dumps(asdict(done))}
    write_tensors(path, tensors, metadata)


def load_checkpoint(
    path: Path,
    identity: Mapping[str, str],
    packed: Packed,
    optimizer: torch.optim.Optimizer,
) -> Progress:
    """Put all of it back. Raises ConfigError if the file is of other adapters or settings."""
    tensors, metadata = read_tensors(path)
    saved = json.loads(metadata.get("identity", "{}"))
    different = sorted(key for key in identity if saved.get(key) != identity[key])
    if different:
        raise ConfigError(
            f"{path}: was written with another {different[0]}. Delete it to start afresh, or use "
            "the same adapter and settings to go on."
        )
    done = Progress(**json.loads(metadata["progress"]))
    for vector in packed.vectors:
        optimizer.state[vector] = {
            "step": torch.tensor(float(done.step)),
            **{moment: torch.zeros_like(vector) for moment in MOMENTS},
        }
    for name, value in packed.parameters.items():
        value.data.copy_(tensors[f"value {name}"])
    for moment in MOMENTS:
        for name, part in packed.moments(optimizer, moment):
            part.copy_(tensors[f"{moment} {name}"])
    return done
