"""Checking an expert folder, and saying in plain words what is wrong."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from phatgoose.errors import IncompatibleExpertError, PhatgooseError
from phatgoose.experts.base import identify_base
from phatgoose.experts.bases import tell_bases
from phatgoose.experts.expert import Expert, load_expert
from phatgoose.experts.kinds import KINDS
from phatgoose.experts.lora import problem_of
from phatgoose.experts.renames import renamed_for
from phatgoose.experts.resolve import modules_of
from phatgoose.experts.tensors import is_finite, largest

# A gate whose largest entry is below this has not moved from zero in any way that could route.
SMALLEST_GATE = 1e-4


def verify_expert(
    path_or_hub_id: str | Path, base: nn.Module | None = None, *, same_base: bool = False
) -> list[str]:
    """What is wrong with an expert, one sentence each; an empty list means nothing was found.

    With `base` (a transformers model) the modules' names and sizes are checked against it too, and
    a warning comes where the expert names another one, unless `same_base` says that it is one.
    """
    try:
        expert = load_expert(path_or_hub_id)
    except PhatgooseError as error:
        return [str(error)]
    return [*_check_values(expert), *([] if base is None else _check_base(expert, base, same_base))]


def check_numbers(expert: Expert) -> Iterator[str]:
    """Sentences on values in the adapter or its signatures that cannot be computed with."""
    for name, module in expert.modules.items():
        problem = problem_of(name, module)
        if problem:
            yield f"{expert.name}: {problem}"
    for signatures in expert.signatures.values():
        kind = KINDS[signatures.kind]
        for name, vector in signatures.vectors.items():
            if not is_finite(vector):
                yield (
                    f"{expert.name}: the {kind.words} at {name} hold NaN or infinite values. Make "
                    f"them again: {kind.remedy(expert.folder)}"
                )


def _check_values(expert: Expert) -> Iterator[str]:
    yield from check_numbers(expert)
    if not any(torch.any(v) for m in expert.modules.values() for v in m.trained):
        yield f"{expert.name}: every lora_B is zero, so the adapter is untrained. Train it first."
    if expert.gates is None:
        yield f"{expert.name}: has no gates. Train them: phatgoose gate {expert.folder}"
        return
    small = [n for n, v in expert.gates.vectors.items() if float(v.abs().max()) < SMALLEST_GATE]
    if small:
        yield (
            f"{expert.name}: {len(small)} of {len(expert.gates.vectors)} gates are still (near) "
            f"zero, {small[0]} first, so they cannot route. Train them longer."
        )


def check_modules(expert: Expert, base: nn.Module) -> Iterator[str]:
    """Sentences on modules the base does not have, or has in other sizes."""
    layers = modules_of(base)
    for name, delta in expert.modules.items():
        layer = layers.get(name)
        problem = f"no {delta.place}" if layer is None else delta.problem(layer)
        if problem is not None and problem.startswith("no "):
            yield (
                f"{expert.name}: adapts {name}, which is {problem} of the base model. Was "
                "it trained on another base, or on another class of it?"
            )
        elif problem is not None:
            yield f"{expert.name}: its LoRA of {name} {problem}. It was trained on another base."


def check_range(expert: Expert, dtype: torch.dtype) -> None:
    """Raise IncompatibleExpertError unless `dtype` holds the matrices, the scale in B."""
    for name, module in expert.modules.items():
        value = max(largest(module.a), largest(module.b) * abs(module.scale))
        if not value <= torch.finfo(dtype).max:
            raise IncompatibleExpertError(
                f"{expert.name}: its LoRA of {name} has values of up to {value:.3g}, the scale "
                f"included, more than {str(dtype).removeprefix('torch.')} holds. Run the base in "
                "bfloat16 or float32."
            )


def _check_base(expert: Expert, base: nn.Module, same_base: bool) -> Iterator[str]:
    expert = renamed_for(expert, base)
    yield from check_modules(expert, base)
    tell_bases([expert], identify_base(base), same_base=same_base)
    for signatures in expert.signatures.values():
        difference = signatures.base.difference(identify_base(base))
        if difference:
            words = KINDS[signatures.kind].words
            yield f"{expert.name}: its {words} were made on another base: {difference}."
