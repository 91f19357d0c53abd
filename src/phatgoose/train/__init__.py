"""Trains gates, and adapters that want gates."""

from typing import TYPE_CHECKING

from phatgoose.lazy import on_first_use

if TYPE_CHECKING:
    from phatgoose.train.adapters import train_adapter, train_adapters_together
    from phatgoose.train.collection import gate_experts, train_experts
    from phatgoose.train.derive import derive_signatures
    from phatgoose.train.gates import train_gates, train_gates_together
    from phatgoose.train.settings import AdapterTraining, GateTraining
    from phatgoose.train.spread import train_experts_on
    from phatgoose.train.trainer import train_gates_from_trainer

__all__ = [
    "AdapterTraining",
    "GateTraining",
    "derive_signatures",
    "gate_experts",
    "train_adapter",
    "train_adapters_together",
    "train_experts",
    "train_experts_on",
    "train_gates",
    "train_gates_from_trainer",
    "train_gates_together",
]

# On first use, so that the command line reads the settings' defaults without loading torch.
__getattr__ = on_first_use(
    __name__,
    {
        "AdapterTraining": "settings",
        "GateTraining": "settings",
        "derive_signatures": "derive",
        "gate_experts": "collection",
        "train_adapter": "adapters",
        "train_adapters_together": "adapters",
        "train_experts": "collection",
        "train_experts_on": "spread",
        "train_gates": "gates",
        "train_gates_from_trainer": "trainer",
        "train_gates_together": "gates",
    },
)
