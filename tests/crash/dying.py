"""A child process that dies, or fails, at the Nth thing it does to files.

The functions that change a disk are wrapped. Each call is a step. Before the step that is asked
for, the child ends as by `kill -9`, or the call fails as on a full disk, or Ctrl-C comes. A write
is two steps, so that it can end half way.
"""

import builtins
import errno
import io
import os
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from phatgoose import files

KILL, FULL, INTERRUPT = "kill", "full disk", "interrupt"
MODES = (KILL, FULL, INTERRUPT)
# What takes room on the disk, and so can find none.
TAKES_ROOM = {"open", "mkdir", "write", "half a write", "fsync", "replace", "rename"}
CHANGES = ("replace", "rename", "unlink", "remove", "rmdir", "mkdir", "fsync", "truncate", "link")
TIDIES = {"unlink", "remove", "rmdir"}
# Exit codes. SURVIVED: done in spite of the fault. UNTIDY: failed while it was tidying up.
DONE, FAILED, SURVIVED, UNTIDY, DEAD = 0, 3, 4, 5, 9
SECONDS = 120


class Fault:
    """Counts steps, and does what is wanted at one of them."""

    def __init__(self, at: int, mode: str) -> None:
        self.left, self.mode = at, mode
        self.failed = FAILED

    def step(self, name: str) -> None:
        self.left -= self.mode != FULL or name in TAKES_ROOM
        if self.left:
            return
        self.left = -1
        self.failed = UNTIDY if name in TIDIES else FAILED
        if self.mode == KILL:
            os._exit(DEAD)
        if self.mode == INTERRUPT:
            raise KeyboardInterrupt
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def install(self) -> None:
        """Wrap the functions, for good: in a process of its own."""
        for name in CHANGES:
            setattr(os, name, self._counted(name, getattr(os, name)))
        files._exchange = self._counted("rename", files._exchange)
        opened, fdopen, plain = os.open, os.fdopen, builtins.open

        def os_open(path: Any, flags: int, *rest: Any, **more: Any) -> int:
            if flags & (os.O_CREAT | os.O_TRUNC):
                self.step("open")
            return opened(path, flags, *rest, **more)

        def python_open(file: Any, mode: str = "r", *rest: Any, **more: Any) -> Any:
            if not set(mode) & set("wax+") or isinstance(file, int):
                return plain(file, mode, *rest, **more)
            self.step("open")
            return self._halving(plain(file, mode, *rest, **more))

        os.open, builtins.open, io.open = os_open, python_open, python_open
        os.fdopen = lambda *args, **more: self._halving(fdopen(*args, **more))

    def _counted(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **more: Any) -> Any:
            self.step(name)
            return real(*args, **more)

        return counted

    def _halving(self, file: Any) -> Any:
        return _Halving(file, self) if hasattr(file, "write") else file


class _Halving:
    """A file whose writes are two steps."""

    def __init__(self, file: Any, fault: Fault) -> None:
        self._file, self._fault = file, fault

    def write(self, data: Any) -> int:
        self._fault.step("write")
        half = len(data) // 2
        written = self._file.write(data[:half])
        self._file.flush()
        self._fault.step("half a write")
        return int(written + self._file.write(data[half:]))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> "_Halving":
        self._file.__enter__()
        return self

    def __exit__(self, *error: Any) -> Any:
        return self._file.__exit__(*error)

    def __iter__(self) -> Any:
        return iter(self._file)


def in_child(
    act: Callable[[Path], Any], folder: Path, log: Path, *, at: int = 0, mode: str = KILL
) -> int:
    """Run `act` in a forked child with a fault at step `at` (0: none); return its exit code."""
    fault = Fault(at, mode)
    child = os.fork()
    if not child:
        code = FAILED
        try:
            torch.set_num_threads(1)  # a forked child has no threads to share work with
            if at:
                fault.install()
            act(folder)
            code = SURVIVED if fault.left < 0 else DONE
        except BaseException:
            code = fault.failed
            with open(os.devnull if at else log, "w") as file:
                traceback.print_exc(file=file)
        finally:
            os._exit(code)
    end = time.monotonic() + SECONDS
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise AssertionError(f"hung for {SECONDS} s")
        time.sleep(0.002)
