"""Vectors for routers that need no gates, measured on some of an expert's own data."""

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from phatgoose.errors import ConfigError
from phatgoose.experts import Expert, adapter_hash, identify_base
from phatgoose.experts.signatures import KINDS, Signatures
from phatgoose.nn import ContextKeeper
from phatgoose.pool import ExpertPool, assign, route, unroute
from phatgoose.routers.inputs import first_readers, token_inputs, watching
from phatgoose.routers.spectral import right_singular
from phatgoose.tasks import IGNORED, Encoded, collate

Row = TypeVar("Row")


def derive_signatures(
    model: Any,
    tokenizer: Any,
    experts: Sequence[Expert],
    data: Mapping[str, Sequence[Encoded]],
    *,
    kinds: Sequence[str] = tuple(KINDS),
    examples: int = 256,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, dict[str, Signatures]]:
    """Signatures of experts, by expert and kind; `Signatures.save(folder)` keeps one.

    - "average_activation": for each adapted module, the mean over examples of the mean over an
      example's tokens of the module's input, with the expert applied (arXiv:2402.05859, section 4);
    - "prompt_mean": the mean over all tokens of the prompts of what the base's first linear module
      reads, each token at position 0; takes no forward;
    - "arrow": for each adapted module, the adapter's top right singular vector; takes no data.

    Args:
        model: the bare base, not routed; it comes back so.
        data: examples by expert's name (`tasks.encode`), of which `examples` are drawn.

    Raises ConfigError for an unknown kind, or where an expert has no data that its kinds need.
    """
    unknown = sorted(set(kinds) - set(KINDS))
    if unknown:
        raise ConfigError(f"kinds: {unknown[0]!r} is unknown. Choose from: {', '.join(KINDS)}.")
    if set(kinds) != {"arrow"}:
        for expert in experts:
            if not data.get(expert.name):
                raise ConfigError(f"{expert.name}: no examples were given to measure it on.")
    base = identify_base(model, tokenizer)
    drawn = {expert.name: draw(data.get(expert.name, ()), examples, seed) for expert in experts}
    made: dict[str, dict[str, Signatures]] = {expert.name: {} for expert in experts}

    def keep(expert: Expert, kind: str, vectors: dict[str, Tensor]) -> None:
        rows = () if kind == "arrow" else drawn[expert.name]
        tokens = sum(len(row.prompt) + len(row.target) for row in rows)
        made[expert.name][kind] = Signatures(
            kind, vectors, base, adapter_hash(expert.modules), len(rows), tokens
        )

    if "arrow" in kinds:
        for expert in experts:
            keep(expert, "arrow", {name: _arrow(lora) for name, lora in expert.modules.items()})
    if "prompt_mean" in kinds:
        for expert, vectors in zip(experts, _prompt_means(model, experts, drawn), strict=True):
            keep(expert, "prompt_mean", vectors)
    if "average_activation" in kinds:
        pad = tokenizer.pad_token_id
        route(model, ExpertPool(experts), "uniform")
        try:
            for expert in tqdm(experts, desc="average activation", disable=not progress):
                with assign(model, [expert.name]):
                    vectors = _mean_inputs(model, expert, drawn[expert.name], batch_size, pad)
                keep(expert, "average_activation", vectors)
        finally:
            unroute(model)
    return made


def draw(rows: Sequence[Row], count: int, seed: int) -> list[Row]:
    """`count` rows at random, in their order."""
    chosen = random.Random(seed).sample(range(len(rows)), min(count, len(rows)))
    return [rows[index] for index in sorted(chosen)]


def _arrow(lora: Any) -> Float[Tensor, " I"]:
    return right_singular(lora)[1][0].float()


def _prompt_means(
    model: Any, experts: Sequence[Expert], drawn: Mapping[str, list[Encoded]]
) -> Iterator[dict[str, Tensor]]:
    module = first_readers(model)[0]
    vocabulary = model.get_input_embeddings().weight.shape[0]
    inputs = token_inputs(model, vocabulary).cpu()
    for expert in experts:
        ids = torch.tensor(
            [token for row in drawn[expert.name] for token in row.prompt], dtype=torch.long
        )
        if not len(ids):
            raise ConfigError(f"{expert.name}: its examples have no prompts to take the mean of.")
        counts = torch.bincount(ids, minlength=vocabulary)
        used = counts.nonzero().squeeze(1)
        share = counts[used].double() / counts.sum()
        yield {module: (share @ inputs[used].double()).float()}


def _mean_inputs(
    model: Any, expert: Expert, rows: list[Encoded], batch_size: int, pad: int
) -> dict[str, Tensor]:
    """The mean over rows of each adapted module's mean input."""
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
            for start in range(0, len(rows), batch_size):
                batch = collate(rows[start : start + batch_size], pad=pad, seq2seq=seq2seq)
                if seq2seq:  # the labels' padding is not the model's to see otherwise
                    batch["decoder_attention_mask"] = batch["labels"] != IGNORED
                batch = {name: value.to(model.device) for name, value in batch.items()}
                model(**batch, **({} if seq2seq else {"use_cache": False}))
    finally:
        keeper.close()
    return {name: (total / len(rows)).float().cpu() for name, total in sums.items()}
