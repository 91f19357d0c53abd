"""Writing an expert as the PEFT LoRA folder that it is."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from phatgoose.errors import ConfigError
from phatgoose.experts.expert import Expert
from phatgoose.experts.lora import adapter_hash, write_adapter
from phatgoose.files import new_folder, write_bytes

Number = int | float


def save_expert(
    expert: Expert, folder: str | Path, *, task_type: str | None = None, card: str | None = None
) -> Path:
    """Write an expert with its gates and signatures into a new folder; return the folder.

    The folder is there complete or not at all. PEFT loads it as any other LoRA; ranks and scales
    that differ by module are in its rank_pattern and alpha_pattern. `task_type` is PEFT's
    ("CAUSAL_LM", "SEQ_2_SEQ_LM"), `card` the text of README.md.

    Raises ConfigError if there is something in `folder` already, and IncompatibleExpertError if a
    signature belongs to another adapter, as it does after the modules were changed.
    """
    folder = Path(folder)
    check_new(folder)
    adapter = adapter_hash(expert.modules) if expert.signatures else ""
    for signatures in expert.signatures.values():
        signatures.check(expert.modules, adapter, expert.name)
    with new_folder(folder) as partial:
        write_adapter(partial, peft_config(expert, task_type).to_dict(), expert.modules)
        if card is not None:
            write_bytes(partial / "README.md", card.encode())
        for signatures in expert.signatures.values():
            signatures.write(partial)
    return folder


def check_new(folder: Path) -> None:
    """Raise ConfigError unless `folder` is yet to be made, or empty."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ConfigError(f"{folder}: is no empty folder. Give a new folder, or empty this one.")


def peft_config(expert: Expert, task_type: str | None = None) -> Any:
    """The LoraConfig that PEFT itself would have for this adapter."""
    from peft import LoraConfig

    ranks: dict[str, Number] = {}
    alphas: dict[str, Number] = {}
    for module, delta in expert.modules.items():
        for name, (rank, scale) in delta.alphas(module).items():
            ranks[name], alphas[name] = rank, _alpha(scale, rank)
    usual, alpha = _most_common(ranks), _most_common(alphas)
    settings = _together(delta.setting(name) for name, delta in expert.modules.items())
    return LoraConfig(
        task_type=task_type,
        r=int(usual),
        lora_alpha=alpha,  # type: ignore[arg-type]  # PEFT computes with floats as well
        rank_pattern=_pattern(ranks, usual),
        alpha_pattern=_pattern(alphas, alpha),
        base_model_name_or_path=expert.base_name,
        inference_mode=True,
        **{"target_modules": [], **settings},
    )


def _together(settings: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The settings of all modules as one; lists and mappings are joined."""
    joined: dict[str, Any] = {}
    for each in settings:
        for field, value in each.items():
            before = joined.get(field)
            if isinstance(value, list):
                value = sorted({*(before or []), *value})
            elif isinstance(value, dict):
                value = {**(before or {}), **value}
            joined[field] = value
    return joined


def _alpha(scale: float, rank: int) -> Number:
    """The alpha whose alpha / rank is `scale`: a whole number where one is."""
    whole = round(scale * rank)
    return whole if whole / rank == scale else scale * rank


def _most_common(values: Mapping[str, Number]) -> Number:
    return Counter(values.values()).most_common(1)[0][0] if values else 8  # as PEFT's default


def _pattern(values: Mapping[str, Number], default: Number) -> dict[str, Any]:
    """The values that are not the default, by a pattern that matches one module alone.

    PEFT reads a pattern as a regular expression for the end of a module's name, unless it begins
    with "^".
    """
    return {f"^{re.escape(name)}": v for name, v in sorted(values.items()) if v != default}
