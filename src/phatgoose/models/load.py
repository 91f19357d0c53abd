"""Loads a base model and its tokenizer."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from phatgoose.errors import BaseNotFoundError, ConfigError, first_line
from phatgoose.models import wheel
from phatgoose.models.named import Base, find_base, tell


def load_base(
    source: str | Path, *, device: str | None = None, dtype: torch.dtype | None = None
) -> tuple[Any, Any]:
    """A transformers model in evaluation mode, and its tokenizer, by folder, Hub id or name.

    The names are `SMOLLM2`, which is fetched where it is not on this disk, and `TINY`.

    `device` is the first accelerator by default; `dtype` is fp32 on a CPU and bf16 elsewhere.

    Raises:
        BaseNotFoundError: the folder or the Hub does not give them.
        ConfigError: torch cannot use the device, or the tokenizer has no token to pad with.
    """
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForSeq2SeqLM,
        AutoTokenizer,
    )

    device = device or best_device()
    _check_device(device)
    if dtype is None:
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
    base = find_base(source)
    tell(base)
    name = base.source
    try:
        config = AutoConfig.from_pretrained(name)
        kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        tokenizer = AutoTokenizer.from_pretrained(name)
        model: nn.Module = kind.from_pretrained(name, dtype=dtype)
    except Exception as error:  # transformers raises many kinds, some only through its backends
        raise BaseNotFoundError(
            f"{name}: no base model could be loaded from it ({first_line(error)}). Give a folder "
            "saved with save_pretrained, or a Hub id and a network."
        ) from error
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ConfigError(
                f"{name}: its tokenizer has neither a padding nor an end-of-sequence token. Give "
                "it one, and save it again."
            )
        tokenizer.pad_token = tokenizer.eos_token
    _rename(model, tokenizer, base)
    return model.to(device).eval(), tokenizer


def _rename(model: Any, tokenizer: Any, base: Base) -> None:
    """Let a base be known by its name, wherever on this disk it was read from."""
    if base.revision is not None:
        model.name_or_path = tokenizer.name_or_path = model.config._name_or_path = base.name
        model.config._commit_hash = base.revision
        model.generation_config.eos_token_id = wheel.ENDS


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:  # the former from a torch built without it
        raise ConfigError(
            f"{device}: no device that torch can use here ({first_line(error)}). Give cpu, cuda or "
            "the like."
        ) from None


def best_device() -> str:
    """The accelerator that torch sees, or else the CPU."""
    if torch.accelerator.is_available():
        return str(torch.accelerator.current_accelerator())
    return "cpu"
