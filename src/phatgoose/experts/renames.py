"""Modules of a base that an older transformers called otherwise."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from phatgoose.experts.base import base_name
from phatgoose.experts.expert import Expert
from phatgoose.experts.keys import PREFIX
from phatgoose.experts.lora import adapter_hash


def renamed_for(expert: Expert, model: nn.Module) -> Expert:
    """The expert by the names that the model's modules have, or itself, where they are those.

    PEFT's own conversion says what an older name is now. Signatures are renamed too. An expert that
    PEFT does not rename to modules of the model stays as it is, for a check to refuse.
    """
    there = {base_name(path) for path, _ in model.named_modules()}
    if there >= set(expert.modules):
        return expert
    now = _now(list(expert.modules), model)
    if not now or not set(now.values()) <= there or len(set(now.values())) != len(now):
        return expert
    modules = {now[name]: module for name, module in expert.modules.items()}
    content = adapter_hash(modules)
    signatures = {}
    for kind, found in expert.signatures.items():
        vectors = {now.get(name, name): vector for name, vector in found.vectors.items()}
        signatures[kind] = replace(found, vectors=vectors, adapter=content)
    return replace(expert, modules=modules, signatures=signatures)


def _now(names: list[str], model: Any) -> Mapping[str, str]:
    """What PEFT makes of modules' names when it loads an adapter; empty where it cannot tell.

    It moves tensors from key to key. These hold the names' numbers.
    """
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import (
        convert_peft_adapter_state_dict_for_transformers,
    )

    suffix = ".lora_A.weight"
    keys = {f"{PREFIX}{name}{suffix}": torch.tensor([[i]]) for i, name in enumerate(names)}
    try:
        moved = convert_peft_adapter_state_dict_for_transformers(model, LoraConfig(), keys)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):
        return {}  # what fuses weights wants real ones: it changes more than names
    if any(tensor.numel() != 1 for tensor in moved.values()):
        return {}
    return {
        names[int(tensor)]: key.removeprefix(PREFIX).removesuffix(suffix)
        for key, tensor in moved.items()
    }
