"""Static merges: one adapter out of a whole pool."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from torch import nn

from phatgoose.errors import ConfigError, IncompatibleExpertError, UnsupportedAdapterError
from phatgoose.experts import Delta, Expert
from phatgoose.experts.bases import tell_bases
from phatgoose.experts.combine import weighted_sum
from phatgoose.experts.filed import alike, filed, summable
from phatgoose.experts.resolve import modules_of, resolve
from phatgoose.pool.peft_merge import METHODS as PEFT_METHODS
from phatgoose.pool.peft_merge import merge_with_peft
from phatgoose.pool.pool import ExpertPool

MERGE_METHODS = ("average", *PEFT_METHODS)


def merge_experts(
    experts: Iterable[Expert],
    *,
    method: str = "average",
    rank: int | None = None,
    weights: Sequence[float] | None = None,
    density: float | None = None,
    seed: int = 0,
    name: str = "merged",
    base: nn.Module | None = None,
) -> Expert:
    """Make one expert without gates out of all experts of a pool, which stay as they are.

    Args:
        experts: a pool, or experts that would make one.
        method: "average" adds Σ w_e · scale_e · B_e A_e at every module. An expert that does not
            adapt the module counts as zero. The sum is exact (PEFT's "cat"), or it is the best
            approximation of a given `rank` (PEFT's "svd").
            Any other is PEFT's `add_weighted_adapter` of that name. "linear", "magnitude_prune",
            "ties" (arXiv:2306.01708), "dare_linear" and "dare_ties" (arXiv:2311.03099) combine the
            factors A and B apart, each times sqrt(w_e · scale_e), so the ranks must be equal. With
            "_svd" behind the last four names they combine the products, as published, of any
            ranks and with memory [O, I] for every expert. PEFT's dare_ties grows as density falls.
        rank: of the merged expert at a module, at most; for "average" (the sum of the ranks unless
            given) and for methods with "_svd" (the largest rank unless given).
        weights: one for each expert. The defaults make E copies of an expert that expert again,
            if none of its entries is dropped: 1 for TIES, which takes means itself, 1/E for
            "average" and sums of products, 1/E² for sums of factors.
        density: the share of entries that all methods but "average" and "linear" keep; 0.2 unless
            given, as published for TIES.
        seed: of DARE's random choice.
        name: of the merged expert.
        base: the experts' base, for "average" of adapters that depend on its weights (see
            docs/adapters.md). Their sum is written whole where no LoRA can hold it.

    Raises:
        ConfigError: a setting is out of range or not one of the method's, no experts, a name
            taken twice, or a pool that PEFT's method does not accept.
        IncompatibleExpertError: experts of different bases.
    """
    pool = experts if isinstance(experts, ExpertPool) else ExpertPool(experts)
    if not len(pool):
        raise ConfigError("merge: the pool is empty. Give at least one expert.")
    if method not in MERGE_METHODS:
        known = ", ".join(MERGE_METHODS)
        raise ConfigError(f"merge: no method is called {method!r}. Choose from: {known}.")
    if rank is not None and rank < 1:
        raise ConfigError(f"merge: rank must be at least 1, got {rank}.")
    tell_bases(pool, same_base=pool.same_base)
    weights = _check_weights(weights, pool, method)
    if method == "average":
        if density is not None:
            raise ConfigError("merge: average keeps every entry. Leave density out.")
        modules = _averaged(pool, weights, rank, base, name)
    else:
        gather(pool.experts)  # refuses what does not belong together
        modules = merge_with_peft(
            pool.experts, method, weights, rank=rank, density=density, seed=seed
        )
    return Expert(name, modules, base_name=common_base(pool))


def _averaged(
    pool: ExpertPool,
    weights: Sequence[float],
    rank: int | None,
    base: nn.Module | None,
    name: str,
) -> dict[str, Delta]:
    """The sum at every module, as an adapter's file can hold it."""
    if base is None:
        return alike(_average(gather(pool.experts), weights, rank))
    layers = modules_of(base)
    modules = _average(gather([_on(base, expert) for expert in pool]), weights, rank)
    return alike({s: filed(d, layers[s], f"{name} at {s}") for s, d in modules.items()})


def _average(
    sites: Mapping[str, Mapping[int, Delta]], weights: Sequence[float], rank: int | None
) -> dict[str, Delta]:
    return {
        site: weighted_sum([(weights[e], lora) for e, lora in loras.items()], rank=rank)
        for site, loras in sites.items()
    }


def _on(base: nn.Module, expert: Expert) -> Expert:
    """The expert as it is on the base, if it depends on it, in what can be summed."""
    if not any(delta.needs_base for delta in expert.modules.values()):
        return expert
    layers = modules_of(base)
    resolved = resolve(expert, base).expert
    return replace(
        expert,
        modules={
            site: summable(delta, layers[site], f"{expert.name} at {site}")
            for site, delta in resolved.modules.items()
        },
    )


def gather(experts: Sequence[Expert]) -> dict[str, dict[int, Delta]]:
    """Collect the LoRAs of every module that any expert adapts, by the expert's place.

    Raises IncompatibleExpertError if two disagree about a module's size, and
    UnsupportedAdapterError for one that depends on the base's weights.
    """
    sites: dict[str, dict[int, Delta]] = {}
    for expert in experts:
        for name, delta in expert.modules.items():
            if delta.needs_base:
                raise UnsupportedAdapterError(
                    f"{expert.name}: is {delta.kind} at {name}, and what that adds depends on the "
                    'base. Give it, to merge by "average": merge_experts(..., base=model), or '
                    "phatgoose experts merge --base BASE. Or leave the expert out."
                )
    for index, expert in enumerate(experts):
        for name, lora in expert.modules.items():
            others = sites.setdefault(name, {})
            first = next(iter(others), index)
            other = experts[first].modules[name]
            sizes = [(each.in_features, each.out_features) for each in (lora, other)]
            if sizes[0] != sizes[1]:
                raise IncompatibleExpertError(
                    f"{expert.name}: its LoRA of {name} maps {sizes[0][0]} to {sizes[0][1]} "
                    f"features, that of {experts[first].name} {sizes[1][0]} to {sizes[1][1]}. "
                    "They belong to different bases; merge experts of one base."
                )
            others[index] = lora
    return dict(sorted(sites.items()))


def common_base(experts: Iterable[Expert]) -> str | None:
    """The base named by the first expert that names one."""
    return next((expert.base_name for expert in experts if expert.base_name), None)


def _check_weights(weights: Sequence[float] | None, pool: ExpertPool, method: str) -> list[float]:
    if weights is None:
        if "ties" in method:
            return [1.0] * len(pool)
        products = method == "average" or method.endswith("_svd")
        return [len(pool) ** (-1.0 if products else -2.0)] * len(pool)
    if len(weights) != len(pool) or not all(map(math.isfinite, weights)):
        raise ConfigError(
            f"merge: weights are {list(weights)}, {len(pool)} finite numbers are wanted, one for "
            "each expert."
        )
    return [float(weight) for weight in weights]
