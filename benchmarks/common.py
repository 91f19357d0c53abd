"""What the benchmarks share: timing, peak memory, ceilings, versions, and results that survive."""

import argparse
import gc
import importlib.metadata
import json
import math
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile

import phatgoose
from phatgoose.files import write_json

MIB = 1 << 20
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
Run = Callable[[], Any]
Spread = dict[str, float]  # p20, p50 and p80, microseconds

# ---------------------------------------------------------------- options


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options every benchmark has."""
    options = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--device", choices=("cpu", "cuda"), default=default_device())
    options.add_argument("--out", type=Path, help="also write the results to this file")
    options.add_argument("--commit", help="what to record where git does not tell")
    options.add_argument(
        "--budget", type=float, default=math.inf, help="seconds after which no new row is begun"
    )
    return options


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def say(*words: Any) -> None:
    """Progress, to stderr."""
    print(*words, file=sys.stderr, flush=True)


# ---------------------------------------------------------------- results


class Results:
    """Rows of a benchmark: printed as a table and written to a file as they come.

    `columns` maps a title to what the table shows of a row.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        name: str,
        unit: str,
        columns: Mapping[str, Callable[[dict[str, Any]], str]],
        **head: Any,
    ) -> None:
        self.head = {
            "benchmark": name,
            "unit": unit,
            **versions(args.device, args.commit),
            "command": command(),
            **head,
        }
        self.rows: list[dict[str, Any]] = []
        self._columns = columns
        self._widths: list[int] = []
        self._out = args.out
        self._start = time.perf_counter()
        self._budget = args.budget
        gc.freeze()  # capturing a graph collects garbage; let it not look at all of torch

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        cells = [show(row) for show in self._columns.values()]
        if not self._widths:
            pairs = zip(self._columns, cells, strict=True)
            self._widths = [max(8, len(title), len(cell)) for title, cell in pairs]
            print(self._line(self._columns))
        print(self._line(cells), flush=True)
        self.save()

    def spent(self) -> bool:
        """Whether the time for this run is used up."""
        return time.perf_counter() - self._start > self._budget

    def save(self) -> None:
        """Write what there is, so that a run that is stopped leaves it."""
        if self._out:
            write_json(self._out, self.value())

    def value(self) -> dict[str, Any]:
        seconds = round(time.perf_counter() - self._start, 1)
        return {**self.head, "seconds": seconds, "rows": self.rows}

    def finish(self) -> dict[str, Any]:
        """Print the one JSON line and return what it says."""
        self.save()
        value = self.value()
        print(json.dumps(value))
        return value

    def _line(self, cells: Iterable[str]) -> str:
        return " ".join(cell.rjust(width) for cell, width in zip(cells, self._widths, strict=True))


def command() -> str:
    """How this run was called, without the place its results went to."""
    words = ["benchmarks/" + Path(sys.argv[0]).name]
    given = iter(sys.argv[1:])
    for word in given:
        if word in ("--out", "--commit"):
            next(given, None)
        elif not word.startswith(("--out=", "--commit=")):
            words.append(word)
    return "python " + " ".join(words)


def versions(device: str, commit: str | None = None) -> dict[str, Any]:
    """The device, and the versions of what ran on it."""
    found = {}
    for package in ("torch", "triton", "transformers", "peft"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        **found,
        "phatgoose": phatgoose.__version__,
        "python": platform.python_version(),
        "commit": commit or _commit(),
    }


def _processor() -> str:
    known = Path("/proc/cpuinfo")
    lines = known.read_text(encoding="utf-8").splitlines() if known.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def _commit() -> str:
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        found = subprocess.run(
            [*git, "describe", "--always", "--dirty", "--exclude=*"],
            capture_output=True,
            text=True,
            check=False,
        ).stdout.strip()
    except OSError:
        return "unknown"
    return found or "unknown"


# ---------------------------------------------------------------- time


