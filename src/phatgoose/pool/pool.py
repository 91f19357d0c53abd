"""The experts of one base."""

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, runtime_checkable
from weakref import WeakSet

import torch
from torch import nn

from phatgoose.errors import ConfigError, IncompatibleExpertError
from phatgoose.experts import Expert, expert_sources, load_expert
from phatgoose.experts.renames import renamed_for
from phatgoose.experts.verify import check_numbers
from phatgoose.nn import PoolLock


@runtime_checkable
class Listener(Protocol):
    """A routed model that follows its pool."""

    def renamed(self, expert: Expert) -> Expert: ...
    def prepare_add(self, expert: Expert) -> None: ...
    def cancel_add(self, expert: Expert) -> None: ...
    def add(self, expert: Expert) -> None: ...
    def prepare_remove(self, name: str) -> None: ...
    def remove(self, index: int) -> None: ...


class ExpertPool:
    """Experts of one base model, in order. Models routed by it follow `add` and `remove` at once.

    A change waits for the forwards and the calls of `generate` under way, and those that come
    after it wait for the change.

    Raises on a name taken twice (ConfigError), and on experts of different bases or with NaN or
    infinite values (IncompatibleExpertError). `same_base` says that all are of one base, whatever
    their adapters call it; without it, a warning comes where they are used together.
    """

    def __init__(self, experts: Iterable[Expert] = (), *, same_base: bool = False) -> None:
        self.same_base = same_base
        self._experts: tuple[Expert, ...] = ()  # replaced whole: threads may be reading it
        self.lock = PoolLock()  # forwards of every model that this pool routes, or one change
        self._listeners: WeakSet[Listener] = WeakSet()
        for expert in experts:
            self.add(expert)

    @classmethod
    def load(
        cls,
        sources: str | Path | Iterable[str | Path] | Mapping[str, str | Path],
        *,
        same_base: bool = False,
    ) -> "ExpertPool":
        """Load experts from folders or Hub ids; see `load_expert` for what it raises.

        A mapping names them, and so does "NAME=PATH". A tree of expert folders, on this disk or on
        the Hub, stands for all of them, in the order of their names.
        """
        if isinstance(sources, str | Path):
            sources = [sources]
        sources = expert_sources(sources if isinstance(sources, Mapping) else [*sources])
        pool = cls(same_base=same_base)
        # Reading, hashing and checking leave Python to others.
        with _one_thread_each(), ThreadPoolExecutor() as threads:
            for expert in threads.map(_load_sound, sources):
                pool._join(expert)
        return pool

    @property
    def experts(self) -> list[Expert]:
        return list(self._experts)

    @property
    def names(self) -> list[str]:
        """The experts' names; a trace's indices point into this list."""
        return [expert.name for expert in self._experts]

    def __len__(self) -> int:
        return len(self._experts)

    def __iter__(self) -> Iterator[Expert]:
        return iter(self._experts)

    def __getitem__(self, name: str) -> Expert:
        experts = self._experts
        return experts[_place(name, experts)]

    def index(self, name: str) -> int:
        """The place of an expert among `names`. Raises ConfigError if none has that name."""
        return _place(name, self._experts)

    def add(self, expert: Expert | str | Path) -> Expert:
        """Add an expert at the end, also to every model this pool routes; all of them or none.

        Raises RoutingError inside a forward of such a model, which the change would wait for.
        """
        if not isinstance(expert, Expert):
            expert = load_expert(expert)
        _check_sound(expert)
        return self._join(expert)

    def rename_for(self, model: nn.Module) -> None:
        """Call the experts' modules as the model does, where an older transformers did otherwise.

        No expert is of another name or place then.
        """
        self._experts = tuple(renamed_for(expert, model) for expert in self._experts)

    def _join(self, expert: Expert) -> Expert:
        with self.lock.changing(f"pool.add({expert.name})"):
            self._check(expert)
            listeners = list(self._listeners)
            for listener in listeners:
                expert = listener.renamed(expert)
            try:
                for listener in listeners:
                    listener.prepare_add(expert)
            except BaseException:
                for listener in listeners:
                    listener.cancel_add(expert)
                raise
            self._experts = (*self._experts, expert)
            for listener in listeners:
                listener.add(expert)
        return expert

    def remove(self, name: str) -> None:
        """Take an expert out, also from every model this pool routes.

        Raises RoutingError for the last one of a pool that routes, and inside a forward.
        """
        with self.lock.changing(f"pool.remove({name})"):
            index, listeners = self.index(name), list(self._listeners)
            for listener in listeners:
                listener.prepare_remove(name)
            self._experts = (*self._experts[:index], *self._experts[index + 1 :])
            for listener in listeners:
                listener.remove(index)

    def follow(self, listener: Listener) -> None:
        """Tell `listener` of every later change, for as long as it is alive."""
        self._listeners.add(listener)

    def unfollow(self, listener: Listener) -> None:
        self._listeners.discard(listener)

    def _check(self, expert: Expert) -> None:
        if expert.name in self.names:
            raise ConfigError(
                f"{expert.name}: two experts of this name. Rename a folder, or name "
                "the expert: NAME=PATH, or load_expert(path, name=...)."
            )
        for other in self._experts:
            difference = _difference(expert, other)
            if difference:
                raise IncompatibleExpertError(
                    f"{expert.name}: belongs to another base than {other.name}: {difference}. "
                    "A pool holds experts of one base; start a second pool."
                )


def _place(name: str, experts: tuple[Expert, ...]) -> int:
    names = [expert.name for expert in experts]
    try:
        return names.index(name)
    except ValueError:
        raise ConfigError(
            f"{name}: no expert of this name in the pool. It has: {', '.join(names)}."
        ) from None


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Have torch compute in the threads that call it: teams of threads fight over the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _load_sound(source: str | Path) -> Expert:
    expert = load_expert(source)
    _check_sound(expert)
    return expert


def _check_sound(expert: Expert) -> None:
    for problem in check_numbers(expert):
        raise IncompatibleExpertError(problem)


def _difference(one: Expert, other: Expert) -> str | None:
    if one.base and other.base:
        return one.base.difference(other.base)
    return None  # their names do not tell, and the sizes of their layers wait for a model
