"""Merging with PEFT's `add_weighted_adapter`."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from phatgoose.errors import ConfigError
from phatgoose.experts import Delta, Expert
from phatgoose.experts.base import base_name
from phatgoose.experts.lora import lora_of
from phatgoose.experts.save import peft_config

# PEFT's "cat" and "svd" are left out: they are our "average", whole and truncated.
METHODS = (
    "linear",
    *(
        f"{kind}{suffix}"
        for suffix in ("", "_svd")
        for kind in ("ties", "dare_linear", "dare_ties", "magnitude_prune")
    ),
)
DENSITY = 0.2  # arXiv:2306.01708, section 4


def merge_with_peft(
    experts: Sequence[Expert],
    method: str,
    weights: Sequence[float],
    *,
    rank: int | None,
    density: float | None,
    seed: int,
) -> dict[str, Delta]:
    """What PEFT's `add_weighted_adapter` makes of the experts' LoRAs, in fp32.

    PEFT merges adapters inside a model, and reads nothing of it but the sizes of its layers. So
    the model here is a stand-in without memory, and the real base is not touched.

    Raises ConfigError for settings that are not the method's, and where PEFT refuses the experts.
    """
    density = _check(experts, method, rank, density)
    model = _peft_model(experts)
    names = list(model.peft_config)
    # PEFT draws from torch's global generator and cannot be given another.
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(seed)
        model.add_weighted_adapter(
            names,
            list(weights),
            "merged",
            combination_type=method,
            svd_rank=rank,
            svd_full_matrices=False,  # the same result, sooner
            density=density,
        )
    return {name: lora_of(layer, "merged") for name, layer in _layers(model).items()}


def _check(
    experts: Sequence[Expert], method: str, rank: int | None, density: float | None
) -> float | None:
    """Refuse what PEFT would refuse, fail on, or quietly leave out; return the density."""
    products, prunes = method.endswith("_svd"), method != "linear"
    if rank is not None and not products:
        raise ConfigError(
            f"merge: {method} keeps the experts' rank, got rank {rank}. Leave it out, or choose "
            "average or a method with _svd."
        )
    if density is not None and not prunes:
        raise ConfigError("merge: linear keeps every entry. Leave density out.")
    if density is not None and not 0 < density <= 1:
        raise ConfigError(f"merge: density must be above 0 and at most 1, got {density}.")
    if prunes and len(experts) == 1:
        raise ConfigError(
            f"merge: {method} of {experts[0].name} alone, which PEFT would not prune. Give at "
            "least two experts."
        )
    if not products:
        _check_ranks(experts, method)
    return (DENSITY if density is None else density) if prunes else None


def _check_ranks(experts: Sequence[Expert], method: str) -> None:
    """Raise ConfigError unless the experts have one rank, over all and at every module."""
    largest = {e.name: max(lora.rank for lora in e.modules.values()) for e in experts}
    at_modules = {
        f" at {module}": {e.name: e.modules[module].rank for e in experts if module in e.modules}
        for module in sorted({module for e in experts for module in e.modules})
    }
    for where, ranks in {"": largest, **at_modules}.items():
        if len(set(ranks.values())) > 1:
            other = "average" if method == "linear" else f"average or {method}_svd"
            raise ConfigError(
                f"merge: PEFT's {method} wants equal ranks, the experts have {_grouped(ranks)}"
                f"{where}. Choose {other}, which take any ranks, or merge experts of one rank."
            )


def _grouped(ranks: Mapping[str, int]) -> str:
    """ "rank 2 (one, two, three and 7 more), rank 4 (four)"."""
    parts = []
    for rank in sorted(set(ranks.values())):
        names = [name for name in ranks if ranks[name] == rank]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        parts.append(f"rank {rank} ({', '.join(names[:3])}{more})")
    return ", ".join(parts)


def _peft_model(experts: Sequence[Expert]) -> Any:
    """A PeftModel that holds every expert's LoRAs, on layers without weights."""
    from peft import PeftModel

    base = _stand_in({name: lora for e in experts for name, lora in e.modules.items()})
    model: Any = None
    for index, expert in enumerate(experts):
        # An expert's name may hold dots, which PEFT's containers do not take. The config is that of
        # a plain LoRA of the same scale: of rsLoRA, PEFT counts sqrt(rank) into the sum once more.
        name, config = f"expert_{index}", peft_config(expert)
        if model is None:
            model = PeftModel(base, config, name, low_cpu_mem_usage=True)
        else:
            model.add_adapter(name, config, low_cpu_mem_usage=True)
        layers = _layers(model)
        for site, lora in expert.modules.items():
            lora.plain(f"merge: PEFT's methods, of which {expert.name} at {site} is given,")
            for half, matrix in ((layers[site].lora_A, lora.a), (layers[site].lora_B, lora.b)):
                values = matrix.detach().to("cpu", torch.float32)
                half[name].weight = nn.Parameter(values, requires_grad=False)
    return model


def _stand_in(loras: Mapping[str, Delta]) -> nn.Module:
    """Linear layers of these names and sizes, all of whose weights are one zero."""
    root = nn.Module()
    for name, lora in loras.items():
        *above, last = name.split(".")
        parent = root
        for part in above:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        layer = nn.Linear(lora.in_features, lora.out_features, bias=False, device="meta")
        zero = torch.zeros(()).expand(lora.out_features, lora.in_features)
        layer.weight = nn.Parameter(zero, requires_grad=False)
        parent.add_module(last, layer)
    return root


def _layers(model: nn.Module) -> dict[str, Any]:
    """PEFT's LoRA layers by the module's name in the base."""
    from peft.tuners.lora import LoraLayer

    return {
        base_name(path): layer
        for path, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }
