"""Tells whether tokens find the expert of their task."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from phatgoose.evaluation.batches import evaluating, is_seq2seq
from phatgoose.evaluation.reference import encode_references, reference_batches, trace_references
from phatgoose.evaluation.scoring import MAX_TOKENS
from phatgoose.nn import Stream, Trace
from phatgoose.tasks import Encoded, Example


@dataclass(frozen=True)
class OwnShare:
    """The share of the routing weight that one expert gets: a mean over tokens and sites."""

    prompt: float  # over all prompt tokens
    last: float  # over each prompt's last token, which chooses the answer's first
    answer: float  # over the target's tokens, end-of-sequence left out; 0 where there are none


def own_share(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    expert: str,
    *,
    max_tokens_per_batch: int = MAX_TOKENS,
) -> OwnShare:
    """Measure how much weight `expert` gets on prompts and on reference answers.

    In an encoder-decoder the encoder reads the prompt's tokens and the decoder the answer's.
    """
    rows = encode_references(model, tokenizer, examples)
    sums: dict[str, list[float]] = {name: [0.0, 0.0] for name in ("prompt", "last", "answer")}
    for batch in reference_batches(rows, max_tokens_per_batch):
        with evaluating(model):
            trace = trace_references(model, tokenizer, batch)
        for name, share in _shares(trace, batch, expert, seq2seq=is_seq2seq(model)):
            sums[name][0] += float(share.sum())
            sums[name][1] += share.numel()
    return OwnShare(**{name: total / max(count, 1) for name, (total, count) in sums.items()})


def _shares(
    trace: Trace, rows: Sequence[Encoded], expert: str, *, seq2seq: bool
) -> list[tuple[str, Float[Tensor, " N"]]]:
    """The expert's share at each token, by what the token is part of."""
    prompts = torch.tensor([len(row.prompt) for row in rows])
    stream: Stream = "encoder" if seq2seq else "decoder"
    shares, lengths, position = _stream(trace, expert, stream, prompts)
    parts = [
        ("prompt", shares[position < lengths]),
        ("last", shares[position == lengths - 1]),
    ]
    answer: Bool[Tensor, " N"] = position >= lengths
    if seq2seq:
        shares, _, position = _stream(trace, expert, "decoder", prompts)
        answer = position > 0  # the first is the start token
    return [*parts, ("answer", shares[answer])]


def _stream(
    trace: Trace, expert: str, stream: Stream, prompts: Int[Tensor, " B"]
) -> tuple[Float[Tensor, " N"], Int[Tensor, " N"], Int[Tensor, " N"]]:
    """For a stream's tokens: the expert's share, their prompt's length, their position."""
    sites = [name for name in trace.experts if trace.streams[name] == stream]
    if not sites:
        nothing = torch.zeros(0, dtype=torch.long)
        return nothing.float(), nothing, nothing
    tokens, index = trace.tokens[stream], trace.names.index(expert)
    total = torch.zeros(len(tokens.sequence))
    for name in sites:
        weights = trace.weights[name]
        own = (weights * (trace.experts[name] == index)).sum(-1)
        total += own / weights.sum(-1).clamp_min(1e-9)
    return total / len(sites), prompts[tokens.sequence], tokens.position
