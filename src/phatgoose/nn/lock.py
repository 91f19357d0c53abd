"""Lets many forwards run at once, or one change of the pool alone."""

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
    come after it, so it waits only for those under way; and readers that waited for a change go
    before the next one, so that no row of changes keeps them out.

    Each reader leaves the stack frame that it runs in. A reader that an interrupt took out of its
    forward never says that it left; a change recognises it, because that frame no longer runs.
    """

    def __init__(self) -> None:
        self._turn = threading.Condition()
        self._readers: dict[int, list[object]] = {}  # by thread, innermost last; see enter
        self._writer: int | None = None
        self._waiting = 0  # changes
        self._queued = 0  # readers that wait
        self._due = 0  # of these, how many waited for the last change
        self.version = 0  # how often the pool has changed

    def __deepcopy__(self, _memo: object) -> "PoolLock":
        return PoolLock()

    def __reduce__(self) -> tuple[type["PoolLock"], tuple[()]]:
        return PoolLock, ()

    def enter(self, reader: object) -> None:
        """Begin to read, in the frame or as the object `reader`; waits for a change of the pool."""
        me = threading.get_ident()
        with self._turn:
            if me in self._readers:
                self._forget_lost(me)
            if me not in self._readers and self._writer != me:
                self._queue()
            self._readers.setdefault(me, []).append(reader)

    def _queue(self) -> None:
        """Wait until this thread may read."""
        came = self.version
        self._queued += 1
        try:
            while self._writer is not None or (self._waiting and came == self.version):
                self._turn.wait()
        finally:
            self._queued -= 1
            if came != self.version:
                self._due -= 1
                self._turn.notify_all()

    def leave(self, reader: object) -> None:
        """End what this thread began to read in, or as, `reader`."""
        me = threading.get_ident()
        with self._turn:
            readers = self._readers.get(me, [])
            if reader in readers:
                readers.remove(reader)
            if not readers and self._readers.pop(me, None) is not None:
                self._turn.notify_all()

    def is_taken(self) -> bool:
        """Whether another thread changes the pool right now."""
        return self._writer not in (None, threading.get_ident())

    def reading(self) -> "Reading":
        """Read inside the block."""
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
                while self._writer is not None or self._readers or self._due:
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
                self._due = self._queued
                self._turn.notify_all()

    def _forget_lost(self, thread: int | None = None) -> None:
        """Drop readers, of one thread or of all, whose frames no longer run."""
        for each in list(self._readers) if thread is None else [thread]:
            left = [reader for reader in self._readers.get(each, []) if _runs(reader)]
            if left:
                self._readers[each] = left
            else:
                self._readers.pop(each, None)


class Reading:
    """See `PoolLock.reading`. A `with` block ends whatever happens in it, so it is never lost."""

    def __init__(self, lock: PoolLock) -> None:
        self._lock = lock

    def __enter__(self) -> None:
        self._lock.enter(self)

    def __exit__(self, *_: object) -> None:
        self._lock.leave(self)


def _runs(reader: object) -> bool:
    """Whether a reader is still at it. A frame that is over can be cleared, one that runs cannot.

    That is all one may ask of another thread's frame: its callers come and go while one looks.
    """
    if not isinstance(reader, FrameType):
        return True
    try:
        reader.clear()
    except RuntimeError:
        return True
    return False


def frames_of(frame: FrameType | None) -> set[FrameType]:
    """This thread's frames, from one of them outwards."""
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
