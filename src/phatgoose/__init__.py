"""phatgoose: recycle LoRA adapters by routing every token to the ones that fit.

PHATGOOSE: Muqeeth, Liu, Liu, Raffel, "Learning to Route Among Specialized Experts for Zero-Shot
Generalization", ICML 2024, arXiv:2402.05859.
"""

from typing import TYPE_CHECKING

from phatgoose.errors import PhatgooseError
from phatgoose.lazy import on_first_use

if TYPE_CHECKING:
    from phatgoose.experts import Expert, Gates, load_expert, save_expert, verify_expert
    from phatgoose.pool import (
        Choice,
        ExpertPool,
        assign,
        merge_experts,
        record,
        restrict,
        route,
        subtract_general,
        unroute,
    )
    from phatgoose.routers import Router
    from phatgoose.train import (
        derive_signatures,
        train_adapter,
        train_adapters_together,
        train_gates,
        train_gates_from_trainer,
        train_gates_together,
    )
    from phatgoose.types import Routing, TokenContext

__version__ = "0.2.0"

# Loaded on first use, so that `import phatgoose` and `phatgoose --help` do not load torch.
_WHERE = {
    "Choice": "pool",
    "Expert": "experts",
    "ExpertPool": "pool",
    "Gates": "experts",
    "Router": "routers",
    "Routing": "types",
    "TokenContext": "types",
    "assign": "pool",
    "derive_signatures": "train",
    "load_expert": "experts",
    "merge_experts": "pool",
    "record": "pool",
    "restrict": "pool",
    "route": "pool",
    "save_expert": "experts",
    "subtract_general": "pool",
    "train_adapter": "train",
    "train_adapters_together": "train",
    "train_gates": "train",
    "train_gates_from_trainer": "train",
    "train_gates_together": "train",
    "unroute": "pool",
    "verify_expert": "experts",
}
__all__ = [
    "Choice",
    "Expert",
    "ExpertPool",
    "Gates",
    "PhatgooseError",
    "Router",
    "Routing",
    "TokenContext",
    "__version__",
    "assign",
    "derive_signatures",
    "load_expert",
    "merge_experts",
    "record",
    "restrict",
    "route",
    "save_expert",
    "subtract_general",
    "train_adapter",
    "train_adapters_together",
    "train_gates",
    "train_gates_from_trainer",
    "train_gates_together",
    "unroute",
    "verify_expert",
]


__getattr__ = on_first_use(__name__, _WHERE)
