"""Seeds random generators for a while, and puts them back as they were."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from accelerate.utils import set_seed

T = TypeVar("T")


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed every random generator, and put back what was there."""
    before = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        try:
            set_seed(seed)
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])


class OwnRandom(Generic[T]):
    """An iterator that draws as if it were alone: it has its own state of the CPU's generators."""

    def __init__(self, items: Callable[[], Iterator[T]], seed: int) -> None:
        with seeded(seed):
            self.items = items()
            self.state = _state()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        outside = _state()
        _restore(self.state)
        try:
            return next(self.items)
        finally:
            self.state = _state()
            _restore(outside)


def _state() -> tuple[Any, ...]:
    return random.getstate(), np.random.get_state(), torch.get_rng_state()


def _restore(state: tuple[Any, ...]) -> None:
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(state[2])
