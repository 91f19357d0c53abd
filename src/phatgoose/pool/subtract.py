"""General knowledge subtraction: what an expert knows beyond what every expert knows."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from phatgoose.errors import ConfigError
from phatgoose.experts import Delta, Expert, LoraModule, adapter_hash
from phatgoose.experts.combine import weighted_sum
from phatgoose.experts.kinds import KINDS
from phatgoose.pool.merge import gather
from phatgoose.pool.pool import ExpertPool


def subtract_general(
    experts: Iterable[Expert],
    general: Expert | Iterable[Expert],
    *,
    rank: int | None = None,
    factors: bool = False,
) -> list[Expert]:
    """GenKnowSub: θ_e - θ_general for every expert, as new experts of the same names.

    `general` is an adapter trained on text of no particular task, or several, whose mean counts
    (one for each language, say). What is subtracted is the product,
    scale_e · B_e A_e - mean_g scale_g · B_g A_g, exactly, at every module that either adapts; the
    rank at a module is the sum of the ranks there, or at most `rank` (the best approximation).

    With `factors` the factors are subtracted instead, A_e - mean A_g and B_e - mean B_g, with
    scale_e before the product. That is what the paper's code and PEFT's Arrow (use_gks) compute.
    It needs equal modules and ranks, and is another thing: of
    (B_e - B_g)(A_e - A_g) = B_e A_e - B_e A_g - B_g A_e + B_g A_g the last term adds general
    knowledge, and the two before it depend on the bases that training happened to choose.

    The experts given are not changed. The new ones have no gates, because gates belong to the
    adapter they were trained for: route them by a router that needs none (the paper uses Arrow), or
    save them and train gates anew. Of their signatures only those stay that do not depend on the
    adapter (prompt_mean). arXiv:2505.10939.

    Raises:
        ConfigError: no general expert, one that is among `experts`, a name taken twice, `rank`
            below 1 or with `factors`, or modules or ranks that differ, with `factors`.
        IncompatibleExpertError: experts of different bases.
    """
    experts, generals = list(experts), [general] if isinstance(general, Expert) else list(general)
    if not generals:
        raise ConfigError("subtract_general: no general expert. Give at least one.")
    if rank is not None and factors:
        raise ConfigError("subtract_general: factors keep the experts' rank. Leave rank out.")
    if rank is not None and rank < 1:
        raise ConfigError(f"subtract_general: rank must be at least 1, got {rank}.")
    gather(ExpertPool([*experts, *generals]).experts)  # refuses what does not belong together
    if factors:
        return [_changed(expert, _factors(expert, generals)) for expert in experts]
    shares = {
        name: [(-1 / len(generals), lora) for lora in loras.values()]
        for name, loras in gather(generals).items()
    }
    return [_changed(expert, _products(expert, shares, rank)) for expert in experts]


def _changed(expert: Expert, modules: dict[str, Delta]) -> Expert:
    adapter = adapter_hash(modules)
    kept = {
        kind: replace(found, adapter=adapter)
        for kind, found in expert.signatures.items()
        if not KINDS[kind].follows_adapter
    }
    return replace(expert, modules=modules, folder=None, signatures=kept)


def _products(
    expert: Expert, shares: dict[str, list[tuple[float, Delta]]], rank: int | None
) -> dict[str, Delta]:
    modules = {}
    for name in sorted({*expert.modules, *shares}):
        own = [(1.0, expert.modules[name])] if name in expert.modules else []
        modules[name] = weighted_sum([*own, *shares.get(name, [])], rank=rank)
    return modules


def _factors(expert: Expert, generals: Sequence[Expert]) -> dict[str, Delta]:
    for general in generals:
        for name in sorted({*expert.modules, *general.modules}):
            ranks = [e.modules[name].rank if name in e.modules else 0 for e in (expert, general)]
            if ranks[0] != ranks[1]:
                raise ConfigError(
                    f"subtract_general: {expert.name} has rank {ranks[0]} at {name}, "
                    f"{general.name} {ranks[1]}. Factors are subtracted at equal modules and "
                    "ranks; leave factors out."
                )
    for one in (expert, *generals):
        for name, delta in one.modules.items():
            delta.plain(f"subtract_general by factors: {one.name} at {name}")
    return {
        name: LoraModule(
            lora.a.float() - _mean([general.modules[name].a for general in generals]),
            lora.b.float() - _mean([general.modules[name].b for general in generals]),
            lora.scale,
        )
        for name, lora in expert.modules.items()
    }


def _mean(matrices: Sequence[Tensor]) -> Tensor:
    return torch.stack([matrix.detach().float() for matrix in matrices]).mean(0)
