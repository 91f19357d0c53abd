"""Ranks choices: a model takes the one it finds likeliest, by mean token log-likelihood."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from phatgoose.errors import ConfigError
from phatgoose.evaluation.batches import (
    Experts,
    Progress,
    Remembering,
    counting,
    encode_within,
    evaluating,
    forward,
    is_seq2seq,
    longest_input,
    pad_id,
    padded,
    positions,
    token_batches,
    using,
)
from phatgoose.models import cache_argument, cache_of
from phatgoose.tasks import IGNORED, Example

MAX_TOKENS = 16_384  # per batch, padding counted
LOGITS_AT_ONCE = 1 << 25  # logits turned into fp32 log-probabilities at a time: 128 MiB


@dataclass(frozen=True)
class _Group:
    """Answers to one prompt; `places` are the (example, choice) pairs they belong to."""

    prompt: list[int]
    targets: list[list[int]]
    places: list[tuple[int, int]]

    @property
    def longest(self) -> int:
        return len(self.prompt) + max(len(target) for target in self.targets)


def rank_choices(
    model: Any, tokenizer: Any, examples: Sequence[Example], **settings: Any
) -> list[str]:
    """Return the choice with the highest score of each example. Ties go to the first.

    Settings and errors are those of `score_choices`.
    """
    scores = score_choices(model, tokenizer, examples, **settings)
    return [
        example.choices[row.index(max(row))]  # type: ignore[index]
        for example, row in zip(examples, scores, strict=True)
    ]


def score_choices(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    max_tokens_per_batch: int = MAX_TOKENS,
    share_prompts: bool = False,
    experts: Experts | None = None,
    progress: Progress = False,
) -> list[list[float]]:
    """Score each choice: the mean of log p(token), end-of-sequence included.

    That is the published evaluation (arXiv:2402.05859, section 4, and its code). Every choice gets
    a forward of its own with the whole prompt, and so a routing of its own.

    Args:
        examples: with choices, all of them; prompts too long for the model lose their beginning.
        max_tokens_per_batch: rows times longest row, padding counted.
        share_prompts: read the prompt once for all its choices and keep it in a KV cache. In a
            decoder-only model no token sees what follows, so scores are the same up to rounding
            and several times faster. Without effect on an encoder-decoder.
        experts: the one that answers each example, for a routed model; None is the bare base.

    Raises ConfigError where an example has no choices or no prompt.
    """
    for example in examples:
        if not example.choices:
            raise ConfigError(
                f"rank classification wants choices, {example.prompt[:40]!r} has none."
            )
    seq2seq = is_seq2seq(model)
    share = share_prompts and not seq2seq
    groups = _groups(model, tokenizer, examples, share=share)
    score = _seq2seq_scores if seq2seq else _shared_scores if share else _causal_scores
    results = [[0.0] * len(example.choices or ()) for example in examples]
    left = list(map(len, results))
    with evaluating(model), counting(progress, len(examples), "rank") as answered:
        for batch in token_batches(
            [group.longest for group in groups],
            max_tokens_per_batch,
            rows=[len(group.targets) for group in groups],
        ):
            chosen = [groups[index] for index in batch]
            places = [place for group in chosen for place in group.places]
            names = experts and [experts[group.places[0][0]] for group in chosen]
            values = score(model, chosen, pad_id(tokenizer), names).tolist()
            for (row, column), value in zip(places, values, strict=True):
                results[row][column] = value
                left[row] -= 1
            answered(sum(left[row] == 0 for row in {row for row, _ in places}))
    return results


def _groups(model: Any, tokenizer: Any, examples: Sequence[Any], *, share: bool) -> list[_Group]:
    """Make one group per choice, or per distinct prompt of an example if those are shared.

    The choices of a prompt at the length limit may leave different parts of it.
    """
    tokenizer, longest = Remembering(tokenizer), longest_input(model, tokenizer)
    seq2seq = is_seq2seq(model)
    groups: dict[Any, _Group] = {}
    for index, example in enumerate(examples):
        for number, choice in enumerate(example.choices):
            encoded = encode_within(tokenizer, example, choice, max_length=longest, seq2seq=seq2seq)
            key = (index, len(encoded.prompt) if share else number)
            group = groups.setdefault(key, _Group(encoded.prompt, [], []))
            group.targets.append(encoded.target)
            group.places.append((index, number))
    return list(groups.values())


def _causal_scores(
    model: Any, groups: Sequence[_Group], pad: int, experts: Experts | None
) -> Float[Tensor, " N"]:
    """Run one forward over prompts and targets. Left padding puts all targets at the end."""
    rows = [(group.prompt, target) for group in groups for target in group.targets]
    ids, mask = padded([prompt + target[:-1] for prompt, target in rows], pad, "left")
    targets, _ = padded([target for _, target in rows], IGNORED, "left")
    kept = targets.shape[1]
    with using(model, _of_rows(groups, experts)):
        logits = forward(
            model,
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions(mask),
            logits_to_keep=kept,
            use_cache=False,
        ).logits
    return _mean_log_likelihood(logits[:, -kept:], targets)


def _shared_scores(
    model: Any, groups: Sequence[_Group], pad: int, experts: Experts | None
) -> Float[Tensor, " N"]:
    """Run a forward over the prompts but their last tokens, then one over those and the targets."""
    rows = [(group.prompt[-1], target) for group in groups for target in group.targets]
    tails, mask = padded([[last, *target[:-1]] for last, target in rows], pad, "right")
    targets, _ = padded([target for _, target in rows], IGNORED, "right")
    past: dict[str, Any] = {"use_cache": False}
    ids, width = tails, tails.shape[1]
    if any(len(group.prompt) > 1 for group in groups):
        heads, head_mask = padded([group.prompt[:-1] for group in groups], pad, "left")
        with using(model, experts):
            output = forward(
                model,
                input_ids=heads,
                attention_mask=head_mask,
                position_ids=positions(head_mask),
                logits_to_keep=1,
                use_cache=True,
            )
        cache = cache_of(model, output)
        owners = [index for index, group in enumerate(groups) for _ in group.targets]
        cache.batch_select_indices(torch.tensor(owners, device=model.device))
        ids = torch.cat([heads[owners], tails], dim=1)
        mask = torch.cat([head_mask[owners], mask], dim=1)
        past = {cache_argument(model.forward): cache, "use_cache": True}
        _announce(model, ids, mask, cache=cache)
    with using(model, _of_rows(groups, experts)):
        logits = forward(
            model,
            input_ids=tails,
            attention_mask=mask,
            position_ids=positions(mask)[:, -width:],
            **past,
        ).logits
    return _mean_log_likelihood(logits, targets)


def _announce(model: Any, ids: Tensor, mask: Tensor, *, cache: Any) -> None:
    """Say, as `generate` does, which ids the next forward ends: routers may look at them.

    The cache's rows were repeated, so a routed model could not know.
    """
    prepare, past, width = model.prepare_inputs_for_generation, cache.get_seq_length(), ids.shape[1]
    more: dict[str, Any] = {cache_argument(prepare): cache}
    if "cache_position" in inspect.signature(prepare).parameters:  # transformers 4
        more["cache_position"] = torch.arange(past, width, device=model.device)
    prepare(ids.to(model.device), attention_mask=mask.to(model.device), **more)


def _seq2seq_scores(
    model: Any, groups: Sequence[_Group], pad: int, experts: Experts | None
) -> Float[Tensor, " N"]:
    """Run one forward with prompts in the encoder and targets in the decoder."""
    rows = [(group.prompt, target) for group in groups for target in group.targets]
    ids, mask = padded([prompt for prompt, _ in rows], pad, "right")
    targets, target_mask = padded([target for _, target in rows], IGNORED, "right")
    with using(model, _of_rows(groups, experts)):
        logits = forward(
            model,
            input_ids=ids,
            attention_mask=mask,
            decoder_input_ids=model.prepare_decoder_input_ids_from_labels(targets),
            decoder_attention_mask=target_mask,
            use_cache=False,
        ).logits
    return _mean_log_likelihood(logits, targets)


def _of_rows(groups: Sequence[_Group], experts: Experts | None) -> Experts | None:
    """Repeat each group's expert for each of its targets."""
    if experts is None:
        return None
    return [name for name, g in zip(experts, groups, strict=True) for _ in g.targets]


def _mean_log_likelihood(
    logits: Float[Tensor, "B L V"], targets: Int[Tensor, "B L"]
) -> Float[Tensor, " B"]:
    """Average log p(target) of each row over the targets that are not IGNORED, in fp32.

    It takes a few rows at a time, because log-probabilities of a whole batch would be the largest
    thing in memory.
    """
    targets = targets.to(logits.device)
    rows = max(1, LOGITS_AT_ONCE // max(1, logits[0].numel()))
    parts = []
    for some, wanted in zip(logits.split(rows), targets.split(rows), strict=True):
        some = some.float()
        real = wanted != IGNORED
        picked = some.gather(-1, wanted.clamp_min(0).unsqueeze(-1)).squeeze(-1)
        values = (picked - some.logsumexp(-1)).masked_fill(~real, 0.0)
        parts.append(values.sum(-1) / real.sum(-1))
    return torch.cat(parts)
