"""Measures vectors for routers that need no gates, on some of an expert's own data."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from phatgoose.errors import ConfigError
from phatgoose.experts import Expert, adapter_hash, identify_base
from phatgoose.experts.kinds import KINDS
from phatgoose.experts.signatures import Signatures
from phatgoose.nn import ContextKeeper
from phatgoose.pool import ExpertPool, assign, route, unroute
from phatgoose.routers.base import Measuring, Vectors, measuring_routers
from phatgoose.routers.inputs import watching
from phatgoose.tasks import IGNORED, Encoded, collate
from phatgoose.train.settings import SignatureMeasuring

Row = TypeVar("Row")


def derive_signatures(
    model: Any,
    tokenizer: Any,
    experts: Sequence[Expert],
    data: Mapping[str, Sequence[Encoded]],
    *,
    kinds: Sequence[str] | None = None,
    examples: int = SignatureMeasuring.examples,
    batch_size: int = SignatureMeasuring.batch_size,
    seed: int = SignatureMeasuring.seed,
    progress: bool = True,
) -> dict[str, dict[str, Signatures]]:
    """Make signatures of experts, by expert and kind. `Signatures.save(folder)` keeps one.

    - "average_activation": for each adapted module, the mean over examples of the mean over an
      example's tokens of the module's input, with the expert applied (arXiv:2402.05859, section 4);
    - "prompt_mean": the mean over all tokens of the prompts of what the base's first linear module
      reads, each token at position 0; takes no forward;
    - "arrow": for each adapted module, the adapter's top right singular vector; takes no data.

    Args:
        model: the bare base, not routed; it comes back so.
        data: examples by expert's name (`tasks.encode`), of which `examples` are drawn.
        kinds: which kinds to make; default: all of these.

    Raises ConfigError for an unknown kind, or if an expert lacks data that its kinds need.
    """
    routers = measuring_routers()
    kinds = tuple(routers) if kinds is None else kinds
    unknown = sorted(set(kinds) - set(routers))
    if unknown:
        raise ConfigError(f"kinds: {unknown[0]!r} is unknown. Choose from: {', '.join(routers)}.")
    drawn = {expert.name: draw(data.get(expert.name, ()), examples, seed) for expert in experts}
    if any(KINDS[kind].needs_data for kind in kinds):
        for expert in experts:
            if not drawn[expert.name]:
                raise ConfigError(f"{expert.name}: no examples were given to measure it on.")
    base = identify_base(model, tokenizer)
    given = Given(model, experts, drawn, batch_size, tokenizer.pad_token_id, progress)
    prompts = {
        name: [token for row in rows for token in row.prompt] for name, rows in drawn.items()
    }
    measuring = Measuring(model, experts, prompts, lambda: _mean_inputs(given))
    made: dict[str, dict[str, Signatures]] = {expert.name: {} for expert in experts}
    for kind in (kind for kind in routers if kind in kinds):
        for expert, vectors in zip(experts, routers[kind].measure(measuring), strict=True):
            rows = drawn[expert.name] if KINDS[kind].needs_data else ()
            made[expert.name][kind] = Signatures(
                kind,
                vectors,
                base,
                adapter_hash(expert.modules),
                examples=len(rows),
                tokens=sum(len(row.prompt) + len(row.target) for row in rows),
                training={"seed": seed} if KINDS[kind].needs_data else {},
            )
    return made


def draw(rows: Sequence[Row], count: int, seed: int) -> list[Row]:
    """`count` rows at random, in their order."""
    chosen = random.Random(seed).sample(range(len(rows)), min(count, len(rows)))
    return [rows[index] for index in sorted(chosen)]


@dataclass(frozen=True)
class Given:
    """The examples, and how to read them."""

    model: Any
    experts: Sequence[Expert]
    drawn: Mapping[str, list[Encoded]]  # by the expert's name
    batch_size: int
    pad: int
    progress: bool


def _mean_inputs(given: Given) -> list[Vectors]:
    """What each expert's modules read with the expert applied, as `Measuring` has it."""
    found = []
    route(given.model, ExpertPool(given.experts), "uniform")
    try:
        for expert in tqdm(given.experts, desc="average activation", disable=not given.progress):
            with assign(given.model, [expert.name]):
                found.append(_mean_inputs_of(given, expert))
    finally:
        unroute(given.model)
    return found


def _mean_inputs_of(given: Given, expert: Expert) -> dict[str, Tensor]:
    """The mean over rows of each adapted module's mean input."""
    model, rows, size = given.model, given.drawn[expert.name], given.batch_size
    seq2seq = model.config.is_encoder_decoder
    rows = sorted(rows, key=lambda row: len(row.prompt) + len(row.target))  # spares padding
    sums: dict[str, Tensor] = {}
    keeper = ContextKeeper(model)

    def add(name: str, x: Tensor) -> None:
        _, context = keeper.find(name, x)
        if context is None:
            raise ConfigError(f"{name}: its tokens cannot be matched with the model's input.")
        real = context.new_real().unsqueeze(-1).to(x.device)
        x = x.reshape(*real.shape[:2], -1).double() * real
        mean = x.sum(1) / real.sum(1).clamp_min(1)
        sums[name] = sums.get(name, 0) + mean.sum(0)

    try:
        with watching(model, list(expert.modules), add), torch.no_grad():
            for start in range(0, len(rows), size):
                batch = collate(rows[start : start + size], pad=given.pad, seq2seq=seq2seq)
                if seq2seq:  # the labels' padding is not the model's to see otherwise
                    batch["decoder_attention_mask"] = batch["labels"] != IGNORED
                batch = {name: value.to(model.device) for name, value in batch.items()}
                model(**batch, **({} if seq2seq else {"use_cache": False}))
    finally:
        keeper.close()
    return {name: (total / len(rows)).float().cpu() for name, total in sums.items()}
