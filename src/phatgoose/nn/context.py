"""Tells a layer which tokens it is looking at."""

import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from phatgoose.nn import arguments as given
from phatgoose.nn import past as pasts
from phatgoose.nn.copying import refuse_copy
from phatgoose.nn.forward import Forward, Forwards, Stream
from phatgoose.nn.generation import (
    Generation,
    Step,
    read_prompt,
    rest_of,
    setting,
    without_finished,
)
from phatgoose.nn.past import Past
from phatgoose.types import TokenContext


class ContextKeeper:
    """Follows the forwards of a transformers model and keeps their TokenContext.

    A site's tokens are one of four streams: the encoder's, the decoder's (the only one of a
    decoder-only model), for keys and values of cross-attention, the encoder's states as the
    decoder sees them ("cross"), or the last tokens, where the output head sees no others ("head").

    During `generate` the ids so far come from the arguments of `prepare_inputs_for_generation`,
    which are right under beam search. In a hand-written loop they come from the forwards that
    filled the cache. A `generate` holds the pool from its beginning to its end.
    """

    def __init__(self, model: Any, forwards: Forwards | None = None) -> None:
        self.forwards = Forwards() if forwards is None else forwards
        self._model = model
        self._mine = threading.local()  # of each thread: see _generations, _step and _encoded
        self._undo: list[Callable[[], object]] = []
        self._encoder_prefix: str | None = None
        self._head = _name_of_head(model)
        try:
            self._watch_all(model)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Take all hooks off the model."""
        while self._undo:
            self._undo.pop()()

    def find(
        self, module: str, x: Tensor, forward: Forward | None = None
    ) -> tuple[Stream, TokenContext | None]:
        """The stream of `module`'s input `x`, and the context of its tokens if it is known.

        It is unknown if `module` runs outside a forward of the model, or sees a part of its tokens.
        """
        if torch.compiler.is_compiling():
            return "decoder", None
        forward = self.forwards.now() if forward is None else forward
        stream: Stream = "decoder"
        if self._encoder_prefix is not None:
            if module.startswith(self._encoder_prefix):
                stream = "encoder"
            elif forward.cross_states is not None and _same(x, forward.cross_states):
                stream = "cross"
        context = forward.contexts.get(stream)
        if context is not None and module == self._head and forward.kept is not None:
            stream, context = "head", replace(context, length=min(context.length, forward.kept))
        if context is not None and context.batch * context.length != x.shape[:-1].numel():
            context = None
        return stream, context

    # ------------------------------------------------------------ hooks

    def _watch_all(self, model: Any) -> None:
        self._refuse_copies(model)
        base = getattr(model, getattr(model, "base_model_prefix", "") or "", None)
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            encoder, decoder = model.get_encoder(), model.get_decoder()
            prefix = next(name for name, module in model.named_modules() if module is encoder)
            self._encoder_prefix = prefix + "."
            self._watch(model)
            self._watch(encoder, self._enter_encoder, leave=self._leave_encoder)
            self._watch(decoder, self._enter_decoder, leave=self._leave_decoder)
        else:
            self._watch(model, self._enter_decoder, leave=self._leave_decoder)
        if isinstance(base, nn.Module) and base is not model:
            self._watch(base)
        if hasattr(model, "prepare_inputs_for_generation"):
            signature = inspect.signature(model.prepare_inputs_for_generation)
            self._flagged = "is_first_iteration" in signature.parameters  # transformers 5
            self._replace("prepare_inputs_for_generation", self._prepare)
        if hasattr(model, "generate"):
            self._generate_signature = inspect.signature(model.generate)
            self._replace("generate", self._generate)

    def _watch(
        self,
        module: nn.Module,
        enter: Callable[[Forward, dict[str, Any]], None] | None = None,
        leave: Callable[[Forward, Any], None] | None = None,
    ) -> None:
        """Have a forward begin and end with `module`, and its arguments and output looked at."""
        signature = inspect.signature(module.forward)
        part = module is not self._model

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if torch.compiler.is_compiling():
                return
            forward = self.forwards.begin(module, sys._getframe(1), part=part)
            if enter is not None and not forward.captured:
                enter(forward, given.named(signature, args, kwargs))

        def after(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            if not torch.compiler.is_compiling():
                self.forwards.end(module, output, leave)

        pre = module.register_forward_pre_hook(before, with_kwargs=True)
        post = module.register_forward_hook(after, always_call=True)
        self._undo += [pre.remove, post.remove]
        self._refuse_copies(module)

    def _refuse_copies(self, module: nn.Module) -> None:
        """Have copy and pickle, which ask the object itself, fail before they come to its hooks."""
        module.__dict__["__reduce_ex__"] = refuse_copy
        self._undo.append(lambda: module.__dict__.pop("__reduce_ex__", None))

    def _replace(self, name: str, run: Callable[..., Any]) -> None:
        """Have `run(original, ...)` called in place of a method of the model."""
        before = self._model.__dict__.get(name)  # of another keeper
        original = getattr(self._model, name)

        @functools.wraps(original)  # transformers looks at its signature
        def call(*args: Any, **kwargs: Any) -> Any:
            return run(original, *args, **kwargs)

        setattr(self._model, name, call)

        def undo() -> None:
            self._model.__dict__.pop(name)
            if before is not None:
                self._model.__dict__[name] = before

        self._undo.append(undo)

    # ------------------------------------------------------------ generate

    def _generate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        arguments = given.named(self._generate_signature, args, kwargs)
        with self.forwards.lock.reading(), self._generating(read_prompt(self._model, arguments)):
            return original(*args, **kwargs)

    @contextmanager
    def _generating(self, generation: Generation) -> Iterator[None]:
        self._generations().append(generation)
        try:
            yield
        finally:
            self._generations().remove(generation)
            self._mine.step = None

    def _generations(self) -> list[Generation]:
        """The calls of `generate` that this thread is in, innermost last."""
        found: list[Generation] = self._mine.__dict__.setdefault("generations", [])
        return found

    def _prepare(
        self, original: Callable[..., Any], input_ids: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        key = "attention_mask" if self._encoder_prefix is None else "decoder_attention_mask"
        first = kwargs.get("is_first_iteration", False) if self._flagged else None
        self._mine.step = Step(input_ids, kwargs.get(key), first)
        return original(input_ids, *args, **kwargs)

    # ------------------------------------------------------------ what a forward reads

    def _enter_encoder(self, forward: Forward, arguments: dict[str, Any]) -> None:
        shape = given.shape_of(arguments)
        if shape is not None:
            forward.contexts["encoder"] = _context(
                shape, arguments.get("input_ids"), arguments.get("attention_mask")
            )

    def _enter_decoder(self, forward: Forward, arguments: dict[str, Any]) -> None:
        step: Step | None = self._mine.__dict__.pop("step", None)
        shape = given.shape_of(arguments)
        if shape is None:
            return
        forward.cache = cache = given.cache_of(arguments.values())
        past = 0 if cache is None else int(cache.get_seq_length())
        so_far = () if step is None else (step.ids, step.mask)
        forward.unread = given.unread(arguments, cache, so_far, past + shape[1])
        if forward.unread:
            return
        before = pasts.recall(cache, shape[0], past) if past else None
        context = self._read(shape, arguments, step, before, past)
        forward.contexts["decoder"] = context
        kept = arguments.get("logits_to_keep")
        forward.kept = kept if isinstance(kept, int) and kept > 0 else None
        self._enter_cross(forward, arguments)

    def _read(
        self,
        shape: tuple[int, int, torch.device],
        arguments: dict[str, Any],
        step: Step | None,
        before: Past | None,
        past: int,
    ) -> TokenContext:
        """The context of a decoder's forward, whose cache holds `past` tokens, `before`."""
        rows, length, _ = shape
        ids, mask = arguments.get("input_ids"), arguments.get("attention_mask")
        why = "the tokens were given as embeddings" if ids is None else ""
        if step is not None:
            mask = step.mask if step.mask is not None else mask
            if step.ids is not None and step.ids.shape == (rows, past + length):
                ids, why = step.ids, ""
        if before is not None and ids is not None and ids.shape[1] == length:
            why = why or before.why
            ids = None if before.ids is None else torch.cat([before.ids, ids], dim=1)
        context = _context(shape, ids, mask, None if before is None else before.real, past)
        prompt = None if before is None else before.prompt
        context = replace(context, prompt=prompt, why=why if ids is None else "")
        return context if step is None else self._within(context, step, past)

    def _within(self, context: TokenContext, step: Step, past: int) -> TokenContext:
        """What the context is as a step of `generate`."""
        generations = self._generations()
        if not generations:  # called past the model's own attribute
            ends = setting(self._model, "eos_token_id", {})
            generations = self._mine.__dict__.setdefault("lone", [Generation(ends=ends)])
        generation, total = generations[-1], context.real.shape[1]
        first, length = step.first if step.first is not None else not past, generation.length
        if length is None or (generation.ids is None and (first or total < length)):
            generation.length = length = total
        context = replace(context, prompt=length)
        if total < length:
            return replace(context, ahead=rest_of(generation, context))
        return without_finished(context, generation.ends)

    def _enter_cross(self, forward: Forward, arguments: dict[str, Any]) -> None:
        states = arguments.get("encoder_hidden_states")
        forward.cross_states = states
        if states is None:
            return
        forward.contexts["cross"] = _context(
            (*states.shape[:2], states.device),
            self._encoder_ids(states),
            arguments.get("encoder_attention_mask"),
        )

    def _encoder_ids(self, states: Tensor) -> Tensor | None:
        """The ids `states` were made from, if they are what the encoder gave this thread last."""
        encoded: tuple[Tensor, Tensor | None] | None = getattr(self._mine, "encoded", None)
        if encoded is None:
            return None
        output, ids = encoded
        if _same(states, output):
            return ids
        beams = max(1, states.shape[0] // output.shape[0])  # which share their encoder's row
        output = output.repeat_interleave(beams, dim=0)
        if (output.shape, output.device) != (states.shape, states.device):
            return None
        if not bool((output == states).all()):
            return None
        ids = None if ids is None else ids.repeat_interleave(beams, dim=0)
        self._mine.encoded = (states.detach(), ids)
        return ids

    def _leave_encoder(self, forward: Forward, output: Any) -> None:
        context, self._mine.encoded = forward.contexts.get("encoder"), None
        if context is not None and output is not None:
            self._mine.encoded = (output[0].detach(), context.ids)

    def _leave_decoder(self, forward: Forward, output: Any) -> None:
        context = forward.contexts.get("decoder")
        if context is not None and output is not None:
            found = given.cache_in(output)  # a model that was given no cache may have made one
            for cache in {id(c): c for c in (forward.cache, found) if c is not None}.values():
                pasts.keep(cache, context)
        forward.contexts.pop("decoder", None)
        forward.contexts.pop("cross", None)
        forward.cross_states, forward.unread = None, ""


def _name_of_head(model: Any) -> str | None:
    """The name of the output head among the model's modules."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if get is not None else None
    return next((name for name, m in model.named_modules() if m is head), None) if head else None


def _context(
    shape: tuple[int, int, torch.device],
    ids: Tensor | None,
    mask: Any,
    before: Tensor | None = None,
    past: int = 0,
) -> TokenContext:
    """`before` tells which of the `past` tokens in the cache are real."""
    rows, length, device = shape
    if isinstance(mask, Tensor) and mask.shape == (rows, past + length):
        real = mask.bool()
    else:  # no mask, or one already turned 4D: tokens are real unless a forward before said not
        real = torch.ones(rows, past + length, dtype=torch.bool, device=device)
        if before is not None:
            real[:, :past] = before
        if isinstance(mask, Tensor) and mask.shape == (rows, length):
            real[:, past:] = mask.bool()
    return TokenContext(length=length, ids=ids, real=real)


def _same(x: Tensor, y: Tensor) -> bool:
    return x is y or (x.data_ptr() == y.data_ptr() and x.shape == y.shape)
