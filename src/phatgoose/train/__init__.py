"""Training gates, and adapters to gate."""

from phatgoose.train.adapter import AdapterTraining, train_adapter
from phatgoose.train.gates import train_gates
from phatgoose.train.trainer import train_gates_from_trainer

__all__ = ["AdapterTraining", "train_adapter", "train_gates", "train_gates_from_trainer"]
