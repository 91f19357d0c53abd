"""The base that a command's options ask for."""

from pathlib import Path
from typing import Any

import torch

from phatgoose.cli.options import LoadOptions, read_map
from phatgoose.models import load_base


def load(
    base: str | Path, asked: LoadOptions, *, training: bool = False, device: str | None = None
) -> tuple[Any, Any]:
    """The base and its tokenizer; in float32 for training unless a dtype is named.

    `device` counts where the options name none.
    """
    dtype = getattr(torch, asked.dtype) if asked.dtype else None
    return load_base(
        base,
        device=asked.device or device,
        dtype=torch.float32 if training and dtype is None else dtype,
        quantization=asked.quantization,
        device_map=read_map(asked.device_map),
        trust_remote_code=asked.trust_remote_code,
    )
