"""Tells how a routed model treats the tokens of whole tasks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from phatgoose.analysis.summary import entropy, shares
from phatgoose.analysis.tally import SEGMENTS, Place, Segment, Tally, places
from phatgoose.errors import ConfigError
from phatgoose.evaluation.batches import evaluating, is_seq2seq
from phatgoose.evaluation.reference import encode_references, reference_batches, trace_references
from phatgoose.nn import Stream, Trace
from phatgoose.pool import record
from phatgoose.tasks import Encoded, Example

MAX_TOKENS = 2048  # per batch; a batch's trace is all that is kept of it at a time
SENTENCE = 80  # tokens that fit side by side in a picture


@dataclass(frozen=True)
class TaskAnalysis:
    """Where a task's tokens went: P segments (of SEGMENTS), M modules, E experts and, last, none.

    A share is a part of a token's weight at a module, 0 to 1, averaged over tokens and modules.
    """

    name: str
    experts: list[str]
    oracle: str | None
    examples: int
    places: list[Place]
    weights: Float[Tensor, "P M E+1"]  # shares, summed over tokens
    tokens: Int[Tensor, "P M"]
    scales: Float[Tensor, "M 2 2"]  # of a token's weights the sum, the maximum: Σ, Σ of squares
    distinct: dict[Stream, Int[Tensor, " E+1"]]  # tokens that used 0, 1, ... E experts
    sentence: Trace  # of one example
    prompt: int  # its prompt tokens

    @property
    def layers(self) -> dict[str, list[int]]:
        """Return the modules of each layer, by index."""
        found: dict[str, list[int]] = {}
        for index, place in enumerate(self.places):
            found.setdefault(place.layer, []).append(index)
        return found

    def shares(self, segment: Segment | None = None) -> Float[Tensor, " E+1"]:
        """Return the share of each expert over everything; NaN where a segment has no token."""
        return self._mean(list(range(len(self.places))), segment)

    def by_module(self, segment: Segment | None = None) -> Float[Tensor, "M E+1"]:
        return torch.stack([self._mean([index], segment) for index in range(len(self.places))])

    def by_layer(self, segment: Segment | None = None) -> Float[Tensor, "L E+1"]:
        return torch.stack([self._mean(modules, segment) for modules in self.layers.values()])

    def entropy_by_layer(self) -> Float[Tensor, " L"]:
        """Compute the entropy of each layer's shares, in bits: how evenly it uses the pool."""
        return entropy(shares(self.by_layer()))

    @property
    def most_entropy(self) -> float:
        """Say what `entropy_by_layer` would be if all were used alike, no expert included."""
        candidates = len(self.experts) + int(bool(self.weights[..., -1].sum() > 0))
        return float(torch.tensor(candidates).log2())

    def scale_by_layer(self) -> tuple[Float[Tensor, "L 2"], Float[Tensor, "L 2"]]:
        """Return mean and standard deviation of the sum and the maximum of a token's weights.

        They are of one module. Only weights that add something count, so not that of no expert. An
        adapter on its own, as it was trained, has 1.
        """
        layers = list(self.layers.values())
        sums = torch.stack([self.scales[modules].sum(0) for modules in layers])
        count = torch.stack([self.tokens[:, modules].sum() for modules in layers])
        mean, square = (sums / count.view(-1, 1, 1)).unbind(-1)
        return mean, (square - mean.square()).clamp_min(0).sqrt()

    def distinct_mean(self, stream: Stream) -> float:
        """Return how many experts a token of the stream uses over all its modules: a mean."""
        counts = self.distinct[stream].double()
        return float(counts @ torch.arange(len(counts)).double() / counts.sum())

    def rank(self, expert: str) -> int:
        """Rank an expert by its share of everything. 1 is the most used."""
        given = self.shares()[:-1]
        return 1 + int((given > given[self.experts.index(expert)]).sum())

    def _mean(self, modules: list[int], segment: Segment | None) -> Float[Tensor, " E+1"]:
        wanted = SEGMENTS if segment is None else (segment,)
        rows = [SEGMENTS.index(name) for name in wanted]
        total = self.weights[rows][:, modules].sum((0, 1))
        return total / self.tokens[rows][:, modules].sum()


def analyse_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Mapping[str, Sequence[Example]],
    *,
    oracle: Mapping[str, str] | None = None,
    max_tokens_per_batch: int = MAX_TOKENS,
    progress: bool = False,
) -> dict[str, TaskAnalysis]:
    """Run each task's prompts and reference answers through a routed model; see where they go.

    `oracle` names the expert that would be right for a task, where it has an entry; elsewhere it is
    the expert of the task's own name, or none. Only sums are kept, and the trace of one example of
    each task. `progress` shows a bar on stderr.

    Raises ConfigError for a task without examples, an oracle that is not in the pool, or a prompt
    of which nothing fits before its answer; RoutingError where the model does not route.
    """
    with record(model) as nothing:
        names = nothing.names
    rightful = {task: _oracle(task, names, oracle or {}) for task in tasks}
    rows = {task: _encode(model, tokenizer, task, examples) for task, examples in tasks.items()}
    found = {}
    bar = tqdm(
        total=sum(map(len, rows.values())),
        desc="analyse",
        unit="example",
        disable=not progress,
        leave=None,
    )
    with bar, evaluating(model):
        for task in tasks:
            tally = Tally(names)
            for batch in reference_batches(rows[task], max_tokens_per_batch):
                prompts = torch.tensor([len(row.prompt) for row in batch])
                trace = trace_references(model, tokenizer, batch)
                tally.add(trace, prompts, seq2seq=is_seq2seq(model))
                bar.update(len(batch))
            shown = _one_to_show(rows[task])
            where = places(tally.streams)
            found[task] = TaskAnalysis(
                name=task,
                experts=names,
                oracle=rightful[task],
                examples=len(rows[task]),
                places=where,
                weights=torch.stack([tally.weights[p.module] for p in where], dim=1),
                tokens=torch.stack([tally.tokens[p.module] for p in where], dim=1),
                scales=torch.stack([tally.scales[p.module] for p in where]),
                distinct=dict(tally.distinct),
                sentence=trace_references(model, tokenizer, [shown]),
                prompt=len(shown.prompt),
            )
    return found


def _oracle(task: str, names: Sequence[str], given: Mapping[str, str]) -> str | None:
    expert = given.get(task, task if task in names else None)
    if expert is not None and expert not in names:
        raise ConfigError(
            f"{task}: its oracle is to be {expert}, which is not in the pool. The pool has "
            f"{', '.join(names)}."
        )
    return expert


def _encode(model: Any, tokenizer: Any, task: str, examples: Sequence[Example]) -> list[Encoded]:
    if not examples:
        raise ConfigError(f"{task}: has no examples. Give at least one.")
    return encode_references(model, tokenizer, examples)


def _one_to_show(rows: list[Encoded]) -> Encoded:
    """Take the first that fits in a picture, or the shortest if none does."""
    lengths = [len(row.prompt) + len(row.target) for row in rows]
    fits = (row for row, length in zip(rows, lengths, strict=True) if length <= SENTENCE)
    return next(fits, rows[lengths.index(min(lengths))])
