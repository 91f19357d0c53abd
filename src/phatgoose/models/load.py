"""Loads a base model and its tokenizer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from phatgoose.errors import BaseNotFoundError, ConfigError, first_line
from phatgoose.models import wheel
from phatgoose.models.named import Base, find_base, tell
from phatgoose.models.quantization import quantization_config


def load_base(
    source: str | Path,
    *,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    quantization: str | None = None,
    device_map: str | Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """A transformers model in evaluation mode, and its tokenizer, by folder, Hub id or name.

    The names are `SMOLLM2`, which is fetched where it is not on this disk, and `TINY`.

    Args:
        device: the first accelerator by default.
        dtype: by default fp32 on a CPU and bf16 elsewhere.
        quantization: one of `QUANTIZATIONS`; a base that is saved quantised needs none.
        device_map: how accelerate spreads the layers over devices, in place of `device`.
        trust_remote_code: run what Python code the base brings along.

    Raises:
        BaseNotFoundError: the folder or the Hub does not give them.
        ConfigError: torch cannot use the device, a package is missing, the base has code of its
            own that is not trusted, or the tokenizer has no token to pad with.
    """
    if device is not None and device_map is not None:
        raise ConfigError("device and device_map: both say where the base is. Leave one out.")
    device = device or best_device()
    _check_device(device)
    if dtype is None:
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
    how: dict[str, Any] = {"dtype": dtype}
    if quantization is not None:
        how["quantization_config"] = quantization_config(quantization, dtype)
    if device_map is not None:
        how["device_map"] = device_map
    base = find_base(source)
    tell(base)
    model, tokenizer = _read(base.source, device, how, trust_remote_code)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ConfigError(
                f"{base.source}: its tokenizer has neither a padding nor an end-of-sequence token. "
                "Give it one, and save it again."
            )
        tokenizer.pad_token = tokenizer.eos_token
    _rename(model, tokenizer, base)
    return model.eval(), tokenizer


def _read(name: str, device: str, how: Mapping[str, Any], trusted: bool) -> tuple[Any, Any]:
    """The model, on its device, and its tokenizer; `how` is what from_pretrained takes."""
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForSeq2SeqLM,
        AutoTokenizer,
    )

    quantised = "quantization_config" in how
    try:
        where, common = _where(name)
        common["trust_remote_code"] = trusted
        config = AutoConfig.from_pretrained(where, **common)
        quantised |= getattr(config, "quantization_config", None) is not None
        if quantised:  # what is quantised cannot always be moved
            how = {"device_map": {"": device}, **how}
        kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        tokenizer = AutoTokenizer.from_pretrained(where, **common)
        model: Any = kind.from_pretrained(where, **common, **how)
    except Exception as error:  # transformers raises many kinds, some only through its backends
        if "trust_remote_code" in str(error) and not trusted:
            raise ConfigError(
                f"{name}: brings Python code of its own, which runs only if you say so: "
                "--trust-remote-code, or trust_remote_code=True. Read it first."
            ) from error
        if isinstance(error, ImportError) or quantised:
            raise ConfigError(
                f"{name}: cannot be loaded here ({first_line(error)}). Install what it names, or "
                "give a base that is not quantised."
            ) from error
        raise BaseNotFoundError(
            f"{name}: no base model could be loaded from it ({first_line(error)}). Give a folder "
            "saved with save_pretrained, or a Hub id and a network."
        ) from error
    return model if "device_map" in how else model.to(device), tokenizer


def _where(name: str) -> tuple[str, dict[str, Any]]:
    """What transformers is to read: a folder or Hub id, and which gguf in it if one is meant."""
    path = Path(name)
    if path.suffix == ".gguf" and path.is_file():
        return str(path.parent), {"gguf_file": path.name}
    return name, {}


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
