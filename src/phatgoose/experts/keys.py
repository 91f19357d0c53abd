"""Reads the keys of tensors as trainers leave them: as PEFT itself would have written them."""

import re
from collections.abc import Mapping

from torch import Tensor

from phatgoose.errors import ExpertFormatError

PREFIX = "base_model.model."
# Names that wrappers put between a model's own: torch.compile, FSDP, activation checkpoints.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# A state dict has the adapter's name behind these, and PEFT's files have not.
_NAMED = re.compile(
    r"(?P<half>\.lora_[AB]|\.lora_embedding_[AB]|\.lora_magnitude_vector)"
    r"(?:\.(?P<name>[^.]+))??(?P<end>\.weight|\.bias)?\Z"
)
_SAVED = re.compile(r"\.modules_to_save\.(?P<name>[^.]+)(?P<end>\.[^.]+)\Z")


def plain_keys(tensors: Mapping[str, Tensor], who: str) -> dict[str, Tensor]:
    """The tensors by the keys that PEFT saves them by; `who` names the source in errors.

    Raises ExpertFormatError where two tensors have one key then, as they have of two adapters in
    one file, and where a matrix was saved without its shards.
    """
    found: dict[str, tuple[str, Tensor]] = {}
    names: dict[str, str] = {}
    for key, tensor in tensors.items():
        plain, name = _plain(key)
        if name is not None:
            names.setdefault(name, key)
        if plain is None:
            continue
        if plain in found:
            raise ExpertFormatError(
                f"{who}: {found[plain][0]} and {key} are one tensor by two names. Save the adapter "
                "again with peft_model.save_pretrained(folder)."
            )
        _check_gathered(key, plain, tensor, who)
        found[plain] = key, tensor
    if len(names) > 1:
        one, other = sorted(names)[:2]
        raise ExpertFormatError(
            f"{who}: holds tensors of two adapters, {one} and {other}. Save each into a folder of "
            "its own: peft_model.save_pretrained(folder, selected_adapters=[NAME])."
        )
    return {plain: tensor for plain, (_, tensor) in found.items()}


def _plain(key: str) -> tuple[str | None, str | None]:
    """A key without wrappers, and the adapter's name in it; None for a copy of the base's own."""
    parts = [part for part in key.split(".") if part not in _WRAPPERS]
    while parts[:1] == ["module"]:  # of DistributedDataParallel or DeepSpeed, around everything
        del parts[0]
    plain = ".".join(parts)
    while plain.startswith(PREFIX + PREFIX):
        plain = plain.removeprefix(PREFIX)
    if ".original_module." in plain:  # beside modules_to_save
        return None, None
    for pattern in (_NAMED, _SAVED):
        match = pattern.search(plain)
        if match:
            half = match.groupdict().get("half", "")
            end = "" if half.endswith("vector") else match["end"] or ""
            return plain[: match.start()] + half + end, match["name"]
    return plain, None


def _check_gathered(key: str, plain: str, tensor: Tensor, who: str) -> None:
    """Refuse what DeepSpeed's ZeRO-3 and FSDP leave of a matrix that they have sharded."""
    is_matrix = plain.endswith((".lora_A.weight", ".lora_B.weight"))
    if tensor.numel() and not (is_matrix and tensor.ndim == 1):
        return
    raise ExpertFormatError(
        f"{who}: {key} has the shape {list(tensor.shape)}, which DeepSpeed's ZeRO-3 or FSDP leaves "
        "of a tensor whose shards were not gathered before it was saved. Save again with "
        "stage3_gather_16bit_weights_on_model_save, or make the adapter from the checkpoint with "
        "zero_to_fp32.py."
    )
