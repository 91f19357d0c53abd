"""Progress of a gate phase on disk, to go on from after an interrupt."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from phatgoose.errors import ConfigError
from phatgoose.experts.tensors import read_tensors
from phatgoose.files import write_tensors

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Progress:
    """How far a gate phase is."""

    step: int = 0
    examples: int = 0
    tokens: int = 0
    first_loss: float | None = None
    last_loss: float | None = None


def save_checkpoint(
    path: Path,
    identity: Mapping[str, str],
    gates: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    done: Progress,
) -> None:
    """Write gates, AdamW moments and progress into one safetensors file, atomically."""
    tensors = {f"gate {name}": gate for name, gate in gates.items()}
    for name, gate in gates.items():
        for moment in MOMENTS:
            tensors[f"{moment} {name}"] = optimizer.state[gate][moment]
    metadata = {"identity": json.dumps(dict(identity)), "progress": json.dumps(asdict(done))}
    write_tensors(path, tensors, metadata)


def load_checkpoint(
    path: Path,
    identity: Mapping[str, str],
    gates: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
) -> Progress:
    """Put gates and optimiser back; ConfigError if the file is of another adapter or settings."""
    tensors, metadata = read_tensors(path)
    saved = json.loads(metadata.get("identity", "{}"))
    different = sorted(key for key in identity if saved.get(key) != identity[key])
    if different:
        raise ConfigError(
            f"{path}: was written with another {different[0]}. Delete it to start afresh, or use "
            "the same adapter and settings to go on."
        )
    done = Progress(**json.loads(metadata["progress"]))
    for name, gate in gates.items():
        gate.data.copy_(tensors[f"gate {name}"])
        optimizer.state[gate] = {
            "step": torch.tensor(float(done.step)),
            **{moment: tensors[f"{moment} {name}"].to(gate.device) for moment in MOMENTS},
        }
    return done
