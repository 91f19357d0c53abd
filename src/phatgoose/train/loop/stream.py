"""Shares batches out among processes, without end."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor

from phatgoose.errors import TrainingError

Batch = Mapping[str, Any]
T = TypeVar("T")


def own_share(batches: Iterable[T], accelerator: Accelerator, who: str = "") -> Iterator[T]:
    """Yield this process's share of the batches. It starts again when they end."""
    from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard

    shared = isinstance(batches, DataLoaderShard | DataLoaderDispatcher)
    rank, processes = accelerator.process_index, accelerator.num_processes
    endless = _again_and_again(batches, who)
    return endless if shared or processes == 1 else islice(endless, rank, None, processes)


def _again_and_again(batches: Iterable[T], who: str) -> Iterator[T]:
    given = 0
    while True:
        before = given
        for batch in batches:
            given += 1
            yield batch
        if given == before:
            raise TrainingError(
                f"{who}the batches ended after {given}. Pass a list or a DataLoader, which can "
                "start again, or ask for fewer steps."
            )


def skip(stream: Iterator[T], count: int) -> None:
    for _ in islice(stream, count):
        pass


def size(batch: Any) -> tuple[int, Tensor]:
    """Count a batch's examples and real tokens. The latter stay on its device, so nothing waits.

    A batch of a trainer's own kind, like GRPO's list of prompts, has no tokens to count.
    """
    if not isinstance(batch, Mapping):
        return len(batch), torch.tensor(0)
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    if ids is None:
        return 0, torch.tensor(0)
    return ids.shape[0], torch.tensor(ids.numel()) if mask is None else mask.sum()
