"""Lets many forwards run at once, or one change of the pool alone."""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from phatgoose.errors import RoutingError

PATIENCE = 0.5  # seconds between looks for readers that are gone


class PoolLock:
    """A readers-writer lock. A forward, or a whole `generate`, reads; a change of the pool writes.

    A thread may read again while it reads, and read while it writes: a forward calls another one,
    and a router runs the base before an expert joins. A change that waits goes before readers that
    come after it, so it waits only for those under way.

    Each reader leaves the stack frame that it runs in. A reader that an interrupt took out of its
    forward never says that it left; a change recognises it, because that frame no longer runs.
    """

    def __init__(self) -> None:
        self._turn = threading.Condition()
        self._readers: dict[int, list[FrameType]] = {}  # by thread, innermost last
        self._writer: int | None = None
        self._waiting = 0
        self.version = 0  # how often the pool has changed

    def __deepcopy__(self, _memo: object) -> "PoolLock":
        return PoolLock()

    def __reduce__(self) -> tuple[type["PoolLock"], tuple[()]]:
        return PoolLock, ()

    def enter(self, frame: FrameType) -> None:
        """Begin to read, in `frame`; waits for a change of the pool."""
        me = threading.get_ident()
        with self._turn:
            if me in self._readers:
                self._forget_lost(me)
            if me not in self._readers and self._writer != me:
                while self._writer is not None or self._waiting:
                    self._turn.wait()
            self._readers.setdefault(me, []).append(frame)

    def leave(self, frame: FrameType) -> None:
        """End what this thread began to read in `frame`."""
        me = threading.get_ident()
        with self._turn:
            frames = self._readers.get(me, [])
            if frame in frames:
                frames.remove(frame)
            if not frames and self._readers.pop(me, None) is not None:
                self._turn.notify_all()

    def is_taken(self) -> bool:
        """Whether another thread changes the pool right now."""
        return self._writer not in (None, threading.get_ident())

    def reading(self) -> "Reading":
        """Read inside the block, which must be in a function that runs until its end."""
        return Reading(self)

    @contextmanager
    def changing(self, what: str) -> Iterator[None]:
        """Change the pool inside the block, while nobody reads; `what` is named in errors.

        Raises RoutingError in a thread that reads: it would wait for itself.
        """
        me = threading.get_ident()
        if self._writer == me:
            yield
            return
        with self._turn:
            self._forget_lost(me)
            if me in self._readers:
                _refuse(what)
            self._waiting += 1
            try:
                while self._writer is not None or self._readers:
                    self._turn.wait(PATIENCE)
                    self._forget_lost()
                self._writer = me
            finally:
                self._waiting -= 1
                self._turn.notify_all()
        try:
            yield
        finally:
            with self._turn:
                self.version += 1
                self._writer = None
                self._turn.notify_all()

    def _forget_lost(self, thread: int | None = None) -> None:
        """Drop readers, of one thread or of all, whose frames no longer run."""
        running = sys._current_frames()
        for each in list(self._readers) if thread is None else [thread]:
            alive = frames_of(running.get(each))
            frames = [frame for frame in self._readers.get(each, []) if frame in alive]
            self._readers[each] = frames
            if not frames:
                del self._readers[each]


class Reading:
    """See `PoolLock.reading`."""

    def __init__(self, lock: PoolLock) -> None:
        self._lock = lock

    def __enter__(self) -> None:
        self._frame = sys._getframe(1)
        self._lock.enter(self._frame)

    def __exit__(self, *_: object) -> None:
        self._lock.leave(self._frame)


def frames_of(frame: FrameType | None) -> set[FrameType]:
    """A stack's frames, from this one outwards."""
    found = set()
    while frame is not None:
        found.add(frame)
        frame = frame.f_back
    return found


def _refuse(what: str) -> NoReturn:
    raise RoutingError(
        f"{what}: called from inside a forward or a `generate` of a model that this pool routes "
        "(a hook, a streamer, a logits processor), which cannot change under it. Change the pool "
        "before or after, or from another thread, which then waits."
    )
