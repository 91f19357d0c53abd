"""Quantising a base while it is loaded."""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from phatgoose.errors import ConfigError


def _bitsandbytes(**how: Any) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(**how)


def _torchao(_: torch.dtype) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def _gguf(_: torch.dtype) -> Any:
    import transformers

    if not hasattr(transformers, "GgufConfig"):
        raise ConfigError(
            f"quantization: transformers {transformers.__version__} unpacks a gguf. Leave gguf "
            "out, or take a newer one."
        )
    return transformers.GgufConfig()


# By name: the package that does it, and transformers' config, given the dtype to compute in.
QUANTIZATIONS: dict[str, tuple[str, Callable[[torch.dtype], Any]]] = {
    "bnb-8bit": ("bitsandbytes", lambda _: _bitsandbytes(load_in_8bit=True)),
    "bnb-4bit": (
        "bitsandbytes",
        lambda dtype: _bitsandbytes(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        ),
    ),
    "torchao-int8": ("torchao", _torchao),
    "gguf": ("gguf", _gguf),  # a base that is a gguf stays packed, where there is a kernel for it
}


def quantization_config(name: str, dtype: torch.dtype) -> Any:
    """What transformers wants to quantise a base. Raises ConfigError where it cannot."""
    if name not in QUANTIZATIONS:
        raise ConfigError(
            f"quantization: {name!r} is unknown. Choose from: {', '.join(QUANTIZATIONS)}. A base "
            "that is saved quantised needs none."
        )
    package, make = QUANTIZATIONS[name]
    if importlib.util.find_spec(package) is None:
        raise ConfigError(f"quantization: {name} needs a package: pip install {package}")
    return make(dtype)
