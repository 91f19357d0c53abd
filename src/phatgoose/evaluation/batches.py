"""Makes batches for evaluation, of similar lengths and padded on the side that suits."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from phatgoose.errors import ConfigError
from phatgoose.pool.routing import Asked, assign
from phatgoose.tasks import Encoded, Example, encode_example, encode_prompt

# Bars on stderr or none, or a function that is told how many examples more are answered.
Progress = bool | Callable[[int], object]
# What answers each example: an expert, a mixture, or None for the bare base; see `assign`.
Experts = Sequence[Asked]
UNLIMITED = 1 << 20  # tokenizers without a limit name an enormous one


def token_batches(
    lengths: Sequence[int], max_tokens: int, *, rows: Sequence[int] | None = None
) -> list[list[int]]:
    """Put indices into batches of at most `max_tokens`, padding included. The longest come first.

    Item i takes rows[i] rows (default: one) of lengths[i] tokens. One that is too big goes alone.
    """
    if max_tokens < 1:
        raise ConfigError(f"max_tokens_per_batch must be at least 1, got {max_tokens}.")
    rows = [1] * len(lengths) if rows is None else rows
    batches: list[list[int]] = []
    taken = longest = 0
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not batches or (taken + rows[item]) * longest > max_tokens:
            batches.append([])
            taken, longest = 0, lengths[item]
        batches[-1].append(item)
        taken += rows[item]
    return batches


def padded(
    rows: Sequence[Sequence[int]], fill: int, side: Literal["left", "right"]
) -> tuple[Int[Tensor, "B L"], Int[Tensor, "B L"]]:
    """Make one tensor of token ids, and a mask that is 1 where they are not padding."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), fill, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(len(row))
        ids[index, place] = torch.tensor(row, dtype=torch.long)
        mask[index, place] = 1
    return ids, mask


def positions(mask: Int[Tensor, "B L"]) -> Int[Tensor, "B L"]:
    """Each token's place among the real tokens of its row, from 0."""
    return (mask.cumsum(-1) - 1).clamp_min(0)


def forward(model: Any, **inputs: Any) -> Any:
    """Run the model on its device, without the optional arguments that its class does not know."""
    known = inspect.signature(model.forward).parameters
    for name in ("position_ids", "logits_to_keep"):
        if name not in known:
            inputs.pop(name, None)
    device = model.device
    moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
    return model(**moved, return_dict=True)


def using(model: Any, experts: Experts | None) -> AbstractContextManager[None]:
    """Have row i of the forwards inside follow `experts[i]`. None leaves the model as it is."""
    return nullcontext() if experts is None else assign(model, experts)


def is_seq2seq(model: Any) -> bool:
    return bool(model.config.is_encoder_decoder)


def pad_id(tokenizer: Any) -> int:
    """The id that fills rows up. It is masked, so any will do if a tokenizer has no padding."""
    return next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)


def longest_input(model: Any, tokenizer: Any) -> int:
    """Say how many tokens a model reads, by its configuration and its tokenizer."""
    limit = getattr(model.config, "max_position_embeddings", None)
    return int(min(UNLIMITED, limit or UNLIMITED, tokenizer.model_max_length))


def encode_within(
    tokenizer: Any,
    example: Example,
    answer: str | None = None,
    *,
    max_length: int,
    seq2seq: bool,
) -> Encoded:
    """`tasks.encode_example`; ConfigError too where nothing of the prompt is there to answer."""
    encoded = encode_example(tokenizer, example, answer, max_length=max_length, seq2seq=seq2seq)
    if not encoded.prompt:
        target = example.target if answer is None else answer
        raise ConfigError(f"{_missing(example, max_length)} -> {target[:40]!r}.")
    return encoded


def prompt_within(tokenizer: Any, example: Example, *, max_length: int, seq2seq: bool) -> list[int]:
    """`tasks.encode_prompt`; ConfigError too where nothing of the prompt is there to answer."""
    ids = encode_prompt(tokenizer, example, max_length=max_length, seq2seq=seq2seq)
    if not ids:
        raise ConfigError(f"{_missing(example, max_length)} -> ''.")
    return ids


def _missing(example: Example, max_length: int) -> str:
    reason = f"fits before an answer within {max_length} tokens" if example.prompt else "is there"
    return f"nothing of the prompt {reason}: {example.prompt[:40]!r}"


class Remembering:
    """A tokenizer that keeps the ids of every text it has seen, as choices share their prompt."""

    def __init__(self, tokenizer: Any) -> None:
        self.eos_token_id = tokenizer.eos_token_id
        self.chat_template = getattr(tokenizer, "chat_template", None)
        self.name_or_path = getattr(tokenizer, "name_or_path", "")
        self._tokenizer = tokenizer
        self._known: dict[tuple[str, bool], Any] = {}

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> Any:
        key = (text, add_special_tokens)
        if key not in self._known:
            self._known[key] = self._tokenizer(text, add_special_tokens=add_special_tokens)
        return self._known[key]

    def apply_chat_template(self, *arguments: Any, **settings: Any) -> Any:
        return self._tokenizer.apply_chat_template(*arguments, **settings)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch gradients and dropout off, and put the modules' modes back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def counting(progress: Progress, total: int, what: str) -> Iterator[Callable[[int], object]]:
    """Yield a function to call with the number of examples just answered."""
    if callable(progress):
        yield progress
        return
    with tqdm(total=total, desc=what, unit="example", disable=not progress, leave=None) as bar:
        yield bar.update
