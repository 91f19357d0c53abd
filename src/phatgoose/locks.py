"""Locks on open files, which the system drops when a process ends, however it ends.

So there are no stale locks: whoever holds one is alive. Where the system has no such locks
(Windows, some network file systems), nobody is told of another writer, and nothing is swept.
"""

import errno
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from phatgoose.errors import ConfigError

if os.name == "posix":
    import fcntl

logger = logging.getLogger(__name__)
HELD = (errno.EACCES, errno.EAGAIN, errno.EWOULDBLOCK)


def lock(descriptor: int, *, wait: bool = False) -> bool | None:
    """Lock an open file or folder until it is closed; False if another one has it, None unknown."""
    if os.name != "posix":
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        return False if error.errno in HELD else None
    return True


def is_at(descriptor: int, path: Path) -> bool:
    """Whether `path` is still the file or folder that was opened there."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


@contextmanager
def claimed(path: Path, what: str, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock file at `path` while writing `what`; it is gone afterwards.

    Where another process, or another thread of this one, holds it, raises ConfigError, or with
    `wait` waits for it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = _opened(path, what, wait)
    try:
        yield
    finally:
        if is_at(descriptor, path):  # it may have gone with its folder
            path.unlink()
        os.close(descriptor)


def _opened(path: Path, what: str, wait: bool) -> int:
    """The lock file, open and locked."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        got = lock(descriptor, wait=wait)
        if got is False:
            os.close(descriptor)
            raise ConfigError(
                f"{what}: another process is writing there. Wait until it ends, or write elsewhere."
            )
        if got is None:
            logger.warning("%s: its file system has no locks; let no second process write", what)
        if is_at(descriptor, path):  # else whoever had it before took the file away just now
            return descriptor
        os.close(descriptor)
