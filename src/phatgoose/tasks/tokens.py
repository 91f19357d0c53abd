"""Examples as token ids, and batches of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import DataLoader

from phatgoose.tasks.chat import Conversation
from phatgoose.tasks.example import Example

IGNORED = -100  # the label of a token that has no loss


@dataclass(frozen=True)
class Encoded:
    """An example as token ids; for an encoder-decoder the two parts go to the two stacks."""

    prompt: list[int]
    target: list[int]  # with end-of-sequence


def encode(
    tokenizer: Any, prompt: str, target: str, *, max_length: int, seq2seq: bool = False
) -> Encoded:
    """Token ids of a prompt and its target; what is too long loses the prompt's beginning.

    The two parts are tokenised apart, so that the same target has the same ids after any prompt.
    For a decoder-only model `max_length` bounds both together, otherwise each.
    """
    target_ids = tokenizer(target, add_special_tokens=False)["input_ids"]
    ends = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    prompt_ids = tokenizer(prompt)["input_ids"] if prompt or seq2seq else []
    encoded = Encoded(prompt_ids, [*target_ids, *ends])
    return within(encoded, max_length, seq2seq=seq2seq)


def encode_example(
    tokenizer: Any,
    example: Example,
    answer: str | None = None,
    *,
    max_length: int,
    seq2seq: bool = False,
) -> Encoded:
    """`encode`, of an example and one answer to it; by default that is its target.

    A conversation's texts are what the tokenizer's chat template makes of it. The template writes
    all special tokens, so none is added.

    Raises ConfigError where there is no template, or it refuses the conversation.
    """
    if not isinstance(example, Conversation):
        target = example.target if answer is None else answer
        return encode(tokenizer, example.prompt, target, max_length=max_length, seq2seq=seq2seq)
    texts = example.texts(tokenizer, answer)
    prompt_ids, target_ids = (
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts
    )
    return within(Encoded(prompt_ids, target_ids), max_length, seq2seq=seq2seq)


def encode_prompt(
    tokenizer: Any, example: Example, *, max_length: int, seq2seq: bool = False
) -> list[int]:
    """The ids of a prompt to be answered, with room for one token within `max_length`."""
    if not isinstance(example, Conversation):
        return encode(tokenizer, example.prompt, "", max_length=max_length, seq2seq=seq2seq).prompt
    ids: list[int] = tokenizer(example.asked(tokenizer), add_special_tokens=False)["input_ids"]
    room = max_length if seq2seq else max_length - 1
    return ids[max(0, len(ids) - room) :]


def within(encoded: Encoded, max_length: int, *, seq2seq: bool) -> Encoded:
    """An example cut to a length, as `encode` cuts it."""
    target = encoded.target[:max_length]
    room = max_length if seq2seq else max_length - len(target)
    return Encoded(encoded.prompt[max(0, len(encoded.prompt) - room) :], target)


def collate(
    encoded: Sequence[Encoded], *, pad: int, seq2seq: bool = False
) -> dict[str, Int[Tensor, "B L"]]:
    """A training batch padded on the right, with a loss on the targets only."""
    if seq2seq:
        inputs = [row.prompt for row in encoded]
        labels = [row.target for row in encoded]
    else:
        inputs = [row.prompt + row.target for row in encoded]
        labels = [[IGNORED] * len(row.prompt) + row.target for row in encoded]
    return {
        "input_ids": _padded(inputs, pad),
        "attention_mask": _padded([[1] * len(row) for row in inputs], 0),
        "labels": _padded(labels, IGNORED),
    }


def batches(
    encoded: Sequence[Encoded], batch_size: int, *, pad: int, seq2seq: bool = False, seed: int = 0
) -> "DataLoader[dict[str, Tensor]]":
    """Shuffled training batches, in an order that depends on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(
        list(encoded),  # type: ignore[arg-type]
        batch_size=min(batch_size, len(encoded)),
        shuffle=True,
        drop_last=True,
        generator=generator,
        collate_fn=lambda rows: collate(rows, pad=pad, seq2seq=seq2seq),
    )


def _padded(rows: list[list[int]], fill: int) -> Tensor:
    length = max(len(row) for row in rows)
    return torch.tensor([row + [fill] * (length - len(row)) for row in rows], dtype=torch.long)
