"""What has to hold of a writer, wherever it ends."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from tests.crash.dying import DEAD, DONE, FAILED, SURVIVED, UNTIDY, in_child

State = dict[str, Any]  # what a reader finds, by what is written whole


@dataclass(frozen=True)
class Writer:
    """Something that writes into a folder, and how a reader sees what is there."""

    write: Callable[[Path], Any]
    read: Callable[[Path], State]
    again: bool = True  # whether it may be asked for what is there already
    # What a writer that goes on later leaves for itself, by the end of its name.
    progress: tuple[str, ...] = ()


def names_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def check(writer: Writer, before: Path, scratch: Path, *, mode: str, stride: int = 1) -> int:
    """Let the writer end at every step, or at every `stride`th; return how many ends there were.

    After each, a reader finds for each thing the old state or the new one. Where the writer could
    tidy up, nothing else is left. And the same command then finishes, as if nothing had been.
    """
    log = scratch / "log"
    whole = Path(shutil.copytree(before, scratch / "whole"))
    old = writer.read(whole)
    assert in_child(writer.write, whole, log) == DONE, log.read_text()
    new, names = writer.read(whole), names_in(whole)
    assert new != old
    ends = 0
    for at in count(1, stride):
        folder = Path(shutil.copytree(before, scratch / "folder"))
        code = in_child(writer.write, folder, log, at=at, mode=mode)
        found = writer.read(folder)
        where = f"{mode} at step {at}"
        if code in (DONE, SURVIVED):
            assert found == new, where
            assert names_in(folder) == names, where
            if code == DONE:
                return ends
            shutil.rmtree(folder)
            continue
        ends += 1
        assert code in (DEAD, FAILED, UNTIDY), f"{where}: exit code {code}"
        for key in old.keys() | new.keys():
            assert found.get(key) in (old.get(key), new.get(key)), f"{where}: {key}"
        if code == FAILED:
            left = {name for name in names_in(folder) if not name.endswith(writer.progress or "\0")}
            assert left <= names_in(before) | names, where
        if writer.again or found != new:
            code = in_child(writer.write, folder, log)
            assert code == DONE, f"{where}: {log.read_text()}"
            assert writer.read(folder) == new, where
            assert names_in(folder) == names, where
        shutil.rmtree(folder)
    raise AssertionError("not reached")
