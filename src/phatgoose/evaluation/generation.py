"""Writes greedy answers, in batches."""

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

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
from phatgoose.models import cache_argument
from phatgoose.tasks import Example

BATCH_SIZE = 64
MAX_NEW_TOKENS = 64
FIRST = 4  # new tokens before the rows that have ended leave a batch; then twice as many
# Settings that depend on where a generation begins or ends, so that it has to be in one go.
BY_PLACE = (
    "begin_suppress_tokens",
    "exponential_decay_length_penalty",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "min_new_tokens",
    "watermarking_config",
)


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
    """Answer each example greedily, stripped. A batch holds prompts of similar lengths.

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
            new = _answers(model, tokenizer, rows, [bounds[index] for index in batch], names)
            for index, ids in zip(batch, new, strict=True):
                text = tokenizer.decode(ids, skip_special_tokens=True)
                answers[index] = text.strip()
            answered(len(batch))
    return answers


def generate_text(
    model: Any, tokenizer: Any, prompts: Sequence[str | Example], *, max_new_tokens: int
) -> list[str]:
    """Continue each prompt greedily, stripped, all in one batch and in this order.

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
    """Encode a prompt as training does, cut to leave room for the answer."""
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


def _answers(
    model: Any,
    tokenizer: Any,
    rows: Sequence[list[int]],
    bounds: Sequence[int],
    experts: Experts | None,
) -> list[list[int]]:
    """Return the new ids of each row, up to end-of-sequence or its bound.

    Most answers are short, so rows that have ended leave the batch after a few tokens, and the
    others go on from the KV cache.
    """
    with using(model, experts):
        if is_seq2seq(model):
            whole = _continue(model, tokenizer, rows, max_new_tokens=max(bounds))
            return [ids[:bound] for ids, bound in zip(whole, bounds, strict=True)]
    ends = _ends(model, tokenizer)
    ids, mask = padded(rows, pad_id(tokenizer), "left")
    ids, mask = ids.to(model.device), mask.to(model.device)
    found: list[list[int]] = [[] for _ in rows]
    left, cache, written = list(range(len(rows))), None, 0
    first = max(bounds) if _counts_tokens(model) else FIRST
    while left:
        count = max(written, first)
        if first == FIRST:
            count = min(count, min(bounds[row] for row in left) - written)
        with using(model, experts and [experts[row] for row in left]):
            output = _generate(model, tokenizer, ids, mask, count, cache)
        new = output.sequences[:, ids.shape[1] :]
        written += count
        going = []
        for place, (row, some) in enumerate(zip(left, new.tolist(), strict=True)):
            kept = [*takewhile(lambda token: token not in ends, some)]
            found[row] += kept
            if len(kept) == count and bounds[row] > written:
                going.append(place)
        if going:
            cache = _of_rows(output, going)
            ids, mask = output.sequences[going], torch.cat([mask, torch.ones_like(new)], 1)[going]
        left = [left[place] for place in going]
    return [ids[:bound] for ids, bound in zip(found, bounds, strict=True)]


def _counts_tokens(model: Any) -> bool:
    """Whether the model's own settings treat the first or last tokens of a generation otherwise."""
    own = getattr(model, "generation_config", None)
    return any(getattr(own, name, None) for name in BY_PLACE)


def _of_rows(output: Any, places: Sequence[int]) -> Any:
    """A generation's KV cache with some of its rows; None, to read all again, without one."""
    cache: Any = getattr(output, "past_key_values", None)
    layers = getattr(cache, "layers", None)
    if not layers or not all(hasattr(layer, "batch_select_indices") for layer in layers):
        return None
    if len(places) < len(output.sequences):
        cache.batch_select_indices(torch.tensor(places, device=output.sequences.device))
    return cache


def _continue(
    model: Any, tokenizer: Any, rows: Sequence[list[int]], *, max_new_tokens: int
) -> list[list[int]]:
    """The new ids of each row, up to end-of-sequence; all rows stay until the last has ended."""
    seq2seq, ends = is_seq2seq(model), _ends(model, tokenizer)
    ids, mask = padded(rows, pad_id(tokenizer), "right" if seq2seq else "left")
    ids, mask = ids.to(model.device), mask.to(model.device)
    output = _generate(model, tokenizer, ids, mask, max_new_tokens, None).sequences
    new: list[list[int]] = output[:, 1 if seq2seq else ids.shape[1] :].tolist()
    return [list(takewhile(lambda token: token not in ends, row)) for row in new]


def _generate(model: Any, tokenizer: Any, ids: Tensor, mask: Tensor, count: int, cache: Any) -> Any:
    """Greedy generation of at most `count` tokens after these, the cache holding all but one."""
    more = {} if cache is None else {cache_argument(model.forward): cache}
    with evaluating(model):
        return model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=count,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            eos_token_id=_ends(model, tokenizer),
            pad_token_id=pad_id(tokenizer),
            return_dict_in_generate=True,
            **more,
        )


def _ends(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end an answer: the tokenizer's, and those the model's own settings name."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    more = own if isinstance(own, list) else [own]
    found = dict.fromkeys([tokenizer.eos_token_id, *more])
    return [token for token in found if token is not None]
