"""Reading safetensors files from strangers, with errors that name the file."""

from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from phatgoose.errors import ExpertFormatError


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors file (on the CPU, memory-mapped), and its metadata.

    Raises ExpertFormatError where the file is missing, truncated or not safetensors.
    """
    if not path.is_file():
        raise ExpertFormatError(f"{path.parent}: no {path.name}.")
    try:
        with safe_open(path, framework="pt") as file:
            keys = file.keys()  # the file itself is no iterable
            return {key: file.get_tensor(key) for key in keys}, file.metadata() or {}
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise ExpertFormatError(
            f"{path}: not a readable safetensors file ({error}). It may be truncated; copy or "
            "download it again."
        ) from None
