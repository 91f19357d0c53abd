"""The arithmetic of routing, on plain tensors."""

from phatgoose.ops.backend import BACKENDS, Backend, choose_backend
from phatgoose.ops.choose import choose_experts
from phatgoose.ops.library import EPS, gate_scores, pieces_of, routed_lora
from phatgoose.ops.lora import routed_lora_reference

__all__ = [
    "BACKENDS",
    "EPS",
    "Backend",
    "choose_backend",
    "choose_experts",
    "gate_scores",
    "pieces_of",
    "routed_lora",
    "routed_lora_reference",
]
