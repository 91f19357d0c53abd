"""Runs the rows of many experts through one frozen base, each through its own adapter."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor, nn

from phatgoose.errors import ConfigError
from phatgoose.experts.delta import Call
from phatgoose.nn.site import BANK
from phatgoose.train.joint.rows import Rows, put_together
from phatgoose.train.joint.stacks import Stack, add_stack
from phatgoose.train.loop.frozen import any_checkpointed, frozen
from phatgoose.train.loop.loop import Pass
from phatgoose.train.loop.mixed import autocasting
from phatgoose.train.loop.placement import device_of, refuse_fsdp1
from phatgoose.train.loop.seeding import OwnRandom
from phatgoose.train.loop.stream import Batch, own_share
from phatgoose.train.loop.targets import LOSSES, Targets, output_head, target_losses


class JointModel:
    """A plain transformers model with a stack of LoRAs at each site.

    `model(batches)` is one forward over one micro-batch of every expert. Its losses are what
    `model(**batch).loss` would be for each: a mean over the expert's own target tokens.
    """

    def __init__(
        self,
        model: Any,
        stacks: Mapping[str, Stack],
        *,
        autocast: torch.dtype | None,
        more: Sequence[tuple[str, Stack]] = (),
    ) -> None:
        self.model = model
        self.stacks = [*stacks.items(), *more]
        self.autocast = autocast
        self.device = device_of(model)
        pad = getattr(model.config, "pad_token_id", None)
        self.pad = pad if isinstance(pad, int) and pad >= 0 else 0
        head = output_head(model)
        self._head_is_site = any(model.get_submodule(name) is head for name, _ in self.stacks)
        self._rows = Rows.of([1], self.device)
        self._shapes: set[tuple[int, ...]] = set()

    @contextmanager
    def installed(self, *, dropout: bool = False) -> Iterator[None]:
        """Freeze the base and apply the stacks. All of it is undone afterwards."""
        handles = [
            self.model.get_submodule(name).register_forward_hook(
                self._hook(name, stack), with_kwargs=True
            )
            for name, stack in self.stacks
        ]
        if any_checkpointed(self.model):
            # Reentrant checkpointing passes gradients on only to what has them going in.
            embeddings = self.model.get_input_embeddings()
            handles.append(embeddings.register_forward_hook(_require_gradient))
        try:
            with frozen(self.model, dropout=dropout):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def __call__(self, batches: Mapping[str, Batch]) -> Pass:
        tensors, labels, rows = put_together(batches, pad=self.pad, device=self.device)
        joint: dict[str, Any] = dict(tensors)
        seq2seq = bool(self.model.config.is_encoder_decoder)
        # Counted where the batches are, so that the step waits for the device once, at its end.
        targets = Targets.of(labels, seq2seq=seq2seq).to(self.device)
        tokens = joint["attention_mask"].sum(1)
        if seq2seq and "decoder_input_ids" not in joint:
            before = self.model.prepare_decoder_input_ids_from_labels(
                labels=labels.to(self.device, non_blocking=True)
            )
            joint["decoder_input_ids"] = before
        self._rows = rows
        self._shapes = {tuple(joint["input_ids"].shape), tuple(labels.shape)}
        if hasattr(self.model.config, "use_cache"):
            joint["use_cache"] = False
        with autocasting(self.device, self.autocast):
            losses = target_losses(self.model, joint, targets, whole=self._head_is_site)
        return Pass(_means(losses, targets, rows), rows.counts, rows.sums(tokens))

    def _hook(self, name: str, stack: Stack) -> Any:
        def add(
            layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
        ) -> Tensor:
            if isinstance(layer, nn.Embedding):  # whose input are ids
                x, call = output, Call(layer, args or tuple(kwargs.values()), {})
            else:
                x, call = (
                    args[0] if args else next(iter(kwargs.values())),
                    Call(layer, args, kwargs),
                )
            x = x.to(output.device)  # a device_map may part two layers
            self._check_shape(name, x)
            output = stack.add_rest(output, x, self._rows, call)
            return add_stack(output, x, stack, self._rows) if stack.rank else output

        return add

    def _check_shape(self, name: str, x: Tensor) -> None:
        """Refuse a layer that does not see all tokens row by row, like an expert of an MoE."""
        if tuple(x.shape[:-1]) in self._shapes:
            return
        if x.ndim == 2 and x.shape[0] in {rows * length for rows, length in self._shapes}:
            return
        if x.ndim == 4 and {(x.shape[0], x.shape[1]), (x.shape[0], x.shape[2])} & self._shapes:
            return  # a norm of each head
        raise ConfigError(
            f"{name}: sees {list(x.shape)}, not the rows of the batch one after the other, so "
            "experts cannot be told apart there. Train each adapter alone."
        )


def _require_gradient(_: nn.Module, __: Any, output: Tensor) -> None:
    output.requires_grad_(True)


def check_model(model: Any) -> None:
    """Raise ConfigError unless experts can be trained together on it."""
    config = getattr(model, "config", None)
    if not isinstance(model, nn.Module) or not hasattr(config, "is_encoder_decoder"):
        raise ConfigError(f"a plain transformers model is wanted, got {type(model).__name__}.")
    if any(hasattr(module, "base_layer") for module in model.modules()):
        raise ConfigError(
            f"{type(model).__name__}: has adapters already. Give the plain base: "
            "peft_model.unload() returns it."
        )
    if any(BANK in module._modules for module in model.modules()):
        raise ConfigError(f"{type(model).__name__}: is routed. Call phatgoose.unroute first.")
    if getattr(model, "loss_type", None) not in LOSSES:
        raise ConfigError(
            f"{type(model).__name__}: its loss is {model.loss_type}; experts are trained together "
            "on a loss over target tokens only. Train each adapter alone."
        )
    refuse_fsdp1(model)


def joint_stream(
    batches: Mapping[str, Iterable[Batch]], accelerator: Accelerator, seed: int
) -> Iterator[dict[str, Batch]]:
    """Yield one micro-batch of every expert at a time, in the order that each would have alone."""

    def stream(name: str) -> Iterator[Batch]:
        return own_share(batches[name], accelerator, f"{name}: ")

    streams = {name: OwnRandom(lambda name=name: stream(name), seed) for name in batches}  # type: ignore[misc]
    while True:
        yield {name: next(each) for name, each in streams.items()}


def _means(losses: Float[Tensor, " N"], targets: Targets, rows: Rows) -> Float[Tensor, " E"]:
    """Compute the nats per target token of each expert. One without targets has NaN."""
    owners = rows.owners[targets.rows].to(losses.device)
    sums = losses.new_zeros(2, len(rows.counts))
    total, count = sums.index_add(1, owners, torch.stack([losses, torch.ones_like(losses)]))
    means: Tensor = total / count
    return means
