"""Reading the file of a published pool, which anybody may have made.

For module M and expert i it holds

    M._addons.expert_lora.layer1__i          [I, R]  lora_A, transposed
    M._addons.expert_lora.layer2__i          [R, O]  lora_B, transposed
    M._addons.router.expert_embeddings__i    [I]     the gate

and the expert adds x layer1 layer2 / R: a LoRA with alpha 1.
"""

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from phatgoose.errors import ExpertFormatError, first_line
from phatgoose.reading import check_regular
from phatgoose.text import visible

_KEY = re.compile(
    r"(?P<module>.+)\._addons\."
    r"(?P<part>expert_lora\.layer1|expert_lora\.layer2|router\.expert_embeddings)"
    r"__(?P<index>0|[1-9]\d{0,5})",
    re.ASCII,
)
A, B, GATE = "expert_lora.layer1", "expert_lora.layer2", "router.expert_embeddings"
# The concatenated checkpoints carry the base's embeddings along, unchanged.
_IGNORED = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}
LARGEST_PICKLE = 1 << 26  # bytes, without the tensors; that of 166 experts has some 20 MB
# One expert's tensors as the file has them: by module, then by part.
Halves = Mapping[str, Mapping[str, Tensor]]


def read_pool(path: Path) -> list[Halves]:
    """The tensors of every expert, in order; the file is memory-mapped, and nothing in it is run.

    Raises ExpertFormatError where it is no published pool, or has more to it than its bytes.
    """
    tensors = open_pickle(path, "Give the best.pt of a published pool.")
    experts = _split(tensors, str(path))
    check_size(tensors, path)
    return experts


def open_pickle(path: Path, advice: str) -> Mapping[str, Tensor]:
    """Memory-map a checkpoint; nothing in it is run, and no tensor is read yet."""
    try:
        check_regular(path)
    except FileNotFoundError:
        raise ExpertFormatError(f"{path}: no such file. {advice}") from None
    try:
        _check_archive(path)
        tensors = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
    except UnpicklingError:
        raise ExpertFormatError(
            f"{path}: a pickle that wants to run code, or no torch file at all; it was not opened. "
            f"{advice}"
        ) from None
    except Exception as error:  # torch answers a damaged file with any of a dozen kinds
        raise ExpertFormatError(
            f"{path}: not a readable torch checkpoint ({first_line(error)}). It may be truncated, "
            "or the pointer that git leaves without LFS; download it again."
        ) from None
    if not isinstance(tensors, Mapping):
        raise ExpertFormatError(
            f"{path}: holds {type(tensors).__name__}, a mapping of tensors is wanted."
        )
    return tensors


def _check_archive(path: Path) -> None:
    """Raise ValueError where the archive could be far larger than the file; torch packs nothing."""
    if not zipfile.is_zipfile(path):
        return  # torch says better what it is
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{entry.filename} in it is compressed")
            if entry.filename.endswith("data.pkl") and entry.file_size > LARGEST_PICKLE:
                raise ValueError(f"its list of tensors has {entry.file_size} bytes")


def _split(tensors: Mapping[str, Any], who: str) -> list[Halves]:
    """Sort the tensors by expert, module and part, and check that each module's belong together."""
    experts: dict[int, dict[str, dict[str, Tensor]]] = {}
    for key, tensor in tensors.items():
        if key in _IGNORED:
            continue
        match = _KEY.fullmatch(key) if isinstance(key, str) else None
        if match is None or visible(key) != key:
            raise ExpertFormatError(
                f"{who}: {key!r} is no part of a published pool, which holds only expert_lora and "
                "router tensors with an expert's number."
            )
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ExpertFormatError(f"{who}: {key} is {kind}, a tensor of floats is wanted.")
        if not is_plain(tensor):
            raise ExpertFormatError(
                f"{who}: {key} is a tensor without values of its own (sparse, expanded or on no "
                "device). Save the pool with torch.save, its tensors contiguous."
            )
        modules = experts.setdefault(int(match["index"]), {})
        modules.setdefault(match["module"], {})[match["part"]] = tensor.detach()
    if not experts:
        raise ExpertFormatError(f"{who}: holds no experts.")
    for index in range(len(experts)):
        if index not in experts:
            raise ExpertFormatError(
                f"{who}: has {len(experts)} experts up to number {max(experts)}, but none with "
                f"number {index}. The file is incomplete."
            )
        _check_shapes(experts[index], index, who)
    return [experts[index] for index in range(len(experts))]


def check_size(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Refuse a file that has one storage for many tensors, so that reading it would never end."""
    size = sum(t.numel() * t.element_size() for t in tensors.values() if isinstance(t, Tensor))
    if size > path.stat().st_size:
        raise ExpertFormatError(
            f"{path}: its tensors have {size} bytes, more than the file. Save each by itself."
        )


def is_plain(tensor: Tensor) -> bool:
    """Whether it has a value in the file for each of its entries: one that is expanded has few."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided:
        return False
    size = tensor.numel() * tensor.element_size()
    return tensor.device.type == "cpu" and size <= tensor.untyped_storage().nbytes()


def _check_shapes(modules: Halves, index: int, who: str) -> None:
    """Raise ExpertFormatError unless every module has its three parts, of one rank and fitting."""
    rank = None
    for module, halves in modules.items():
        keys = {part: f"{module}._addons.{part}__{index}" for part in (A, B, GATE)}
        for part, key in keys.items():
            if part not in halves:
                present = keys[next(iter(halves))]
                raise ExpertFormatError(f"{who}: has {present} but no {key}.")
        a, b, gate = (halves[part] for part in (A, B, GATE))
        if a.ndim != 2 or (rank is not None and a.shape[1] != rank) or not a.numel():
            raise ExpertFormatError(
                f"{who}: {keys[A]} has shape {list(a.shape)}, wanted [in_features, "
                f"{rank or 'rank'}]."
            )
        rank = a.shape[1]
        if b.ndim != 2 or b.shape[0] != rank:
            raise ExpertFormatError(
                f"{who}: {keys[B]} has shape {list(b.shape)}, wanted [{rank}, out_features]."
            )
        if list(gate.shape) != [a.shape[0]]:
            raise ExpertFormatError(
                f"{who}: {keys[GATE]} has shape {list(gate.shape)}, wanted [{a.shape[0]}]."
            )
