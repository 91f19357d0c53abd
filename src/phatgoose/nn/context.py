"""Knowing, inside a layer, which tokens it is looking at."""

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from phatgoose.nn.copying import refuse_copy
from phatgoose.types import TokenContext

Stream = Literal["decoder", "encoder", "cross"]


class ContextKeeper:
    """Follows the forwards of a transformers model and keeps their TokenContext.

    A site's tokens are one of three streams: the encoder's, the decoder's (the only one of a
    decoder-only model), or, for keys and values of cross-attention, the encoder's states as the
    decoder sees them ("cross").

    During `generate` the ids so far come from the arguments of `prepare_inputs_for_generation`,
    which are right under beam search; in a hand-written loop from the forwards that filled the
    cache.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._streams: dict[Stream, TokenContext | None] = dict.fromkeys(
            ("decoder", "encoder", "cross")
        )
        self._cross_states: Tensor | None = None
        self.unread = ""  # what of a forward's arguments hides which tokens came before
        self._encoded: tuple[Tensor, Tensor | None] | None = None  # the encoder's output, its ids
        self._prompt_length = 0  # tokens that `generate` was given
        self._generating: tuple[Tensor | None, Tensor | None, bool | None] | None = None
        self._history: WeakKeyDictionary[Any, TokenContext] = WeakKeyDictionary()
        self._undo: list[Callable[[], object]] = []
        self._encoder_prefix: str | None = None
        self._refuse_copies(model)
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            encoder, decoder = model.get_encoder(), model.get_decoder()
            prefix = next(name for name, module in model.named_modules() if module is encoder)
            self._encoder_prefix = prefix + "."
            self._watch(encoder, self._enter_encoder, leave=self._leave_encoder)
            self._watch(decoder, self._enter_decoder, leave=self._leave_decoder)
        else:
            self._watch(model, self._enter_decoder, leave=self._leave_decoder)
        if hasattr(model, "prepare_inputs_for_generation"):
            self._listen_to_generate()

    def close(self) -> None:
        """Take all hooks off the model."""
        while self._undo:
            self._undo.pop()()

    def find(self, module: str, x: Tensor) -> tuple[Stream, TokenContext | None]:
        """The stream of `module`'s input `x`, and the context of its tokens where it is known.

        It is not where `module` runs outside a forward of the model, or sees a part of its tokens.
        """
        stream: Stream = "decoder"
        if self._encoder_prefix is not None:
            if module.startswith(self._encoder_prefix):
                stream = "encoder"
            elif self._cross_states is not None and _same(x, self._cross_states):
                stream = "cross"
        context = None if _is_captured() else self._streams[stream]
        if context is not None and context.batch * context.length != x.shape[:-1].numel():
            context = None
        return stream, context

    def _watch(
        self,
        module: nn.Module,
        enter: Callable[[dict[str, Any]], None],
        leave: Callable[[Any], None],
    ) -> None:
        signature = inspect.signature(module.forward)

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not _is_captured():
                enter(_arguments(signature, args, kwargs))

        def after(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            if not _is_captured():
                leave(output)

        pre = module.register_forward_pre_hook(before, with_kwargs=True)
        post = module.register_forward_hook(after, always_call=True)
        self._undo += [pre.remove, post.remove]
        self._refuse_copies(module)

    def _refuse_copies(self, module: nn.Module) -> None:
        """Have copy and pickle, which ask the object itself, fail before they come to its hooks."""
        module.__dict__["__reduce_ex__"] = refuse_copy
        self._undo.append(lambda: module.__dict__.pop("__reduce_ex__", None))

    def _listen_to_generate(self) -> None:
        name = "prepare_inputs_for_generation"
        before = self._model.__dict__.get(name)  # of another keeper
        original = self._model.prepare_inputs_for_generation
        flagged = "is_first_iteration" in inspect.signature(original).parameters  # transformers 5

        @functools.wraps(original)  # generate looks at its signature
        def prepare(input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
            key = "attention_mask" if self._encoder_prefix is None else "decoder_attention_mask"
            first = kwargs.get("is_first_iteration", False) if flagged else None
            self._generating = (input_ids, kwargs.get(key), first)
            return original(input_ids, *args, **kwargs)

        self._model.prepare_inputs_for_generation = prepare  # type: ignore[assignment]

        def undo() -> None:
            self._model.__dict__.pop(name)
            if before is not None:
                self._model.__dict__[name] = before

        self._undo.append(undo)

    def _enter_encoder(self, arguments: dict[str, Any]) -> None:
        shape = _shape(arguments)
        if shape is not None:
            self._streams["encoder"] = _context(
                shape, arguments.get("input_ids"), arguments.get("attention_mask"), None
            )

    def _enter_decoder(self, arguments: dict[str, Any]) -> None:
        generating, self._generating = self._generating, None
        shape = _shape(arguments)
        if shape is None:
            return
        cache = _cache(arguments)
        past = 0 if cache is None else int(cache.get_seq_length())
        self.unread = _unread(arguments, cache, generating, past + shape[1])
        if self.unread:
            return
        before = self._history.get(cache) if past else None
        if before is not None and before.real.shape != (shape[0], past):
            before = None  # the cache was cropped behind our back
        ids, mask = arguments.get("input_ids"), arguments.get("attention_mask")
        if generating is not None:
            total, mask_so_far, _ = generating
            mask = mask_so_far if mask_so_far is not None else mask
            if total is not None and total.shape == (shape[0], past + shape[1]):
                ids = total
        if past and ids is not None and ids.shape[1] == shape[1]:
            known = before is not None and before.ids is not None
            ids = torch.cat([before.ids, ids], dim=1) if known else None  # type: ignore[union-attr, list-item]
        context = _context(shape, ids, mask, before, past)
        if generating is not None and ids is not None:
            first = generating[2] if generating[2] is not None else not past
            context = self._without_finished(context, first)
        self._streams["decoder"] = context
        if cache is not None:
            self._history[cache] = context
        self._enter_cross(arguments)

    def _without_finished(self, context: TokenContext, first: bool) -> TokenContext:
        """Count what `generate` appends to sequences that have ended as the padding it is.

        It says so in no mask: only an end-of-sequence among the tokens it wrote before tells.
        """
        if first:  # all there is so far is the prompt, an end in it ends nothing
            self._prompt_length = context.real.shape[1]
        ends = getattr(getattr(self._model, "generation_config", None), "eos_token_id", None)
        if ends is None or context.ids is None:
            return context
        written = context.ids[:, self._prompt_length :]
        end = torch.isin(written, torch.as_tensor(ends, device=written.device))
        real = context.real.clone()
        real[:, self._prompt_length :] &= end.long().cumsum(-1) - end.long() == 0
        return replace(context, real=real)

    def _enter_cross(self, arguments: dict[str, Any]) -> None:
        states = arguments.get("encoder_hidden_states")
        self._cross_states = states
        if states is None:
            return
        self._streams["cross"] = _context(
            (*states.shape[:2], states.device),
            self._encoder_ids(states),
            arguments.get("encoder_attention_mask"),
            None,
        )

    def _encoder_ids(self, states: Tensor) -> Tensor | None:
        """The ids `states` were made from, if they are what the encoder gave last."""
        if self._encoded is None:
            return None
        output, ids = self._encoded
        if _same(states, output):
            return ids
        beams = max(1, states.shape[0] // output.shape[0])  # which share their encoder's row
        output = output.repeat_interleave(beams, dim=0)
        if (output.shape, output.device) != (states.shape, states.device):
            return None
        if not bool((output == states).all()):
            return None
        ids = None if ids is None else ids.repeat_interleave(beams, dim=0)
        self._encoded = (states.detach(), ids)
        return ids

    def _leave_encoder(self, output: Any) -> None:
        context, self._encoded = self._streams["encoder"], None
        if context is not None and output is not None:
            self._encoded = (output[0].detach(), context.ids)

    def _leave_decoder(self, output: Any) -> None:
        context = self._streams["decoder"]
        if context is not None:  # a model that was given no cache may have made one
            for cache in _caches(output):
                self._history[cache] = context
        self._streams["decoder"] = self._streams["cross"] = self._cross_states = None
        self.unread = ""


def _arguments(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """The arguments of a forward by name, those in its `**kwargs` too."""
    try:
        bound = signature.bind_partial(*args, **kwargs).arguments
    except TypeError:  # the forward will say so itself
        return dict(kwargs)
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            bound = {**bound.pop(name, {}), **bound}
    return bound


def _cache(arguments: dict[str, Any]) -> Any:
    """The KV cache among a forward's arguments, told by what it can do: names change."""
    found = (value for value in arguments.values() if hasattr(value, "get_seq_length"))
    return next(found, None)


