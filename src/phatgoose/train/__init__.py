"""Training gates, and adapters to gate."""

from phatgoose.train.adapters import train_adapter, train_adapters_together
from phatgoose.train.collection import gate_experts, train_experts
from phatgoose.train.derive import derive_signatures
from phatgoose.train.gates import train_gates, train_gates_together
from phatgoose.train.settings import AdapterTraining, GateTraining
from phatgoose.train.trainer import train_gates_from_trainer

__all__ = [
    "AdapterTraining",
    "GateTraining",
    "derive_signatures",
    "gate_experts",
    "train_adapter",
    "train_adapters_together",
    "train_experts",
    "train_gates",
    "train_gates_from_trainer",
    "train_gates_together",
]
