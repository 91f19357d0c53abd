"""Writing files so that a reader sees the old content or the new, never half of it.

Whatever is being written has a name that begins with a dot and ends in PARTIAL, and its writer
holds a lock on it. So what a killed writer left is told from what a living one is filling, and the
next writer into the same folder sweeps it.
"""

import ctypes
import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from phatgoose.errors import ConfigError
from phatgoose.locks import is_at, lock

PARTIAL = ".phatgoose-partial"
OCCUPIED = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` under a temporary name, fsync, then rename over `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent)
    temporary, descriptor = _begin(path, folder=False)
    assert descriptor is not None
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            if os.name == "nt":  # which renames no open file
                file.close()
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, atomically."""
    from safetensors.torch import save

    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_bytes(path, save(contiguous, metadata=dict(metadata)))


@contextmanager
def new_folder(folder: Path, *, replace: bool = False) -> Iterator[Path]:
    """A folder to fill, which becomes `folder` when it is complete, or not at all.

    Of two writers one wins whole. With `replace` that is the last: the new folder takes the place
    of what is there. Else it is the first: raises ConfigError, and changes nothing, where there is
    a folder with something in it.
    """
    folder = Path(os.path.realpath(folder))  # what a link leads to is replaced, not the link
    folder.parent.mkdir(parents=True, exist_ok=True)
    sweep(folder.parent)
    partial, descriptor = _begin(folder, folder=True)
    try:
        yield partial
        publish(partial, folder, replace=replace)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # what failed, or what was replaced
        if descriptor is not None:
            os.close(descriptor)


def publish(partial: Path, folder: Path, *, replace: bool = False) -> None:
    """Give a complete folder its name, once all in it is on the disk; for `replace` see above."""
    for root, _, names in os.walk(partial, topdown=False):
        for name in names:
            _sync(Path(root, name))
        _sync(Path(root))
    try:
        if folder.is_dir() and os.path.samefile(folder, os.curdir):
            # The folder we are in must stay the one that it is. A config comes after its weights.
            for name in sorted(os.listdir(partial), reverse=True):
                os.replace(partial / name, folder / name)
        elif replace and folder.is_dir():
            _exchange(partial, folder)
        else:
            os.rename(partial, folder)
    except OSError as error:
        if error.errno not in OCCUPIED:
            raise
        raise ConfigError(
            f"{folder}: is no empty folder, so another process may have written it just now. "
            "Nothing of this one was kept. Look at what is there, or give a new folder."
        ) from None
    _sync(folder.parent)


def sweep(folder: Path) -> None:
    """Remove what writers that are no longer alive left in a folder."""
    for entry in os.scandir(folder):
        if not (entry.name.startswith(".") and entry.name.endswith(PARTIAL)):
            continue
        is_folder = entry.is_dir(follow_symlinks=False)
        if not is_folder and not entry.is_file(follow_symlinks=False):
            continue
        with suppress(OSError):  # somebody else was faster, or it is somebody else's
            descriptor = os.open(entry.path, os.O_RDONLY if is_folder else os.O_RDWR)
            try:
                if not lock(descriptor) or not is_at(descriptor, Path(entry.path)):
                    continue
                shutil.rmtree(entry.path) if is_folder else os.unlink(entry.path)
            finally:
                os.close(descriptor)


def _begin(path: Path, *, folder: bool) -> tuple[Path, int | None]:
    """Make the temporary file or folder that is to become `path`, open and locked."""
    while True:
        name = f".{path.name[:50]}.{secrets.token_hex(4)}{PARTIAL}"  # no longer than names may be
        temporary = path.with_name(name)
        if folder:
            temporary.mkdir()
            if os.name == "nt":  # where folders cannot be opened
                return temporary, None
            descriptor = os.open(temporary, os.O_RDONLY)
        else:
            descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        lock(descriptor)
        if is_at(descriptor, temporary):  # else it was swept before it was locked
            return temporary, descriptor
        os.close(descriptor)


def _exchange(one: Path, other: Path) -> None:
    """Let two folders change their names, in one step where the system can."""
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
        done = renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0
    except (AttributeError, OSError, TypeError):  # not on Linux
        done = False
    if not done:
        aside = other.with_name(f"{one.name}.before")  # a name that no sweep takes
        os.rename(other, aside)
        os.rename(one, other)
        os.rename(aside, one)


def _sync(path: Path) -> None:
    """Make a file's content, or a folder's names, survive a power cut, where the system can."""
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
