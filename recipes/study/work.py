"""Steps of the study, and the processes that do them, some on each device."""

import dataclasses
import functools
import json
import os
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as processes

from controls import WithoutNearest, held_out, nearest_experts, random_pool
from data import PLACES
from phatgoose.evaluation import Evaluation, Inputs, RunSettings, make_methods, read_tasks
from phatgoose.evaluation.eval_tasks import EvalTask
from phatgoose.evaluation.methods import Base, Method, PerTask, Routed
from phatgoose.files import write_bytes, write_json
from phatgoose.models import load_base
from phatgoose.pool import ExpertPool
from phatgoose.pool.retrieval import ExampleIndex, build_index
from phatgoose.tasks import read_examples, split_file
from plan import GATES, Phase, experts_of
from settings import PARTS, of_size, variants

Index = Callable[[], ExampleIndex]
PROBE = 15  # examples a task that the oracle chooses by


@dataclass(frozen=True)
class Setting:
    """What every process knows."""

    out: Path
    base: str
    device: str | None
    limit: int | None  # examples a task, to try the study out
    rows: int | None
    tokens: int | None


@dataclass(frozen=True)
class Step:
    """Commands one after another, or a phase answered by a method ("": its results written)."""

    name: str
    rank: int
    needs: frozenset[str] = frozenset()  # names of steps
    commands: tuple[tuple[str, ...], ...] = ()
    phase: Phase | None = None
    method: str = ""
    makes: Path | None = field(default=None, compare=False)  # where this is, nothing is done


# ---------------------------------------------------------------- in a worker


class Worker:
    """Does steps on one device; keeps the base, and the last phases."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self._made: dict[str, tuple[Evaluation, Callable[[str], Method]]] = {}

    def do(self, step: Step) -> str | None:
        """Do a step; return what went wrong."""
        if step.phase is None:
            return self._run(step)
        name = step.phase.name
        if name not in self._made:
            while len(self._made) >= 2:
                del self._made[next(iter(self._made))]
            self._made[name] = self.evaluation(step.phase)
        evaluation, method = self._made[name]
        done = self.setting.out / "results" / name / "done"
        if step.method:
            evaluation.methods = [method(step.method)]
            evaluation.answer()
            failed = evaluation.failed.get(step.method)
            if failed is None:
                write_bytes(done / f"{step.method}.txt", b"")
            return failed
        names = list(step.phase.methods)
        ready = [m for m in names if (done / f"{m}.txt").exists()]
        if ready:
            evaluation.methods = [*map(method, ready)]
            evaluation.answer()
            late = {m: "not reached in the time given" for m in names if m not in ready}
            evaluation.finish(late, pictures=False)
            if step.phase.tasks == "heldout":  # the tasks whose skill no expert was trained on
                far = [task for task in evaluation.tasks if not task.contaminated]
                write_json(evaluation.out / "far.json", evaluation.summary(far))
            if step.phase.tasks == "contexts":  # by the place that a task has in its context
                places = {
                    place: [t for t in evaluation.tasks if t.name.endswith(place)]
                    for place in PLACES
                }
                found = {place: evaluation.summary(tasks) for place, tasks in places.items()}
                write_json(evaluation.out / "places.json", found)
        return None

    def _run(self, step: Step) -> str | None:
        log = self.setting.out / "logs" / f"{step.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            for command in step.commands:
                done = subprocess.run(command, stdout=file, stderr=file)
                if done.returncode:
                    return f"failed ({done.returncode}): {log.read_text(errors='replace')[-1500:]}"
        return None

    @functools.cached_property
    def base(self) -> tuple[Any, Any]:
        return load_base(self.setting.base, device=self.setting.device)

    def evaluation(self, phase: Phase) -> tuple[Evaluation, Callable[[str], Method]]:
        """A phase, and what makes its methods, each when its pool is there."""
        setting, (model, tokenizer) = self.setting, self.base
        pool = ExpertPool.load(experts_of(setting.out, phase.pool))
        out, data = setting.out / "results" / phase.name, setting.out / "data"
        limit = min(phase.limit, setting.limit or phase.limit)
        parent = next(path for path in (data / phase.tasks).iterdir() if path.is_dir())
        folders = [parent / name for name in phase.names] or [parent]
        tasks = read_tasks(folders, pool.names, model, tokenizer, limit=limit)
        index = functools.cache(functools.partial(self._index, pool, out))
        settings = RunSettings(
            limit=limit, tokens=setting.tokens, rows=setting.rows, progress=False
        )
        methods = [Base("base")]
        made = Evaluation(
            model, tokenizer, pool, methods=methods, tasks=tasks, out=out, settings=settings
        )
        return made, functools.cache(functools.partial(self._method, phase, pool, tasks, index))

    def _method(
        self, phase: Phase, pool: ExpertPool, tasks: Sequence[EvalTask], index: Index, name: str
    ) -> Method:
        if name in ("few", "random adapters") or name.startswith("without the nearest"):
            return self._control(name, pool, tasks, index)
        if name == "own" and phase.tasks == "contexts":
            chosen = {task.name: task.name.rpartition("_")[0] for task in tasks}
            return PerTask(name, roles=("heldout",), chosen=chosen)
        if name in GATES:
            gated = ExpertPool.load(experts_of(self.setting.out, name))
            return Routed(name, router="phatgoose", pool=gated)
        if name in PARTS:
            return of_size(name, pool)
        if phase.tasks == "validation":
            return next(each for each in variants() if each.name == name)
        [made], _ = make_methods([name], Inputs(pool, index=index, probe=PROBE))
        return made

    def _control(
        self, name: str, pool: ExpertPool, tasks: Sequence[EvalTask], index: Index
    ) -> Method:
        if name == "random adapters":
            return Routed(name, router="phatgoose", pool=random_pool(pool))
        if name == "few":
            few = ExpertPool.load(experts_of(self.setting.out, "few"))
            chosen = {task.name: task.name for task in tasks}
            return PerTask(name, roles=("heldout",), pool=few, chosen=chosen)
        router = f"phatgoose{name.removeprefix('without the nearest')}"
        nearest = functools.cache(lambda: nearest_experts(tasks, index(), *self.base))
        return held_out(WithoutNearest(name, router=router, nearest=nearest))

    def _index(self, pool: ExpertPool, out: Path) -> ExampleIndex:
        """The experts' training prompts, for retrieval."""
        folder = self.setting.out / "data" / "train" / "tasks"
        paths = {name: split_file(folder / name, "train") for name in pool.names}
        examples = {name: read_examples(path, limit=4000) for name, path in paths.items() if path}
        return build_index(examples, *self.base, cache=out)


