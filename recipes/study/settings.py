"""The variants that the study chooses settings from, on validation sets."""

import random
import zlib
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

MANY = (1.0, 2.0, 4.0, 8.0, 16.0)  # strengths of evidence
PARTS = [
    f"{router}, {n} experts" for n in (8, 4, 2) for router in ("phatgoose", "phatgoose+evidence")
]


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


def variants() -> list[Method]:
    """Settings of the published recipe, and changes to it."""
    unit = {"top_k": 1, "scale": "unit"}
    found: list[Method] = [
        Base("base"),
        Own("own"),
        routed("phatgoose", "phatgoose"),
        *(routed(f"evidence x {s:g}", EvidenceRouter(PhatgooseRouter(), strength=s)) for s in MANY),
        *(
            routed(f"prompt evidence x {s:g}", PromptEvidenceRouter(PhatgooseRouter(), strength=s))
            for s in MANY
        ),
        routed("evidence alone", EvidenceRouter()),
        routed("prompt evidence alone", PromptEvidenceRouter()),
        *(routed(f"top_k {k}", "phatgoose", top_k=k) for k in (1, 4, "all")),
        *(routed(f"temperature {t}", "phatgoose", temperature=t) for t in (0.3, 0.5, 2.0)),
        routed("unit scale, top_k 1", "phatgoose", **unit),
        routed("unit scale, top_k 2", "phatgoose", top_k=2, scale="unit"),
        routed("null expert at 0", "phatgoose", null_score=0.0),
        routed("not standardised", RawRouter()),
        routed("z-scored", "phatgoose+zscore"),
        routed("random", RandomRouter()),
    ]
    for s in (4.0, 8.0, 16.0):
        router = AdapterEvidenceRouter(PhatgooseRouter(), strength=s)
        found.append(routed(f"adapter evidence x {s:g}", router))
        whole = AdapterPromptEvidenceRouter(PhatgooseRouter(), strength=s)
        found.append(routed(f"adapter prompt evidence x {s:g}", whole))
    arrow = AdapterEvidenceRouter(ArrowRouter(), strength=16.0)
    average = EvidenceRouter(AverageActivationRouter(), strength=8.0)
    found.append(routed("arrow + adapter evidence x 16", arrow))
    found.append(routed("average activation + evidence x 8", average))
    return found


def of_size(name: str, pool: ExpertPool) -> Routed:
    """A part of the pool, each inside the next larger one; `name` is "ROUTER, N experts"."""
    router, _, size = name.removesuffix(" experts").partition(", ")
    names = list(pool.names)
    random.Random(0).shuffle(names)
    part = ExpertPool(pool[each] for each in sorted(names[: int(size)]))
    return Routed(name, router=router, pool=part)
