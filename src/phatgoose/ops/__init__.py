"""The arithmetic of routing, on plain tensors."""

from phatgoose.ops.backends import BACKENDS, Backend, backend_names, choose_backend
from phatgoose.ops.backends.reference import routed_lora_reference
from phatgoose.ops.choose import Choosing, choose_experts
from phatgoose.ops.operators import routed_lora
from phatgoose.ops.rows import Rows
from phatgoose.ops.scoring import EPS, Extras, Gates, choose_open, gate_scores, pieces_of

__all__ = [
    "BACKENDS",
    "EPS",
    "Backend",
    "Choosing",
    "Extras",
    "Gates",
    "Rows",
    "backend_names",
    "choose_backend",
    "choose_experts",
    "choose_open",
    "gate_scores",
    "pieces_of",
    "routed_lora",
    "routed_lora_reference",
]
