"""What the study compares: the methods of its tables, and the variants its settings come from."""

import random
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from phatgoose.evaluation.methods import Base, Method, Own, Routed
from phatgoose.experts import Expert
from phatgoose.pool import ExpertPool
from phatgoose.routers import (
    AdapterEvidenceRouter,
    AdapterPromptEvidenceRouter,
    ArrowRouter,
    AverageActivationRouter,
    EvidenceRouter,
    PhatgooseRouter,
    PromptEvidenceRouter,
    Router,
)

# In the order of the tables; what decides most comes first, should the time run out.
METHODS = (
    "base own phatgoose phatgoose+evidence phatgoose+prompt_evidence adapter_evidence "
    "adapter_prompt_evidence average_activation arrow retrieval merged multitask "
    "phatgoose+adapter_evidence evidence prompt_evidence arrow+adapter_evidence spectr lag "
    "best_individual oracle seqr spectr_norm seqr+zscore merged_svd peft_linear peft_ties "
    "peft_dare"
).split()


class RawRouter(Router):
    """PHATGOOSE without standardising: v·x, as the gates were trained (an ablation)."""

    def signature(self, expert: Expert, module: str) -> Float[Tensor, " I"]:
        assert expert.gates is not None
        return expert.gates.vectors[module].float()

    def score(
        self, x: Float[Tensor, "T I"], signatures: Float[Tensor, "E I"]
    ) -> Float[Tensor, "T E"]:
        return x.float() @ signatures.T


class RandomRouter(Router):
    """Scores that have nothing to do with the experts: a floor for token-wise routing."""

    def signature(self, expert: Expert, module: str) -> Float[Tensor, " I"]:
        seed = zlib.crc32(f"{expert.name} {module}".encode())
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(expert.modules[module].in_features, generator=generator)

    def score(
        self, x: Float[Tensor, "T I"], signatures: Float[Tensor, "E I"]
    ) -> Float[Tensor, "T E"]:
        return PhatgooseRouter().score(x, signatures)


def routed(name: str, router: Router | str, **options: Any) -> Routed:
    """A variant whose name says all that it was made with."""
    made_with = {} if isinstance(router, str) else {"variant": name}
    return Routed(name, router=router, options=options, made_with=made_with)


def variants(pool: ExpertPool) -> list[Method]:
    """Settings of the published recipe, and changes to it."""
    unit = {"top_k": 1, "scale": "unit"}
    found: list[Method] = [
        Base("base"),
        Own("own"),
        routed("phatgoose", "phatgoose"),
        *(routed(f"top_k {k}", "phatgoose", top_k=k) for k in (1, 4)),
        routed("top_k all", "phatgoose", top_k="all"),
        *(routed(f"temperature {t}", "phatgoose", temperature=t) for t in (0.3, 0.5, 2.0)),
        routed("unit scale, top_k 1", "phatgoose", **unit),
        routed("unit scale, top_k 2", "phatgoose", top_k=2, scale="unit"),
        routed("null expert at 0", "phatgoose", null_score=0.0),
        routed("not standardised", RawRouter()),
        routed("z-scored", "phatgoose+zscore"),
        routed("random", RandomRouter()),
    ]
    for short, kind, whole in (
        ("evidence", EvidenceRouter, PromptEvidenceRouter),
        ("adapter evidence", AdapterEvidenceRouter, AdapterPromptEvidenceRouter),
    ):
        for strength in (1.0, 2.0, 4.0, 8.0, 16.0):
            router = kind(PhatgooseRouter(), strength=strength)
            found.append(routed(f"{short} x {strength:g}", router))
        router = kind(PhatgooseRouter(), strength=8.0)
        found.append(routed(f"{short} x 8, unit scale, top_k 1", router, **unit))
        found.append(routed(f"{short} alone", kind()))
        router = whole(PhatgooseRouter(), strength=8.0)
        found.append(routed(f"{short} of the whole prompt x 8", router))
        found.append(
            routed(f"{short} x 8 alone, top_k 2", kind(strength=8.0), top_k=2, scale="softmax")
        )
    found.append(
        routed("arrow + adapter evidence x 16", AdapterEvidenceRouter(ArrowRouter(), strength=16.0))
    )
    if all("average_activation" in expert.signatures for expert in pool):
        inner = EvidenceRouter(AverageActivationRouter(), strength=8.0)
        found.append(routed("average activation + evidence x 8", inner))
    return found


def with_gates_of(folders: Sequence[Path], steps: str) -> Method:
    """PHATGOOSE with gates trained for another number of steps."""
    return Routed(f"{steps} gate steps", router="phatgoose", pool=ExpertPool.load(folders))


def sub_pools(pool: ExpertPool) -> list[Method]:
    """Parts of the pool, each inside the next, by the published recipe and with evidence."""
    names = list(pool.names)
    random.Random(0).shuffle(names)
    found: list[Method] = []
    size = len(names) // 2
    while size >= 2:
        part = ExpertPool(pool[name] for name in sorted(names[:size]))
        for router in ("phatgoose", "phatgoose+evidence"):
            found.append(Routed(f"{router}, {size} experts", router=router, pool=part))
        size //= 2
    return found
