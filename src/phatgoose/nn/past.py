"""What a KV cache has read, kept on the cache itself, so that a copy of it takes it along."""

from dataclasses import dataclass
from typing import Any

from jaxtyping import Bool, Int
from torch import Tensor

from phatgoose.types import TokenContext

ATTRIBUTE = "_phatgoose_past"


@dataclass(frozen=True)
class Past:
    """The tokens that a KV cache holds."""

    ids: Int[Tensor, "B P"] | None
    real: Bool[Tensor, "B P"] | None  # None: nothing is known
    prompt: int = 0  # how many of them were given first
    why: str = ""  # the ids are not known


@dataclass(frozen=True)
class _Kept:
    context: TokenContext
    keys: Tensor | None  # the first layer's; a copy of the cache holds a copy of this very tensor


def keep(cache: Any, context: TokenContext) -> None:
    """Write on a cache what it holds now."""
    setattr(cache, ATTRIBUTE, _Kept(context, _keys(cache)))


def recall(cache: Any, rows: int, length: int) -> Past:
    """What a cache of `length` tokens of so many sequences holds; it is forgotten meanwhile.

    A copy is known, and one that was cropped. In one whose rows were reordered, chosen or repeated
    the tokens are other ones than were read.
    """
    kept: _Kept | None = cache.__dict__.pop(ATTRIBUTE, None)
    if kept is None:
        return Past(
            None,
            None,
            why="the KV cache holds tokens that no routed forward of the model read, or the last "
            "one failed",
        )
    context = kept.context
    held = context.real.shape[1]
    if context.batch != rows or length > held or not _same_start(kept.keys, _keys(cache)):
        return Past(
            None,
            None,
            why="the KV cache was changed since the model read into it (reordered, its rows chosen "
            "or repeated, or refilled)",
        )
    ids = None if context.ids is None else context.ids[:, :length]
    prompt = min(context.prompt_length, length)
    return Past(ids, context.real[:, :length], prompt, context.why)


def _keys(cache: Any) -> Tensor | None:
    """The keys of a cache's first layer that has any, or what stands for them."""
    cache = getattr(cache, "self_attention_cache", cache)
    for layer in getattr(cache, "layers", None) or getattr(cache, "key_cache", None) or ():
        if isinstance(layer, Tensor):
            return layer
        keys = getattr(layer, "keys", None)
        if isinstance(keys, Tensor):
            return keys
    return None


def _same_start(before: Tensor | None, now: Tensor | None) -> bool:
    """Whether `now` is the tensor `before`, or the first part of it along its tokens."""
    if before is None or now is None or before is now:
        return before is now
    return (
        before.device == now.device
        and before.data_ptr() == now.data_ptr()
        and before.stride() == now.stride()
        and before.dim() == now.dim()
        and before.shape[:-2] == now.shape[:-2]
        and before.shape[-1] == now.shape[-1]
        and now.shape[-2] <= before.shape[-2]
    )
