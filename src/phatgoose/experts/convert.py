"""Makes a plain LoRA folder of adapters that are something else."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from phatgoose.errors import (
    ConfigError,
    ExpertFormatError,
    IncompatibleExpertError,
    UnsupportedAdapterError,
    first_line,
)
from phatgoose.experts import hub
from phatgoose.experts.expert import Expert, load_expert
from phatgoose.experts.keys import plain_keys
from phatgoose.experts.lora import CONFIG_FILE, PICKLE, WEIGHTS_FILE, read_config, split_modules
from phatgoose.experts.released_file import check_size, is_plain, open_pickle
from phatgoose.experts.renames import renamed_for
from phatgoose.experts.save import check_new, save_expert
from phatgoose.experts.signatures import load_signatures
from phatgoose.experts.sources import default_name, split_name
from phatgoose.experts.verify import check_modules
from phatgoose.reading import read_json
from phatgoose.text import visible


@dataclass(frozen=True)
class Converted:
    """What became of an adapter."""

    folder: Path
    was: str  # the kind of adapter
    error: float | None  # largest |found - wanted| / |wanted| of a module's weights; None: exact


def convert_adapter(
    source: str | Path,
    out: str | Path,
    *,
    base: nn.Module | None = None,
    rank: int | None = None,
    read_pickle: bool = False,
) -> Converted:
    """Write an adapter as a plain LoRA into a new folder, with the signatures that still fit.

    A LoRA keeps its values and gets the keys that PEFT writes and, with `base`, the module names of
    today's transformers. Other kinds become LoRA by PEFT's `convert_to_lora`, of `rank` or of as
    many as the difference needs, and need `base`.

    Raises ConfigError for a folder that is not empty, or without the base that is needed,
    UnsupportedAdapterError for what cannot be converted, or for a pickle unless `read_pickle`, and
    what loading an expert raises.
    """
    out = Path(out)
    check_new(out)
    name, place = split_name(source)
    folder = _located(place, read_pickle=read_pickle)
    kind = _kind(folder)
    if kind == "LORA":
        expert, error = _read_lora(folder, name or default_name(place), read_pickle), None
    else:
        expert, error = _by_peft(folder, kind, base, rank, read_pickle)
    if base is not None:
        expert = renamed_for(expert, base)
        for problem in check_modules(expert, base):
            raise IncompatibleExpertError(problem)
    return Converted(save_expert(expert, out), kind, error)


def _located(place: str | Path, *, read_pickle: bool) -> Path:
    if read_pickle and not Path(place).exists() and hub.is_hub_id(str(place)):
        return hub.download_pickle(str(place))
    return hub.locate(place)


def _kind(folder: Path) -> str:
    """PEFT's name for what the adapter is."""
    path = folder / CONFIG_FILE
    try:
        config = read_json(path)
    except FileNotFoundError:
        raise ExpertFormatError(f"{folder}: no {CONFIG_FILE}, so it is no adapter.") from None
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if not isinstance(kind, str) or visible(kind) != kind:
        raise ExpertFormatError(f"{path}: names no peft_type. Save the adapter again with PEFT.")
    return kind.upper()


def _read_lora(folder: Path, name: str, read_pickle: bool) -> Expert:
    if (folder / WEIGHTS_FILE).exists() or not (read_pickle and (folder / PICKLE).exists()):
        return load_expert(folder, name=name)
    config, who = read_config(folder), str(folder / PICKLE)
    modules = split_modules(config, plain_keys(_read_pickle(folder / PICKLE), who), who)
    return Expert(
        name,
        modules,
        base_name=config.get("base_model_name_or_path"),
        folder=folder,
        signatures=load_signatures(folder, modules),
    )


def _read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of adapter_model.bin, opened by torch's reader for weights alone."""
    found = open_pickle(path, "Give an adapter_model.bin as PEFT saved it.")
    for key, tensor in found.items():
        if not isinstance(key, str) or visible(key) != key:
            raise ExpertFormatError(f"{path}: {key!r} is no name of a tensor. Save it again.")
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or not is_plain(tensor):
            raise ExpertFormatError(f"{path}: {key} is no plain tensor of floats. Save it again.")
    check_size(found, path)
    return {key: tensor.detach() for key, tensor in found.items()}


def _by_peft(
    folder: Path, kind: str, base: nn.Module | None, rank: int | None, read_pickle: bool
) -> tuple[Expert, float]:
    """A LoRA of what another kind of adapter changes at the base's weights, and its error."""
    from peft import PeftModel
    from peft.tuners.lora.conversion import convert_to_lora

    if base is None:
        raise ConfigError(
            f"{folder}: is {kind}, whose difference depends on the base. Pass --base."
        )
    if not (folder / WEIGHTS_FILE).exists() and not read_pickle:
        load_expert(folder)  # says what is missing
    try:
        tuned: Any = PeftModel.from_pretrained(base, folder)  # type: ignore[arg-type]
        config, tensors = convert_to_lora(tuned, rank=1.0 if rank is None else rank)
        error = _error(tuned, tensors)
        tuned.unload()
    except Exception as failure:  # PEFT raises many kinds, of what a stranger's config says
        raise UnsupportedAdapterError(
            f"{folder}: PEFT does not make LoRA of this {kind} adapter ({first_line(failure)}). "
            "Train a plain LoRA."
        ) from failure
    said = config.to_dict()
    modules = split_modules(said, tensors, f"{folder}, as LoRA")
    return Expert("converted", modules, base_name=said["base_model_name_or_path"]), error


def _error(tuned: nn.Module, tensors: Mapping[str, Tensor]) -> float:
    """The largest |B A - wanted| / |wanted| of a module."""
    errors = [0.0]
    for key, a in tensors.items():
        if key.endswith(".lora_A.weight"):
            path = key.removesuffix(".lora_A.weight")
            layer: Any = tuned.get_submodule(path)
            wanted = layer.get_delta_weight("default").detach().float()
            found = tensors[f"{path}.lora_B.weight"].float() @ a.float()
            found = found.T if found.shape != wanted.shape else found
            errors.append(float((found - wanted).norm() / wanted.norm().clamp_min(1e-30)))
    return max(errors)
