"""Greedy answers in batches."""

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from phatgoose.errors import ConfigError
from phatgoose.evaluation.batches import (
    Experts,
    Progress,
    counting,
    evaluating,
    is_seq2seq,
    longest_input,
    pad_id,
    padded,
    prompt_within,
    using,
)
from phatgoose.tasks import Example

BATCH_SIZE = 64
MAX_NEW_TOKENS = 64


def generate_answers(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    max_new_tokens: int | Sequence[int] = MAX_NEW_TOKENS,
    batch_size: int = BATCH_SIZE,
    experts: Experts | None = None,
    progress: Progress = False,
) -> list[str]:
    """The greedy answer to each example, stripped; a batch holds prompts of similar lengths.

    `max_new_tokens` is one bound for all, or one for each example. Prompts too long for the model
    lose their beginning. `experts` has a routed model answer each example by one of them, or by the
    bare base where it is None. Raises ConfigError where a bound or `batch_size` is out of range.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, got {batch_size}.")
    if isinstance(max_new_tokens, int):
        max_new_tokens = [max_new_tokens] * len(examples)
    bounds = list(max_new_tokens)
    prompts = [
        _prompt_ids(model, tokenizer, example, bound)
        for example, bound in zip(examples, bounds, strict=True)
    ]
    # A batch goes on until its largest bound, so examples of one bound belong together.
    order = sorted(range(len(examples)), key=lambda i: (-bounds[i], -len(prompts[i])))
    answers = [""] * len(examples)
    with counting(progress, len(order), "generate") as answered:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            rows = [prompts[index] for index in batch]
            names = None if experts is None else [experts[index] for index in batch]
            with using(model, names):
                new = _continue(model, tokenizer, rows, max_new_tokens=bounds[batch[0]])
            for index, ids in zip(batch, new, strict=True):
                text = tokenizer.decode(ids[: bounds[index]], skip_special_tokens=True)
                answers[index] = text.strip()
            answered(len(batch))
    return answers


def generate_text(
    model: Any, tokenizer: Any, prompts: Sequence[str | Example], *, max_new_tokens: int
) -> list[str]:
    """The greedy continuation of each prompt, stripped, all in one batch and in this order.

    So while `phatgoose.record` is on, row n of the trace is prompt n.
    """
    if not prompts:
        return []
    rows = [_prompt_ids(model, tokenizer, prompt, max_new_tokens) for prompt in prompts]
    new = _continue(model, tokenizer, rows, max_new_tokens=max_new_tokens)
    return [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in new]


def _prompt_ids(
    model: Any, tokenizer: Any, prompt: str | Example, max_new_tokens: int
) -> list[int]:
    """A prompt's ids, as training encodes them, cut to leave room for the answer."""
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens must be at least 1, got {max_new_tokens}.")
    seq2seq, room = is_seq2seq(model), longest_input(model, tokenizer)
    if not seq2seq:
        room -= max_new_tokens - 1  # the empty target is one token: end-of-sequence
    if room < 2:
        raise ConfigError(
            f"max_new_tokens is {max_new_tokens}, which leaves no room for a prompt: the model "
            f"reads {longest_input(model, tokenizer)} tokens. Lower it."
        )
    example = Example(prompt, "") if isinstance(prompt, str) else prompt
    return prompt_within(tokenizer, example, max_length=room, seq2seq=seq2seq)


def _continue(
    model: Any, tokenizer: Any, rows: Sequence[list[int]], *, max_new_tokens: int
) -> list[list[int]]:
    """The new ids of each row, up to end-of-sequence."""
    seq2seq = is_seq2seq(model)
    ids, mask = padded(rows, pad_id(tokenizer), "right" if seq2seq else "left")
    ends = _ends(model, tokenizer)
    with evaluating(model):
        output = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            eos_token_id=ends,
            pad_token_id=pad_id(tokenizer),
        )
    new: list[list[int]] = output[:, 1 if seq2seq else ids.shape[1] :].tolist()
    return [list(takewhile(lambda token: token not in ends, row)) for row in new]


def _ends(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end an answer: the tokenizer's, and those the model's own settings name."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    more = own if isinstance(own, list) else [own]
    found = dict.fromkeys([tokenizer.eos_token_id, *more])
    return [token for token in found if token is not None]