def work(setting: Setting, inbox: Any, done: Any, number: int) -> None:
    """Do what comes, as long as there is who sends it."""
    os.setpgrp()  # so that what it started ends with it
    torch.set_num_threads(2)
    # Many processes on one GPU: cuDNN's attention has failed to start there.
    torch.backends.cuda.enable_cudnn_sdp(False)
    worker, parent = Worker(setting), os.getppid()
    while os.getppid() == parent:
        try:
            step = inbox.get(timeout=5)
        except queue.Empty:
            continue
        started = time.monotonic()
        try:
            wrong = worker.do(step)
        except Exception as error:  # of memory, mostly: the next call tries again
            wrong = f"{type(error).__name__}: {error}"
            worker = Worker(setting)
        torch.cuda.empty_cache()  # others share the GPU
        done.put((number, step.name, time.monotonic() - started, wrong))


# ---------------------------------------------------------------- the scheduler


class Workers:
    """Processes that do steps, those of lower rank first, as soon as what they need is done."""

    def __init__(self, setting: Setting, each: int) -> None:
        context = processes.get_context("spawn")
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        gpus = [gpu for gpu in gpus if gpu] or [str(n) for n in range(torch.cuda.device_count())]
        self.inboxes, self.done, self.processes = [], context.Queue(), []
        for number in range(each * max(1, len(gpus))):
            if gpus:
                os.environ["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]
            inbox = context.Queue()
            arguments = (setting, inbox, self.done, number)
            process = context.Process(target=work, args=arguments, daemon=False)
            process.start()
            self.inboxes.append(inbox)
            self.processes.append(process)
        self.last: dict[int, str] = {}  # phase of each worker

    def run(self, steps: Sequence[Step], setting: Setting, end: float) -> Iterator[str]:
        """Do steps until `end`; yield the name of each as it is done."""
        done = {step.name for step in steps if step.makes and step.makes.exists()}
        waiting = {step.name: step for step in steps if step.name not in done}
        busy: dict[int, Step] = {}
        written: dict[str, float] = {}  # phases: when their results were
        started = time.monotonic()
        while (waiting or busy) and time.monotonic() < end:
            alive = [n for n, process in enumerate(self.processes) if process.is_alive()]
            for number in set(busy) - set(alive):
                step = busy.pop(number)
                print(f"{step.name}: the process that did it died", file=sys.stderr)
            for number in alive:
                if number not in busy and (step := self._next(waiting, done, number)):
                    del waiting[step.name]
                    busy[number] = step
                    self.last[number] = step.phase.name if step.phase else ""
                    self.inboxes[number].put(step)
            if not busy:
                break  # what is left needs what failed
            try:
                number, name, seconds, wrong = self.done.get(timeout=0.5)
            except queue.Empty:
                continue
            step = busy.pop(number)
            told = {"at": round(time.monotonic() - started, 1), "step": name}
            told |= {"seconds": round(seconds, 1), "worker": number, "wrong": wrong}
            print(json.dumps(told), file=sys.stderr, flush=True)
            with (setting.out / "steps.jsonl").open("a") as log:
                log.write(json.dumps(told) + "\n")
            if wrong is None:
                done.add(name)
                if step.makes:
                    write_bytes(step.makes, b"")
                if step.phase and step.method:
                    self._write_results(step, waiting, busy, written)
                yield name

    def _next(self, waiting: Mapping[str, Step], done: set[str], number: int) -> Step | None:
        """The ready step of lowest rank; of equals, one of the phase that the worker knows."""
        ready = [step for step in waiting.values() if step.needs <= done]

        def order(step: Step) -> tuple[int, bool]:
            return step.rank, not (step.phase and self.last.get(number) == step.phase.name)

        return min(ready, key=order, default=None)

    def _write_results(
        self,
        step: Step,
        waiting: dict[str, Step],
        busy: Mapping[int, Step],
        written: dict[str, float],
    ) -> None:
        """Have a phase's results written, when all is answered or it was long ago."""
        assert step.phase
        same = [*waiting.values(), *busy.values()]
        left = [s for s in same if s.phase and s.phase.name == step.phase.name and s.method]
        now, name = time.monotonic(), f"{step.phase.name} results"
        if name in waiting or (left and now - written.get(name, 0.0) < 30):
            return
        written[name] = now
        waiting[name] = dataclasses.replace(
            step, name=name, rank=step.rank - 1, method="", makes=None
        )

    def stop(self) -> None:
        for process in self.processes:
            with suppress(ProcessLookupError):  # it has ended, or no group of its own yet
                os.killpg(process.pid or 0, signal.SIGKILL)
            process.kill()
