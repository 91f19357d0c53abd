"""Freezes a model for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from phatgoose.errors import ConfigError


@contextmanager
def frozen(model: nn.Module, *, dropout: bool = False) -> Iterator[None]:
    """Freeze all parameters for a while. Dropout is on if it is wanted, and else off.

    Without dropout the model is in evaluation mode, but for what checkpointing needs: modules that
    transformers checkpoints in training mode alone, and embeddings with a gradient, for what a
    reentrant checkpoint computes has none unless its input has one.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    modes = [(module, module.training) for module in model.modules()]
    rates = [] if dropout else list(_dropout_rates(model))
    handle = _thaw_embeddings(model) if any(map(is_checkpointed, model.modules())) else None
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        model.train(dropout)
        for module in model.modules():
            # The modules inside stay in eval.
            module.training |= is_checkpointed(module)
        for module, name, _ in rates:
            setattr(module, name, 0.0)
        yield
    finally:
        if handle is not None:
            handle.remove()
        for parameter in parameters:
            parameter.requires_grad_(True)
        for module, mode in modes:
            module.training = mode
        for module, name, rate in rates:
            setattr(module, name, rate)


def _thaw_embeddings(model: nn.Module) -> Any:
    """Hook the input embeddings, so that what they return has a gradient. Returns the handle."""
    find: Any = getattr(model, "get_input_embeddings", None)
    embeddings = find() if callable(find) else None
    if not isinstance(embeddings, nn.Module):
        return None

    def thaw(_: nn.Module, __: Any, output: Any) -> None:
        if isinstance(output, Tensor) and torch.is_grad_enabled() and not output.requires_grad:
            output.requires_grad_(True)

    return embeddings.register_forward_hook(thaw)


def is_checkpointed(module: nn.Module) -> bool:
    """Whether a module of transformers' computes what is inside once more for its gradients."""
    return bool(getattr(module, "gradient_checkpointing", False))


def any_checkpointed(model: nn.Module) -> bool:
    """Tell whether some module is. Raises ConfigError if the model says so and none is found."""
    if any(map(is_checkpointed, model.modules())):
        return True
    for name in ("is_activation_checkpointing", "is_gradient_checkpointing"):  # the new name first
        if hasattr(type(model), name):
            if not getattr(model, name):
                return False
            raise ConfigError(
                f"{type(model).__name__}: checkpoints its activations in a way that this "
                "version of phatgoose does not know. Turn that off first."
            )
    return False


def _dropout_rates(model: nn.Module) -> Iterator[tuple[nn.Module, str, float]]:
    """Rates that checkpointed modules read in training mode, like OPT's `dropout`."""
    for module in model.modules():
        if is_checkpointed(module):
            for name, value in vars(module).items():
                if "drop" in name and isinstance(value, float):
                    yield module, name, value
