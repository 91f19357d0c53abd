"""Has a routed model read prompts and their reference answers while its routing is recorded."""

from collections.abc import Iterator, Sequence
from typing import Any

from phatgoose.evaluation.batches import (
    encode_within,
    forward,
    is_seq2seq,
    longest_input,
    pad_id,
    padded,
    token_batches,
)
from phatgoose.nn import Trace
from phatgoose.pool import record
from phatgoose.tasks import IGNORED, Encoded, Example


def encode_references(model: Any, tokenizer: Any, examples: Sequence[Example]) -> list[Encoded]:
    """Turn prompts and reference answers into ids. Raises what `encode_within` raises."""
    seq2seq, longest = is_seq2seq(model), longest_input(model, tokenizer)
    return [encode_within(tokenizer, e, max_length=longest, seq2seq=seq2seq) for e in examples]


def reference_batches(rows: Sequence[Encoded], max_tokens: int) -> Iterator[list[Encoded]]:
    """Put the rows into `token_batches`."""
    lengths = [len(row.prompt) + len(row.target) for row in rows]
    for batch in token_batches(lengths, max_tokens):
        yield [rows[index] for index in batch]


def trace_references(model: Any, tokenizer: Any, rows: Sequence[Encoded]) -> Trace:
    """Record the routing of one forward over these rows."""
    with record(model) as trace:
        forward(model, **teacher_forced(model, rows, pad_id(tokenizer)))
    return trace


def teacher_forced(model: Any, rows: Sequence[Encoded], pad: int) -> dict[str, Any]:
    """Make what `forward` needs for a model to read these prompts and their reference answers.

    A decoder-only model reads both, up to the answer's last token, because nobody asks what comes
    after that. In an encoder-decoder the decoder reads a start token and the answer.
    """
    if not is_seq2seq(model):
        ids, mask = padded([row.prompt + row.target[:-1] for row in rows], pad, "right")
        return {"input_ids": ids, "attention_mask": mask, "logits_to_keep": 1, "use_cache": False}
    ids, mask = padded([row.prompt for row in rows], pad, "right")
    targets, target_mask = padded([row.target for row in rows], IGNORED, "right")
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "decoder_input_ids": model.prepare_decoder_input_ids_from_labels(targets),
        "decoder_attention_mask": target_mask,
        "use_cache": False,
    }
