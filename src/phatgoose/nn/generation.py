"""What a call of `generate` was given, and which tokens it wrote itself."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from phatgoose.types import TokenContext


@dataclass(eq=False)
class Generation:
    """One call of `generate`."""

    length: int | None = None  # of the prompt
    ids: Tensor | None = None  # the prompt's last tokens, as the caller gave them
    mask: Tensor | None = None  # of the whole prompt
    ends: Any = None  # ids that end a sequence


@dataclass(frozen=True)
class Step:
    """What `generate` prepared its next forward from."""

    ids: Tensor | None  # all tokens so far, or a chunk of the prompt
    mask: Tensor | None
    first: bool | None  # whether it is the first of its sequences; None: it does not tell


def read_prompt(model: Any, arguments: Mapping[str, Any]) -> Generation:
    """What `generate` was given, whether it reads it at once, in chunks or with guesses."""
    ids = arguments.get("inputs")
    ids = arguments.get("input_ids") if ids is None else ids
    pad, ends = (setting(model, name, arguments) for name in ("pad_token_id", "eos_token_id"))
    unknown = (
        getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        or arguments.get("inputs_embeds") is not None
    )
    if unknown or not isinstance(ids, Tensor) or ids.dim() != 2:
        return Generation(ends=ends)
    mask = arguments.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2:  # as `generate` makes it
        guessed = pad is not None and pad not in (ends if isinstance(ends, list) else [ends])
        mask = ids != pad if guessed else torch.ones_like(ids)
    # Where the mask is longer, a cache has the rest.
    return Generation(max(ids.shape[1], mask.shape[1]), ids, mask, ends)


def setting(model: Any, name: str, arguments: Mapping[str, Any]) -> Any:
    """A setting of `generate`, from wherever it takes it."""
    if name in arguments:
        return arguments[name]
    own = getattr(model, "generation_config", None)
    given_value = getattr(arguments.get("generation_config"), name, None)
    return getattr(own, name, None) if given_value is None else given_value


def without_finished(context: TokenContext, ends: Any) -> TokenContext:
    """Count what `generate` appends to sequences that have ended as the padding it is.

    No mask says so. Only an end-of-sequence among the tokens that it wrote before tells.
    """
    if ends is None or context.ids is None:
        return context
    prompt = context.prompt_length
    written = context.ids[:, prompt:]
    end = torch.isin(written, torch.as_tensor(ends, device=written.device))
    real = context.real.clone()
    real[:, prompt:] &= end.long().cumsum(-1) - end.long() == 0
    return replace(context, real=real)


def rest_of(generation: Generation, context: TokenContext) -> tuple[Tensor, Tensor] | None:
    """Ids and mask of the prompt's tokens that come after this chunk of it, for every row."""
    ids, mask, length = generation.ids, generation.mask, generation.length
    if ids is None or mask is None or length is None or context.batch % len(ids):
        return None
    read = context.real.shape[1] - length  # from the end
    rows = context.batch // len(ids)  # beams
    rest = (ids[:, read:], mask[:, read:].bool())
    device = context.real.device
    return tuple(each.repeat_interleave(rows, dim=0).to(device) for each in rest)  # type: ignore[return-value]
