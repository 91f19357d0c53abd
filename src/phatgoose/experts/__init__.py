"""Experts on disk: PEFT folders with gates and other signatures beside the adapter."""

from phatgoose.experts.base import BaseIdentity, identify_base, linear_modules
from phatgoose.experts.delta import Delta
from phatgoose.experts.deltas import DELTAS
from phatgoose.experts.expert import Expert, load_expert
from phatgoose.experts.lora import adapter_hash
from phatgoose.experts.low_rank import LoraModule
from phatgoose.experts.save import save_expert
from phatgoose.experts.signatures import GateRecord, Gates, Signatures
from phatgoose.experts.sources import expert_sources
from phatgoose.experts.verify import verify_expert

__all__ = [
    "DELTAS",
    "BaseIdentity",
    "Delta",
    "Expert",
    "GateRecord",
    "Gates",
    "LoraModule",
    "Signatures",
    "adapter_hash",
    "expert_sources",
    "identify_base",
    "linear_modules",
    "load_expert",
    "save_expert",
    "verify_expert",
]
