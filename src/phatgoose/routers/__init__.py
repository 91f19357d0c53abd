"""Routers. A router says what it keeps of an expert at a site, and how it scores a token."""

from phatgoose.routers.arrow import ArrowRouter
from phatgoose.routers.average import AverageActivationRouter
from phatgoose.routers.base import Modifier, Router, make_router, router_kinds, router_names
from phatgoose.routers.evidence import (
    AdapterEvidenceRouter,
    AdapterPromptEvidenceRouter,
    EvidenceRouter,
    PromptEvidenceRouter,
)
from phatgoose.routers.lag import LagRouter
from phatgoose.routers.mixed import MixedRouter, derivations
from phatgoose.routers.phatgoose import PhatgooseRouter
from phatgoose.routers.seqr import SeqrRouter
from phatgoose.routers.spectr import SpectrNormRouter, SpectrRouter
from phatgoose.routers.uniform import UniformRouter
from phatgoose.routers.zscore import ZScoreRouter

__all__ = [
    "AdapterEvidenceRouter",
    "AdapterPromptEvidenceRouter",
    "ArrowRouter",
    "AverageActivationRouter",
    "EvidenceRouter",
    "LagRouter",
    "MixedRouter",
    "Modifier",
    "PhatgooseRouter",
    "PromptEvidenceRouter",
    "Router",
    "SeqrRouter",
    "SpectrNormRouter",
    "SpectrRouter",
    "UniformRouter",
    "ZScoreRouter",
    "derivations",
    "make_router",
    "router_kinds",
    "router_names",
]
