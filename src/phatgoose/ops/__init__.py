"""The arithmetic of routing, on plain tensors."""

from phatgoose.ops.choose import choose_experts
from phatgoose.ops.lora import routed_lora, routed_lora_reference

__all__ = ["choose_experts", "routed_lora", "routed_lora_reference"]
