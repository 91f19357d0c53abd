"""A model that is frozen for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def frozen(model: nn.Module, *, dropout: bool = False) -> Iterator[None]:
    """Freeze all parameters, in training mode if its dropout is wanted, else with none; then undo.

    Without dropout the model is in evaluation mode, but for what checkpointing needs.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    modes = [(module, module.training) for module in model.modules()]
    rates = [] if dropout else list(_dropout_rates(model))
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        model.train(dropout)
        for module in model.modules():
            if getattr(module, "gradient_checkpointing", False):
                # transformers checkpoints only in training mode; the modules inside stay in eval.
                module.training = True
        for module, name, _ in rates:
            setattr(module, name, 0.0)
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
        for module, mode in modes:
            module.training = mode
        for module, name, rate in rates:
            setattr(module, name, rate)


def _dropout_rates(model: nn.Module) -> Iterator[tuple[nn.Module, str, float]]:
    """Rates that checkpointed modules read in training mode, like OPT's `dropout`."""
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            for name, value in vars(module).items():
                if "drop" in name and isinstance(value, float):
                    yield module, name, value
