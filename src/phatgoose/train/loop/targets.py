"""Computes the loss of next tokens, with logits only where there is a label.

A head over a large vocabulary is most of a small model's memory: [rows, length, vocabulary] in
fp32, though labels stand on the answers alone. So the head is given those tokens and no others.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from phatgoose.errors import TrainingError
from phatgoose.tasks import IGNORED

# Losses of transformers that are a mean over target tokens of the next token's.
LOSSES = (None, "ForCausalLM", "ForConditionalGeneration")
# What a batch may hold for it; with anything else a model may shift or weigh its labels.
KNOWN = {
    "input_ids",
    "attention_mask",
    "labels",
    "position_ids",
    "token_type_ids",
    "decoder_input_ids",
    "decoder_attention_mask",
}


@dataclass(frozen=True)
class Targets:
    """The N tokens that a batch's labels want, in the order in which they lie in [B, L]."""

    shape: tuple[int, int]
    places: Int[Tensor, " N"]  # of the tokens that predict them, in the flat [B L]
    tokens: Int[Tensor, " N"]

    @classmethod
    def of(cls, labels: Int[Tensor, "B L"], *, seq2seq: bool) -> "Targets":
        """Where the labels are, on their device; a decoder-only model's are the next tokens."""
        if not seq2seq:
            labels = F.pad(labels, (0, 1), value=IGNORED)[:, 1:]
        flat = labels.flatten()
        places = (flat != IGNORED).nonzero().squeeze(1)
        return cls((labels.shape[0], labels.shape[1]), places, flat[places])

    def to(self, device: torch.device) -> "Targets":
        places, tokens = (t.to(device, non_blocking=True) for t in (self.places, self.tokens))
        return Targets(self.shape, places, tokens)

    @property
    def rows(self) -> Int[Tensor, " N"]:
        """The row of each."""
        return self.places // self.shape[1]

    def select(self, x: Float[Tensor, "B L F"]) -> Float[Tensor, "N F"]:
        return x.flatten(0, 1).index_select(0, self.places.to(x.device))


def target_losses(
    model: Any, inputs: Mapping[str, Any], targets: Targets, *, whole: bool = False
) -> Float[Tensor, " N"]:
    """Compute the nats of each target: -log p(token), as the model's own loss before the mean.

    `inputs` has no labels. `whole` runs the head on all tokens, where something else has to see
    them there. Raises TrainingError where the model gives logits of other tokens.
    """
    with nothing_else(None if whole else output_head(model), targets):
        logits = model(**inputs).logits
    if logits.shape[:2] == targets.shape:
        logits = targets.select(logits)
    elif logits.shape[:2] == (1, len(targets.places)):
        logits = logits[0]
    else:
        raise TrainingError(
            f"the model gave logits {list(logits.shape)} for labels {list(targets.shape)}. Train "
            "each adapter alone, with a loss of your own."
        )
    tokens = targets.tokens.to(logits.device, non_blocking=True)
    return F.cross_entropy(logits.float(), tokens, reduction="none")


def batch_losses(model: Any, batch: Mapping[str, Any]) -> Float[Tensor, " N"] | None:
    """Return the losses that `model(**batch).loss` is the mean of, or None if it may be another."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config: Any = getattr(base, "config", None)
    labels = batch.get("labels")
    if (
        not isinstance(labels, Tensor)
        or labels.ndim != 2
        or not set(batch) <= KNOWN
        or not hasattr(config, "is_encoder_decoder")
        or getattr(base, "loss_type", None) not in LOSSES
        or getattr(config, "output_router_logits", False)  # its experts' balance counts too
    ):
        return None
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    seq2seq = config.is_encoder_decoder
    if seq2seq and "decoder_input_ids" not in inputs:
        inputs["decoder_input_ids"] = base.prepare_decoder_input_ids_from_labels(labels=labels)
    return target_losses(model, inputs, Targets.of(labels, seq2seq=seq2seq))


def output_head(model: Any) -> nn.Module | None:
    """Return the layer that makes logits, if the model names one."""
    find = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    return head if isinstance(head, nn.Module) else None


@contextmanager
def nothing_else(head: nn.Module | None, targets: Targets) -> Iterator[None]:
    """Give the head the hidden states of targets alone, as one row of N tokens."""

    def select(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if len(inputs) != 1 or inputs[0].ndim != 3 or inputs[0].shape[:2] != targets.shape:
            return None
        return (targets.select(inputs[0])[None],)

    if head is None:
        yield
        return
    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()
