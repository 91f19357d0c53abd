"""env."""

import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.constants import HF_HUB_CACHE

import phatgoose
from phatgoose.cli.arguments.about import Env
from phatgoose.default import smollm2, tiny
from phatgoose.models import best_device
from phatgoose.models.named import cache
from phatgoose.ops import choose_backend

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "peft",
    "accelerate",
    "safetensors",
    "huggingface_hub",
    "numpy",
    "trl",
    "datasets",
    "lm_eval",
    "vllm",
)
# What changes how we run. Of a secret, only whether it is set is told.
VARIABLES = (
    "ACCELERATE_MIXED_PRECISION",
    "CUDA_VISIBLE_DEVICES",
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "OMP_NUM_THREADS",
    "PHATGOOSE_ALLOW_HUB",
    "PHATGOOSE_EXPERTS_ROOT",
    "TRITON_INTERPRET",
)
SECRETS = ("HF_TOKEN", "PHATGOOSE_ADMIN_KEY", "VLLM_API_KEY")


def env(asked: Env) -> None:
    """Versions, devices, backends and paths."""
    told = {
        "versions": _versions(),
        "devices": _devices(),
        "paths": _paths(),
        "environment": _environment(),
    }
    if asked.json:
        print(json.dumps(told))
        return
    for title, rows in told.items():
        print(f"{title}:")
        for name, value in rows.items():
            print(f"  {name}: {'not installed' if value is None else value}")


def _versions() -> dict[str, str | None]:
    return {
        "phatgoose": phatgoose.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        **{name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> dict[str, Any]:
    """Every device, the one that commands take, and what computes routed layers there."""
    found: dict[str, Any] = {"cpu": f"{platform.machine()}, {torch.get_num_threads()} threads"}
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        gpu = torch.cuda.get_device_properties(index)
        found[f"cuda:{index}"] = (
            f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}, "
            f"{gpu.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
        )
    device = best_device()
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    kind = torch.device(device).type
    return {**found, "chosen": device, "backend": choose_backend("auto", kind, dtype)}


def _paths() -> dict[str, str]:
    return {
        "phatgoose": str(Path(phatgoose.__file__).parent),
        "python": sys.executable,
        "base in the package": str(tiny.BASE),
        "its experts": str(tiny.EXPERTS),
        "SmolLM2's experts": str(smollm2.EXPERTS),
        "fetched bases": str(cache()),
        "Hub cache": str(HF_HUB_CACHE),
    }


def _environment() -> dict[str, str]:
    plain = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    return {**plain, **{name: "set, not shown" for name in SECRETS if name in os.environ}}
