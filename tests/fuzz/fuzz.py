"""Fuzz every reader of strangers' files, on all cores: `make fuzz`, or

    PYTHONPATH=src python -m tests.fuzz --inputs 200000 --workers 16 --out fuzz.json

A table says how many were accepted, refused, crashed (an error that is none of ours, or the end of
the process), wrong (accepted against a hash, with values that none covers or that are not finite,
or read otherwise than by PEFT) and hung. Exit code 1 where any of the last three is not 0;
`--only N` runs one input again and shows its traceback.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

VERDICTS = ("accepted", "refused", "crashed", "wrong", "hung")
SHOWN = 20  # bad inputs that are told at the end


def judge(world: Any, number: int, seed: int, seconds: float) -> tuple[str, str, str]:
    """(reader, verdict, what was said) of one input, within so many seconds."""
    from tests.fuzz.world import READERS, Hung, Wrong, run

    def stop(*_: Any) -> None:
        raise Hung

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    reader = "?"
    try:
        reader, said = run(world, number, seed)
        return reader, said.partition(":")[0], said
    except Hung:
        verdict, said = "hung", "".join(traceback.format_exc(limit=-3))
    except Wrong as error:
        verdict, said = "wrong", str(error)
    except Exception:
        verdict, said = "crashed", traceback.format_exc(limit=-4)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    from random import Random

    (reader,) = Random(f"{seed} {number}").choices(
        [r.name for r in READERS], [r.weight for r in READERS]
    )
    return reader, verdict, said


def work(begin: int, step: int, end: int, options: Any, told: Any) -> None:
    """Judge every `step`-th input from `begin` on; tell of each before and after."""
    import resource

    import torch

    from tests.fuzz.world import World

    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (32 << 30, 32 << 30))  # a bomb ends this process only
    folder = Path(tempfile.mkdtemp(prefix="fuzz-", dir=options.folder))
    try:
        world = World(folder)
        for number in range(begin, end, step):
            told.send((number, None))
            told.send((number, judge(world, number, options.seed, options.seconds)))
        told.send((None, None))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Worker:
    """A process with its share of the inputs; started again after one that ended it."""

    def __init__(self, first: int, options: Any) -> None:
        self.first, self.options, self.done = first, options, False
        self.start(first)

    def start(self, begin: int) -> None:
        self.current: int | None = None
        self.since = time.monotonic()
        self.told, theirs = multiprocessing.Pipe(duplex=False)
        arguments = (begin, self.options.workers, self.options.inputs, self.options, theirs)
        self.process = multiprocessing.Process(target=work, args=arguments)
        self.process.start()
        theirs.close()

    def go_on(self) -> int | None:
        """End the process, and start one with the input after the one it was at."""
        self.process.kill()
        self.process.join()
        at, last = self.current, self.options.inputs
        if at is None or at + self.options.workers >= last:
            self.done = True
        else:
            self.start(at + self.options.workers)
        return at


def fuzz(options: Any) -> tuple[dict[str, Counter[str]], list[dict[str, Any]]]:
    """All inputs: counts by reader, and the bad ones."""
    workers = [Worker(first, options) for first in range(min(options.workers, options.inputs))]
    counts: dict[str, Counter[str]] = {}
    bad: list[dict[str, Any]] = []
    begun = shown = time.monotonic()

    def count(number: int, reader: str, verdict: str, said: str) -> None:
        counts.setdefault(reader, Counter())[verdict] += 1
        if verdict not in ("accepted", "refused"):
            bad.append({"number": number, "reader": reader, "verdict": verdict, "said": said})
            print(f"{verdict}: input {number}, {reader}: {said[-600:]}", file=sys.stderr)

    while running := [worker for worker in workers if not worker.done]:
        ready = wait([worker.told for worker in running], timeout=1)
        now = time.monotonic()
        for worker in running:
            try:
                while worker.told in ready and worker.told.poll():
                    number, verdict = worker.told.recv()
                    worker.since = now
                    worker.done = number is None
                    worker.current = worker.current if number is None else number
                    if verdict:
                        count(number, *verdict)
            except EOFError:
                at = worker.go_on()
                if at is None:
                    raise SystemExit("a worker ended before its first input") from None
                count(at, "?", "crashed", f"the process ended ({worker.process.exitcode})")
                continue
            if not worker.done and now - worker.since > 60 + 3 * options.seconds:
                at = worker.go_on()  # in foreign code, which no alarm interrupts
                count(-1 if at is None else at, "?", "hung", "in code that cannot be interrupted")
        done = sum(c.total() for c in counts.values())
        if now - shown > options.every and done:
            shown, rate = now, done / (now - begun)
            left = (options.inputs - done) / rate
            print(
                f"{done} of {options.inputs}, {rate:.0f}/s, {left:.0f} s left, {len(bad)} bad",
                file=sys.stderr,
            )
    for worker in workers:
        worker.process.join()
    return counts, bad


def table(counts: dict[str, Counter[str]]) -> str:
    total: Counter[str] = sum(counts.values(), Counter())
    rows = [("reader", *VERDICTS)]
    rows += [
        (name, *(str(c[v]) for v in VERDICTS))
        for name, c in [*sorted(counts.items()), ("all", total)]
    ]
    return "\n".join(
        "  ".join(cell.rjust(16 if i == 0 else 9) for i, cell in enumerate(r)) for r in rows
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--inputs", type=int, default=200_000)
    add("--workers", type=int, default=os.cpu_count())
    add("--seed", type=int, default=0)
    add("--seconds", type=float, default=20.0, help="an input that takes longer hangs")
    add("--every", type=float, default=10.0, help="seconds between lines of progress")
    add("--only", type=int, metavar="N", help="run this input alone")
    add("--out", type=Path, help="file for the figures, as JSON")
    memory = "/dev/shm"
    add("--folder", default=memory if os.access(memory, os.W_OK) else None, help="for files")
    options = parser.parse_args()
    if options.only is not None:
        return only(options)
    begun = time.monotonic()
    counts, bad = fuzz(options)
    seconds = time.monotonic() - begun
    print(table(counts))
    figures = {
        "inputs": options.inputs,
        "seed": options.seed,
        "seconds": round(seconds, 1),
        "workers": options.workers,
        "python": sys.version.split()[0],
        "counts": {name: {v: c[v] for v in VERDICTS} for name, c in sorted(counts.items())},
        "bad": bad[:SHOWN],
    }
    print(json.dumps({**figures, "bad": len(bad)}))
    if options.out:
        options.out.write_text(json.dumps(figures, indent=2) + "\n")
    return 1 if bad else 0


def only(options: Any) -> int:
    from tests.fuzz.world import World, run

    folder = Path(tempfile.mkdtemp(prefix="fuzz-", dir=options.folder))
    try:
        print(run(World(folder), options.only, options.seed))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0
