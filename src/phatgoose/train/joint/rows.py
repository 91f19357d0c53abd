"""Puts one batch together from those of several experts, and knows whose rows are whose."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int, Shaped
from torch import Tensor

from phatgoose.errors import ConfigError
from phatgoose.tasks import IGNORED
from phatgoose.train.loop.stream import Batch

# What a batch may hold, each [rows, length], and what a shorter one is filled up with.
FILL = {
    "input_ids": None,  # the model's padding token
    "attention_mask": 0,
    "labels": IGNORED,
    "position_ids": 0,
    "token_type_ids": 0,
    "decoder_input_ids": None,
    "decoder_attention_mask": 0,
}


@dataclass(frozen=True)
class Rows:
    """The experts' rows lie one after the other: `counts[e]` rows are expert e's.

    If all have equally many rows, each expert's tokens are one batch of a batched product (G = E),
    and its factors are used as they are. Otherwise each row is one batch (G = B) and takes its
    expert's factors, which are small beside the row: R rows to its L.
    """

    counts: Sequence[int]
    owners: Int[Tensor, " B"]  # the expert of each row

    @classmethod
    def of(cls, counts: Sequence[int], device: torch.device) -> "Rows":
        owners = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        return cls(counts, owners.to(device, non_blocking=True))

    @property
    def equal(self) -> bool:
        return len(set(self.counts)) == 1

    def batched(self, x: Shaped[Tensor, "*B_L I"]) -> Shaped[Tensor, "G T I"]:
        """Return a view with tokens that share factors side by side."""
        groups = len(self.counts) if self.equal else len(self.owners)
        return x.reshape(groups, -1, x.shape[-1])

    def each(self, factors: Shaped[Tensor, "E *N"]) -> Shaped[Tensor, "G *N"]:
        """Return the factors of each of them."""
        return factors if self.equal else factors.index_select(0, self.owners.to(factors.device))

    def sums(self, x: Shaped[Tensor, " B"]) -> Shaped[Tensor, " E"]:
        """Sum over each expert's rows. One expert's NaN does not reach another."""
        zeros = x.new_zeros(len(self.counts))
        return zeros.index_add(0, self.owners.to(x.device), x)


def put_together(
    batches: Mapping[str, Batch], *, pad: int, device: torch.device
) -> tuple[dict[str, Tensor], Tensor, Rows]:
    """Make one batch of all experts' rows, padded on the right to a common length.

    Its inputs are on the device; its labels stay where the batches are.

    Raises ConfigError, naming the expert, where a batch holds what cannot be put together.
    """
    whole = [_checked(name, batch) for name, batch in batches.items()]
    keys = {key for batch in whole for key in batch}
    for name, batch in zip(batches, whole, strict=True):
        missing = sorted(keys - set(batch))
        if missing:
            raise ConfigError(
                f"{name}: its batch has no {missing[0]}, those of others have. Give every expert "
                "batches of the same kind."
            )
    joint = {}
    for key in sorted(keys):
        parts = [batch[key] for batch in whole]
        longest, fill = max(part.shape[1] for part in parts), FILL[key]
        fill = pad if fill is None else fill
        padded = [F.pad(part, (0, longest - part.shape[1]), value=fill) for part in parts]
        joint[key] = torch.cat(padded)
    labels = joint.pop("labels")
    joint = {key: value.to(device, non_blocking=True) for key, value in joint.items()}
    return joint, labels, Rows.of([batch["input_ids"].shape[0] for batch in whole], device)


def _checked(name: str, batch: Batch) -> dict[str, Tensor]:
    """Return a batch's tensors, with a mask if it has none."""
    for key in ("input_ids", "labels"):
        if key not in batch:
            raise ConfigError(f"{name}: its batch has no {key}. Give batches with labels.")
    for key, value in batch.items():
        if key not in FILL:
            raise ConfigError(
                f"{name}: its batch has {key}, which is not put together with those of others. "
                f"Leave it out, or train alone. Known: {', '.join(FILL)}."
            )
        shape: Any = getattr(value, "shape", None)
        if shape is None or len(shape) != 2 or shape[0] != batch["input_ids"].shape[0]:
            found = type(value).__name__ if shape is None else list(shape)
            raise ConfigError(
                f"{name}: {key} of its batch is {found}, a tensor of [rows, length] is wanted."
            )
    mask = batch.get("attention_mask")
    return {
        **batch,
        "attention_mask": torch.ones_like(batch["input_ids"]) if mask is None else mask,
    }
