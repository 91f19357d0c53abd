"""A prior made of what token ids are worth: `strength` times the running mean."""

import torch
from jaxtyping import Float
from torch import Tensor

from phatgoose.errors import ConfigError
from phatgoose.types import TokenContext


def prior_of(
    worth: Float[Tensor, "V E"], context: TokenContext, *, strength: float, ahead: bool, who: str
) -> Float[Tensor, "T E"]:
    """The prior of each token of this forward, row after row, in fp32.

    With `ahead` a token of the prompt knows the rest of it. Raises ConfigError, in the name of
    `who`, if it needs ids that are not known.
    """
    if context.ids is None:
        raise ConfigError(
            f"{who}: needs the ids of all tokens so far, and {context.why}. Give the model the "
            "whole text, or a KV cache as the model left it (or a copy or a crop of it)."
        )
    means = _means_so_far(worth, context, ahead=ahead, who=who)
    return strength * means.float().flatten(0, 1)


def _means_so_far(
    worth: Float[Tensor, "V E"], context: TokenContext, *, ahead: bool, who: str
) -> Float[Tensor, "B L E"]:
    """For each token of this forward, the mean worth of the real tokens that it knows; fp64."""
    ids, real, total = context.ids, context.real, context.real.shape[1]
    assert ids is not None
    if ahead and total < context.prompt_length:  # the prompt is read in chunks
        if context.ahead is None:
            raise ConfigError(
                f"{who}: needs the whole prompt, and the model is given a part of it. Give it "
                "whole, or use a router that reads as it goes (evidence, adapter_evidence)."
            )
        ids = torch.cat([ids, context.ahead[0]], dim=1)
        real = torch.cat([real, context.ahead[1]], dim=1)
    real = real.unsqueeze(-1)
    # fp64, so that prefill and decode agree whatever order a device sums in.
    sums = (worth[ids] * real).double().cumsum(1)
    means = sums / real.long().cumsum(1).clamp_min(1)
    if not ahead:
        return means[:, -context.length :]
    known = torch.arange(total - context.length, total, device=ids.device)
    return means[:, known.clamp_min(context.prompt_length - 1)]
