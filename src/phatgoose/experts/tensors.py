"""Reading safetensors files from strangers, with errors that name the file."""

import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from phatgoose.errors import ExpertFormatError
from phatgoose.reading import open_regular, parse_json
from phatgoose.text import visible

LARGEST_HEADER = 1 << 25  # bytes; that of an adapter of 100,000 modules has half of it
LARGEST_VALUE = torch.finfo(torch.float32).max  # in which all that is computed exactly
# safetensors' name of a dtype: floats that float32 holds, and float64, which is looked through.
_DTYPES = {"F16", "BF16", "F32", "F64", "F8_E4M3", "F8_E5M2"}
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)  # torch computes nothing in them


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors file (on the CPU, memory-mapped), and its metadata.

    Float8 becomes bfloat16, which holds its values. Raises ExpertFormatError where the file is
    missing, truncated, too large or not safetensors, or has a tensor that is not of floats or
    whose name cannot be seen.
    """
    try:
        _check_header(path)
        with safe_open(path, framework="pt") as file:
            keys = file.keys()  # the file itself is no iterable
            tensors = {key: _computable(file.get_tensor(key)) for key in keys}
            return tensors, file.metadata() or {}
    except FileNotFoundError:
        raise ExpertFormatError(f"{path.parent}: no {path.name}.") from None
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise ExpertFormatError(
            f"{path}: not a readable safetensors file ({error}). It may be truncated; copy or "
            "download it again."
        ) from None


def largest(tensor: Tensor) -> float:
    """The largest absolute value of a tensor; NaN where any is, 0 where there are none."""
    if not tensor.numel():
        return 0.0
    # Both ends are NaN where any value is; ten times as fast as looking at every value.
    low, high = (float(end) for end in _computable(tensor.detach()).aminmax())
    return max(-low, high)


def is_finite(tensor: Tensor) -> bool:
    """Whether every value is a number that float32 can hold."""
    value = largest(tensor)
    return math.isfinite(value) and value <= LARGEST_VALUE


def _computable(tensor: Tensor) -> Tensor:
    return tensor.to(torch.bfloat16) if tensor.dtype in _FLOAT8 else tensor


def _check_header(path: Path) -> None:
    """Raise ValueError for a header that is too long, is read in two ways, or has no floats."""
    with open_regular(path) as file:
        size = int.from_bytes(file.read(8), "little")
        if size > LARGEST_HEADER:
            raise ValueError(f"its header says it has {size} bytes, at most {LARGEST_HEADER} may")
        header: Any = parse_json(file.read(size).decode())
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    for name, about in header.items():
        if name == "__metadata__":
            continue
        if visible(name) != name:
            raise ValueError(f"the name {name!r} has characters that cannot be seen")
        dtype = about.get("dtype") if isinstance(about, dict) else None
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            raise ValueError(f"{name} has the dtype {dtype!r}, floats are wanted")
