"""Which base experts are of, by the names that they and a model have for it.

Layers and vocabulary decide (`BaseIdentity.difference`); names inform. One base goes by many:
mirrors, quantised twins, paths, other letter cases. Another base may have equal layers too, as
Mistral 7B has those of Llama 3 8B, and then only its name tells.
"""

import logging
import os
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath

from phatgoose.errors import ConfigError
from phatgoose.experts import hub
from phatgoose.experts.base import BaseIdentity, is_hub_name
from phatgoose.experts.expert import Expert
from phatgoose.experts.lora import read_config
from phatgoose.experts.sources import Source, split_name
from phatgoose.text import visible

# What mirrors put behind a name, for the form that the weights are kept in.
_FORMS = set(
    "2bit 3bit 4bit 5bit 6bit 8bit int4 int8 nf4 fp4 fp8 fp16 bf16 w4a16 w8a8 w8a16 bnb gptq awq "
    "gguf hqq exl2 quantized quant unsloth dynamic hf mlx".split()
)

log = logging.getLogger(__name__)


class BaseWarning(UserWarning):
    """Experts name another base than the one that they are about to run on."""


def same_name(one: str, other: str) -> bool:
    """Whether two names are of one base: but for its owner, case and the form of its weights."""
    return _plain(one) == _plain(other)


def _plain(name: str) -> str:
    last = PurePosixPath(name.replace("\\", "/")).name.lower()
    parts = re.split(r"[-_ ]+", last.removeprefix("meta-"))
    while len(parts) > 1 and parts[-1] in _FORMS:
        parts.pop()
    return "-".join(parts)


def names_of(expert: Expert) -> list[str]:
    """What an expert calls its base: in its signatures, and in its adapter's config."""
    return [name for name in (expert.base and expert.base.name, expert.base_name) if name]


def tell_bases(
    experts: Iterable[Expert], model: BaseIdentity | None = None, *, same_base: bool = False
) -> None:
    """Say once what experts call their base, where the model, or the first of them, says otherwise.

    A BaseWarning where nothing shows that it is one base, unless `same_base` says so; else a line
    in the log.
    """
    experts = list(experts)
    named = [(expert, names_of(expert)) for expert in experts]
    first = next((expert for expert, names in named if names), None)
    known = (model and model.name) or (first and names_of(first)[0])
    if not known:
        return
    reference = model if model and model.name else (first.base if first else None)
    doubts: dict[str, list[str]] = {}
    twins: dict[str, list[str]] = {}
    for expert, names in named:
        if not names or any(_alike(name, known) for name in names):
            continue
        hub_names = [name for name in names if is_hub_name(name)]
        sure = same_base or not hub_names or not is_hub_name(known)
        sure = sure or any(same_name(name, known) for name in names)
        kind = twins if sure or _same_tokens(expert.base, reference) else doubts
        kind.setdefault((hub_names or names)[0], []).append(expert.name)
    what = "this model is" if model and model.name else "the first expert names"
    for name, who in doubts.items():
        warnings.warn(
            f"{_some(who)}: made on the base {visible(name)}, and {what} {visible(known)}. Their "
            "layers have equal sizes, which does not show that their weights are equal. If it is "
            "one base by two names, say so: same_base=True, or --same-base. Else leave them out.",
            BaseWarning,
            stacklevel=3,
        )
    for name, who in twins.items():
        log.warning(
            "phatgoose: %s: the base that they call %s counts as %s",
            _some(who),
            visible(name),
            visible(known),
        )
    for remark, who in _remarks(experts, model).items():
        log.warning("phatgoose: %s: %s", _some(who), remark)


def refuse_other(expert: Expert, model: BaseIdentity) -> str | None:
    """Why an expert is not surely of the model's base, in words, or None."""
    if expert.base is None:
        return None
    found = expert.base.difference(model)
    one, other = expert.base.name or "", model.name or ""
    if found or not (is_hub_name(one) and is_hub_name(other)) or same_name(one, other):
        return found
    return f"the base models are named {one} and {other}"


def one_base(names: Mapping[str, str | None]) -> str:
    """The base that all experts name, by the expert's name; of twins, the first name.

    Raises ConfigError where they name none, or several.
    """
    named = {expert: base for expert, base in names.items() if base}
    if not named:
        who = _some(list(names))
        raise ConfigError(f"{who}: no adapter's config names a base model. Pass --base.")
    (first, base), *others = named.items()
    for expert, other in others:
        if not (_alike(base, other) or same_name(base, other)):
            raise ConfigError(
                f"{expert}: its base is {other}, that of {first} is {base}. Take those of one base "
                "at a time, or pass --base if it is the same by two names."
            )
    return base


def base_in_config(source: Source) -> str | None:
    """The base that an adapter's config names; of one on the Hub, no weights are downloaded."""
    _, place = split_name(source)
    listing = None if os.path.isdir(place) else hub.configs(str(place))
    folder = listing[0] if listing else hub.locate(place)
    base: str | None = read_config(folder).get("base_model_name_or_path")
    return base


def _alike(one: str, other: str) -> bool:
    """Whether two names are equal, where that of a path is its last part."""
    if is_hub_name(one) and is_hub_name(other):
        return one == other
    return PurePosixPath(one).name == PurePosixPath(other).name


def _same_tokens(one: BaseIdentity | None, other: BaseIdentity | None) -> bool:
    """Whether layers and tokenizers are known to be equal; a difference was refused before."""
    return bool(one and other and one.tokenizer and other.tokenizer)


def _remarks(experts: Iterable[Expert], model: BaseIdentity | None) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for expert in experts:
        remark = model and expert.base and expert.base.remark(model)
        if remark:
            found.setdefault(remark, []).append(expert.name)
    return found


def _some(names: list[str]) -> str:
    if len(names) == 1:
        return visible(names[0])
    return f"{len(names)} experts ({visible(names[0])}, ...)"
