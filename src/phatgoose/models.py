"""Loading a base model and its tokenizer from a folder or the Hub."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from phatgoose.errors import ConfigError, ExpertNotFoundError, first_line


def load_base(
    source: str | Path, *, device: str | None = None, dtype: torch.dtype | None = None
) -> tuple[Any, Any]:
    """A transformers model in evaluation mode, and its tokenizer, by folder or Hub id.

    `device` is the first accelerator by default; `dtype` is fp32 on a CPU and bf16 elsewhere.

    Raises:
        ExpertNotFoundError: the folder or the Hub does not give them.
        ConfigError: torch cannot use the device, or the tokenizer has no token to pad with.
    """
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForSeq2SeqLM,
        AutoTokenizer,
    )

    name = str(source)
    device = device or best_device()
    _check_device(device)
    if dtype is None:
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
    try:
        config = AutoConfig.from_pretrained(name)
        kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        tokenizer = AutoTokenizer.from_pretrained(name)
        model: nn.Module = kind.from_pretrained(name, dtype=dtype)
    except Exception as error:  # transformers raises many kinds, some only through its backends
        raise ExpertNotFoundError(
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
    return model.to(device).eval(), tokenizer


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:  # the former from a torch built without it
        raise ConfigError(
            f"{device}: no device that torch can use here ({first_line(error)}). Give cpu, cuda or "
            "the like."
        ) from None


def best_device() -> str:
    """The accelerator torch sees, else the CPU."""
    if torch.accelerator.is_available():
        return str(torch.accelerator.current_accelerator())
    return "cpu"
