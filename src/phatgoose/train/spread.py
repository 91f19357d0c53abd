"""Trains a collection on several devices at once: a process on each, and groups of experts in turn.

Experts share nothing but the base, so processes have nothing to tell each other. A group's
progress is on disk as in `train_experts`, so any device may go on with it.
"""

import multiprocessing
import os
import shutil
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch

from phatgoose.errors import ConfigError, TrainingError
from phatgoose.experts import GateRecord
from phatgoose.locks import claimed
from phatgoose.train.collection import LOCK, WORK, Collection, Tasks, note, plan
from phatgoose.train.settings import AdapterTraining, GateTraining

Opened = tuple[Any, Any, Tasks]  # model, tokenizer, and encoded examples by name


@dataclass(frozen=True, kw_only=True)
class Spread:
    """What every process is told."""

    opened: Callable[[str], Opened]  # by device; a function of a module, or a partial of one
    out: Path
    adapter: AdapterTraining
    gates: GateTraining
    gate_batch_size: int | None
    processes: int


def train_experts_on(
    devices: Sequence[str],
    opened: Callable[[str], Opened],
    tasks: Sequence[str],
    out: str | Path,
    *,
    adapter: AdapterTraining | None = None,
    gates: GateTraining | None = None,
    gate_batch_size: int | None = None,
    together: int | None = None,
    progress: bool = True,
) -> dict[str, GateRecord]:
    """Train as `train_experts` does, on several devices; return the new experts' records.

    A device that is named twice gets two processes. Without `together` each process trains one
    group. The experts are those of `train_experts` with groups of that size.

    Args:
        opened: loads the base on a device: the model, its tokenizer, and the encoded examples by
            name. It must be picklable.
        tasks: the names that `opened` gives examples of.

    Raises what `train_experts` and `opened` raise, and TrainingError if a process ends by itself.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ConfigError(
            "devices: these processes were launched together already. Train on several devices, or "
            "with accelerate launch, and not with both."
        )
    told = Spread(
        opened=opened,
        out=Path(out),
        adapter=adapter or AdapterTraining(),
        gates=gates or GateTraining(),
        gate_batch_size=gate_batch_size,
        processes=len(devices),
    )
    work = told.out / WORK
    with claimed(work / LOCK, str(out)):
        processes = _processes(devices, told)
        try:
            made = _train_all(processes, devices, tasks, work, together, progress=progress)
        except BrokenProcessPool:
            raise TrainingError(
                "a process that trained ended by itself, for want of memory perhaps. What was "
                "trained is kept: give the same command again, with fewer experts together."
            ) from None
        finally:
            processes.shutdown(cancel_futures=True)
        shutil.rmtree(work, ignore_errors=True)
    return made


def _processes(devices: Sequence[str], told: Spread) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")  # CUDA does not outlive a fork
    free = context.SimpleQueue()
    for device in devices:
        free.put(device)
    return ProcessPoolExecutor(
        len(devices), mp_context=context, initializer=_begin, initargs=(free, told)
    )


def _train_all(
    processes: ProcessPoolExecutor,
    devices: Sequence[str],
    tasks: Sequence[str],
    work: Path,
    together: int | None,
    *,
    progress: bool,
) -> dict[str, GateRecord]:
    looks = [processes.submit(_todo) for _ in devices]  # one would do; all of them load the base
    groups = plan(looks[0].result(), together, work, known=tasks, devices=len(devices))
    waited: dict[Future[dict[str, GateRecord]], Sequence[str]] = {}
    for names, folder in groups:
        note(names, folder)
        waited[processes.submit(_train, names, folder)] = names
    made: dict[str, GateRecord] = {}
    for number, done in enumerate(as_completed(waited), start=1):
        made |= done.result()
        if progress:
            print(f"{number}/{len(groups)}: {', '.join(waited[done])}", file=sys.stderr)
    return made


# ---------------------------------------------------------------- in a process of its own

_told: Spread
_device: str
_collection: Collection | None = None


def _begin(free: Any, told: Spread) -> None:
    """Take a device; what may fail is left to the first task, whose errors are told."""
    global _told, _device
    _told, _device = told, free.get()
    threading.Thread(target=_end_with_the_parent, daemon=True).start()


def _end_with_the_parent() -> None:
    """Whoever kills the parent alone leaves no process behind that goes on training."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _opened() -> Collection:
    global _collection
    if _collection is None:
        if _device.startswith("cuda"):
            torch.cuda.set_device(_device)  # Triton's kernels run on the current one
        else:
            torch.set_num_threads(max(1, torch.get_num_threads() // _told.processes))
        model, tokenizer, tasks = _told.opened(_device)
        _collection = Collection(
            model,
            tokenizer,
            tasks,
            _told.out,
            adapter=_told.adapter,
            gates=_told.gates,
            gate_batch_size=_told.gate_batch_size,
            progress=False,
        )
    return _collection


def _todo() -> list[str]:
    return _opened().todo()


def _train(names: Sequence[str], work: Path) -> dict[str, GateRecord]:
    return _opened().train(names, work)