def measure(
    runs: Mapping[str, Run], device: str, *, calls: int = 1, seconds: float = 0.3
) -> dict[str, Spread]:
    """Microseconds of each run, divided by `calls`, the calls that one run makes.

    Runs take turns, so that a clock that drifts does so for all of them. On a GPU between events,
    without waiting for a run before the next is launched. One that does not fit is left out.
    """
    block = _cuda_block if device == "cuda" else _cpu_block
    counts = {}
    for name, run in runs.items():
        try:
            run()
            once = min(block(run, 1))
            if once < 1e5:
                once = max(1e-3, sorted(block(run, 3))[1])
        except torch.OutOfMemoryError:
            free_memory(device)
            continue
        counts[name] = max(1, min(40, math.ceil(seconds * 1e6 / once / ROUNDS)))
    found: dict[str, list[float]] = {name: [] for name in counts}
    for _ in range(ROUNDS):
        for name, count in counts.items():
            found[name] += block(runs[name], count)
    return {name: spread(values, calls) for name, values in found.items()}


ROUNDS = 5


def _cuda_block(run: Run, count: int) -> list[float]:
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for start, end in events:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) * 1e3 for start, end in events]


def _cpu_block(run: Run, count: int) -> list[float]:
    found = []
    for _ in range(count):
        start = time.perf_counter()
        run()
        found.append((time.perf_counter() - start) * 1e6)
    return found


def spread(values: list[float], calls: int = 1) -> Spread:
    """p20, p50 and p80 of `values`, each divided by `calls`."""
    ordered = torch.tensor(values, dtype=torch.float64) / calls
    points = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    found = [round(value, 3) for value in ordered.quantile(points).tolist()]
    return dict(zip(("p20", "p50", "p80"), found, strict=True))


def why_not(error: Exception) -> str:
    """What a row says in place of a time; raises where the device cannot go on either."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    if isinstance(error, getattr(torch, "AcceleratorError", ())):
        raise error
    traceback.print_exception(error)
    return f"failed: {type(error).__name__}"


class NotCapturableError(Exception):
    """A run waits for the device, so no CUDA graph can hold it."""


def capture(run: Run) -> Run:
    """A CUDA graph of `run`, as a run of its own. Raises NotCapturableError."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
        torch.cuda.synchronize()
        # Found out before capturing: a capture that fails leaves allocator and random numbers in a
        # bad state. Models that spare themselves what a graph cannot hold are told that it is one.
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            with mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: True):
                run()
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise NotCapturableError(str(error).splitlines()[0]) from None
        finally:
            torch.cuda.set_sync_debug_mode(before)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


# ---------------------------------------------------------------- memory


def peak(run: Run, device: str, forget: Run | None = None) -> int:
    """Bytes held at the highest point of `run`, above what was there when it began.

    `forget` is run before, to let go of what is kept from one run to the next.

    As they were asked for: what a GPU's allocator hands out, up to 1 MiB more at a time, depends on
    what it handed out before.
    """
    if device == "cuda":
        run()  # libraries allocate their workspaces at first use
    if forget is not None:
        forget()
    if device != "cuda":
        return _cpu_peak(run)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    run()
    torch.cuda.synchronize()
    return torch.cuda.memory_stats()["requested_bytes.all.peak"] - before


def _cpu_peak(run: Run) -> int:
    """Sums up what torch's allocator hands out and takes back, also inside an operator."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    return highest


def allocated(device: str) -> int:
    """Bytes of all tensors on a GPU; 0 on a CPU, which does not tell."""
    return torch.cuda.memory_allocated() if device == "cuda" else 0


def free_memory(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


# ---------------------------------------------------------------- ceilings


def ceilings(device: str, dtype: torch.dtype) -> dict[str, float]:
    """What this device does at best: FLOP/s of a big product, bytes/s of a copy, both ways."""
    size = 8192 if device == "cuda" else 1024
    x, y = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    product = measure({"": lambda: x @ y}, device)[""]["p50"]
    source = torch.empty((1 << 30) if device == "cuda" else (1 << 26), device=device).fill_(1)
    target = torch.empty_like(source)
    copy = measure({"": lambda: target.copy_(source)}, device)[""]["p50"]
    found = {
        "matmul_flops_per_s": 2 * size**3 / product * 1e6,
        "copy_bytes_per_s": 2 * source.nbytes / copy * 1e6,
    }
    del x, y, source, target
    free_memory(device)
    say(
        f"ceilings: {found['matmul_flops_per_s'] / 1e12:.2f} TFLOP/s ({size}^3, {dtype}),"
        f" {found['copy_bytes_per_s'] / 1e12:.3f} TB/s read and written by a copy"
    )
    return found