def _unread(
    arguments: dict[str, Any],
    cache: Any,
    generating: tuple[Tensor | None, Tensor | None, bool | None] | None,
    length: int,
) -> str:
    """What shows that tokens came before which these arguments do not tell of; "" if nothing."""
    for name, value in arguments.items():
        if value is not cache and name not in ("attention_mask", "labels") and _is_state(value):
            return f"`{name}` ({type(value).__name__}) is no KV cache that tells its length"
    masks = [arguments.get("attention_mask")]
    if generating is not None:
        masks += [generating[0], generating[1]]
    for seen in masks:
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


def _caches(output: Any) -> list[Any]:
    """The KV cache among a forward's outputs, if there is one."""
    values = output.values() if isinstance(output, Mapping) else output
    if not isinstance(values, Iterable) or isinstance(values, Tensor):
        return []
    return [value for value in values if hasattr(value, "get_seq_length")]


def _shape(arguments: dict[str, Any]) -> tuple[int, int, torch.device] | None:
    """Sequences, tokens and device of a forward; None without ids or embeddings."""
    for key in ("input_ids", "inputs_embeds"):
        if arguments.get(key) is not None:
            return (*arguments[key].shape[:2], arguments[key].device)
    return None


def _context(
    shape: tuple[int, int, torch.device],
    ids: Tensor | None,
    mask: Any,
    before: TokenContext | None,
    past: int = 0,
) -> TokenContext:
    rows, length, device = shape
    if isinstance(mask, Tensor) and mask.shape == (rows, past + length):
        real = mask.bool()
    else:  # no mask, or one already turned 4D: tokens are real unless a forward before said not
        real = torch.ones(rows, past + length, dtype=torch.bool, device=device)
        if before is not None:
            real[:, :past] = before.real
        if isinstance(mask, Tensor) and mask.shape == (rows, length):
            real[:, past:] = mask.bool()
    return TokenContext(length=length, ids=ids, real=real)


def _is_captured() -> bool:
    """Whether this forward is being compiled or captured: what is kept here would go stale."""
    if torch.compiler.is_compiling():
        return True
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _same(x: Tensor, y: Tensor) -> bool:
    return x is y or (x.data_ptr() == y.data_ptr() and x.shape == y.shape)
