"""Reads the arguments of a transformers model's forward, by what they are if names change."""

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor


def named(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Name the arguments of a forward, those in its `**kwargs` too."""
    try:
        bound = signature.bind_partial(*args, **kwargs).arguments
    except TypeError:  # the forward will say so itself
        return dict(kwargs)
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            bound = {**bound.pop(name, {}), **bound}
    return bound


def shape_of(arguments: Mapping[str, Any]) -> tuple[int, int, torch.device] | None:
    """Find the sequences, tokens and device of a forward; None without ids or embeddings."""
    for key in ("input_ids", "inputs_embeds"):
        if arguments.get(key) is not None:
            return (*arguments[key].shape[:2], arguments[key].device)
    return None


def cache_of(values: Iterable[Any]) -> Any:
    """Find the KV cache among a forward's arguments or outputs, by what it can do."""
    return next((value for value in values if hasattr(value, "get_seq_length")), None)


def cache_in(output: Any) -> Any:
    """The KV cache among a forward's outputs."""
    values = output.values() if isinstance(output, Mapping) else output
    iterable = isinstance(values, Iterable) and not isinstance(values, Tensor)
    return cache_of(values) if iterable else None


def unread(
    arguments: Mapping[str, Any], cache: Any, so_far: Iterable[Tensor | None], length: int
) -> str:
    """What shows that tokens came before which a forward's arguments do not tell of, or "".

    `length` tokens are known: those of the forward, and what its cache holds. `so_far` are masks
    and ids of all tokens.
    """
    for name, value in arguments.items():
        if value is not cache and name not in ("attention_mask", "labels") and _is_state(value):
            return f"`{name}` ({type(value).__name__}) is no KV cache that tells its length"
    if any(arguments.get(name) is not None for name in ("cu_seq_lens_q", "cu_seqlens")):
        return "several sequences are packed into one row"
    for seen in (arguments.get("attention_mask"), *so_far):
        if isinstance(seen, Tensor) and seen.dim() == 2 and seen.shape[1] > length:
            return (
                f"there are {seen.shape[1]} tokens so far, of which {length} are in this forward "
                "and in a KV cache among its arguments"
            )
    return ""


def _is_state(value: Any) -> bool:
    """Whether a forward's argument is what an earlier forward left, and no KV cache with a length.

    Such are the tuples of tensors of older models, and the state of recurrent ones.
    """
    if isinstance(value, list | tuple):
        return any(_is_state(each) for each in value) or (
            len(value) > 0 and all(isinstance(v, Tensor) and v.is_floating_point() for v in value)
        )
    return hasattr(value, "conv_states") or hasattr(value, "ssm_states")
