"""Chooses mixed precision: which, and where."""

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from phatgoose.errors import ConfigError


def autocast_dtype(asked: torch.dtype | None) -> torch.dtype | None:
    """Return what to autocast to: what was asked for, else what the launcher says.

    Accelerator.autocast() would follow whichever Trainer this process ran last.
    """
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked not in (None, torch.bfloat16) or (asked is None and launched not in ("no", "bf16")):
        raise ConfigError(f"autocast: torch.bfloat16 or None is wanted, got {asked or launched}.")
    return torch.bfloat16 if asked is None and launched == "bf16" else asked


def autocasting(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)
