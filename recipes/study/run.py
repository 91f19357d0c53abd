"""The study: every method on two pools, over all tasks; resumable, on all GPUs there are.

    python recipes/study/run.py --data DATA --text TEXT --out out/study

DATA holds tasks/NAME/{train,validation,test}.jsonl, heldout/NAME/test.jsonl and INDEX.json; TEXT
holds .txt or .txt.xz files to pretrain the larger base on. `--step` does one step alone:

    base, experts, rest   build the larger pool, and what both pools need beside gates
    choose                variants of the recipe, on the experts' validation sets and every other
                          held-out task
    report                all methods, on the experts' test sets and all held-out tasks
    write                 docs/study.md and its figures

`--seconds` bounds it all: report, which comes first, and choose end then; what was not reached is
left out of their tables, and is done by the next call.
"""

import argparse
import functools
import json
import os
import queue
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as processes

from build import GATE_STEPS, build_base, build_pools
from phatgoose.default import tiny
from phatgoose.evaluation import Evaluation, Inputs, RunSettings, make_methods, read_tasks
from phatgoose.evaluation.methods import Afterwards, Method
from phatgoose.files import write_json
from phatgoose.models import load_base
from phatgoose.pool import ExpertPool
from phatgoose.pool.retrieval import build_index
from phatgoose.tasks import read_examples, split_file
from settings import METHODS, sub_pools, variants, with_gates_of

STEPS = ("base", "experts", "rest", "choose", "report", "write")
POOLS = ("default", "large")
Phase = tuple[str, str]  # of POOLS, and "choose" or "report"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder of tasks, heldout and INDEX.json")
    add("--text", type=Path, help="folder of text for the larger base")
    add("--out", type=Path, default=Path("out/study"))
    add("--step", choices=STEPS, nargs="+", default=STEPS)
    add("--pools", choices=POOLS, nargs="+", default=POOLS)
    add("--minutes", type=float, default=7, help="of pretraining")
    add("--steps", type=int, default=700, help="of each expert's adapter")
    add("--gate-steps", type=int, default=100)
    add("--multitask-steps", type=int, default=2000)
    add("--batch", type=int, default=12, help="examples of an expert in a step")
    add("--each", type=int, default=4, help="processes on each device that train")
    add("--answering", type=int, help="processes on each device that answer; default: as many")
    add("--limit", type=int, default=100, help="examples a task in report")
    add("--choose-limit", type=int, default=50, help="examples a task in choose")
    add("--probe", type=int, default=30, help="examples a task that oracles choose by")
    add("--seconds", type=float, default=float("inf"), help="from now to the end of answering")
    add("--tokens", type=int, help="tokens per batch of ranking")
    add("--rows", type=int, help="prompts per batch of generation")
    add("--docs", type=Path, default=Path("docs"), help="where study.md goes")
    args = parser.parse_args(argv)
    args.answering, args.end = args.answering or args.each, time.monotonic() + args.seconds
    args.data, args.out = args.data.resolve(), args.out.resolve()
    return args


def folders_of(args: argparse.Namespace, pool: str) -> tuple[Path, list[Path]]:
    """The pool's base and its experts."""
    base = tiny.BASE if pool == "default" else args.out / "large" / "base"
    experts = args.out / pool / "experts"
    return base, sorted(path for path in experts.iterdir() if path.is_dir())


def make_evaluation(
    args: argparse.Namespace, pool: str, phase: str, device: str | None, names: Sequence[str] | None
) -> Evaluation:
    """The evaluation of a phase, of these methods alone if named; the same in every process."""
    base, folders = folders_of(args, pool)
    model, tokenizer = load_base(base, device=device)
    experts = ExpertPool.load(folders)
    report = phase == "report"
    limit = args.limit if report else args.choose_limit
    out = args.out / pool / phase
    sources = task_sources(args, experts.names, phase)
    tasks = read_tasks(sources, experts.names, model, tokenizer, limit=limit)
    if report:
        inputs = Inputs(
            experts,
            index=functools.partial(make_index, args, experts.names, model, tokenizer, out),
            multitask=args.out / pool / "multitask",
            probe=args.probe,
        )
        methods, _ = make_methods(METHODS, inputs)
    else:
        methods = [*variants(experts), *sub_pools(experts)]
        if pool == "default":
            for steps in GATE_STEPS:
                gated = sorted((args.out / pool / f"gates-{steps}").glob("[!.]*/"))
                methods.append(with_gates_of(gated, str(steps)))
    methods = [method for method in methods if names is None or method.name in names]
    settings = RunSettings(limit=limit, tokens=args.tokens, rows=args.rows, progress=False)
    return Evaluation(
        model, tokenizer, experts, methods=methods, tasks=tasks, out=out, settings=settings
    )


def task_sources(args: argparse.Namespace, experts: Sequence[str], phase: str) -> list[Path]:
    """The task folders of a phase.

    To choose: the experts' validation sets, and the held-out tasks of even place by name.
    """
    heldout = sorted((args.data / "heldout").iterdir())
    if phase == "report":
        return [*(args.data / "tasks" / name for name in experts), *heldout]
    validation = args.out / "validation"
    for name in experts:
        path = split_file(args.data / "tasks" / name, "validation")
        assert path is not None
        link = validation / "tasks" / name / path.name.replace("validation", "test")
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.exists():
            link.symlink_to(path)
    index = json.loads((args.data / "INDEX.json").read_text())
    write_json(validation / "INDEX.json", index)
    return [*(validation / "tasks" / name for name in experts), *heldout[::2]]


def make_index(
    args: argparse.Namespace, names: Sequence[str], model: Any, tokenizer: Any, out: Path
) -> Any:
    """The experts' training prompts, for retrieval."""
    paths = {name: split_file(args.data / "tasks" / name, "train") for name in names}
    examples = {name: read_examples(path, limit=4000) for name, path in paths.items() if path}
    return build_index(examples, model, tokenizer, cache=out)


# ---------------------------------------------------------------- processes


def work(args: argparse.Namespace, device: str, todo: Any, done: Any) -> None:
    """Do jobs of evaluations until there are none."""
    torch.set_num_threads(2)
    # Many processes on one GPU: cuDNN's attention has failed to start there.
    torch.backends.cuda.enable_cudnn_sdp(False)
    made: dict[Phase, Evaluation] = {}
    while (task := todo.get()) is not None:
        phase, job = task
        if phase not in made:
            made = {phase: make_evaluation(args, *phase, device, None)}  # the last one is done
        started = time.monotonic()
        try:
            made[phase].do(job)
        except Exception as error:  # of memory, mostly: the next call tries again
            print(f"{' '.join(phase)}: {job}: {error!r}", file=sys.stderr, flush=True)
            continue
        finally:
            torch.cuda.empty_cache()  # others share the GPU
        done.put((phase, job, time.monotonic() - started))


def answer(args: argparse.Namespace, phases: Sequence[Phase]) -> None:
    """Answer phases in several processes, the first ones first, and write the results of each."""
    started = time.monotonic()
    context = processes.get_context("spawn")
    todo, done = context.Queue(), context.Queue()
    on = [f"cuda:{index}" for index in range(torch.cuda.device_count())] or ["cpu"]
    workers = [
        context.Process(target=work, args=(args, device, todo, done))
        for _ in range(args.answering)
        for device in on
    ]
    for worker in workers:
        worker.start()
    evaluations = {phase: make_evaluation(args, *phase, on[0], None) for phase in phases}
    jobs = {phase: evaluation.jobs() for phase, evaluation in evaluations.items()}
    for task in [(phase, job) for phase in phases for job in jobs[phase]] + [None] * len(workers):
        todo.put(task)
    finished: dict[Phase, set[str]] = {phase: set() for phase in phases}
    while any(worker.is_alive() for worker in workers) or not done.empty():
        if time.monotonic() > args.end:
            break
        try:
            phase, job, seconds = done.get(timeout=0.5)
        except queue.Empty:
            continue
        finished[phase].add(job)
        now, rate = time.monotonic() - started, jobs[phase][job] / max(seconds, 1e-3)
        print(
            f"{now:.0f} s: {' '.join(phase)}: {job} in {seconds:.0f} s, {rate:.0f} examples/s, "
            f"{len(finished[phase])}/{len(jobs[phase])}",
            file=sys.stderr,
            flush=True,
        )
        if len(finished[phase]) == len(jobs[phase]):  # while the others work on the next
            finish(args, phase, evaluations.pop(phase), finished[phase])
    for worker in workers:
        worker.kill()
    for phase, evaluation in evaluations.items():
        finish(args, phase, evaluation, finished[phase])


def finish(
    args: argparse.Namespace, phase: Phase, evaluation: Evaluation, finished: set[str]
) -> None:
    """Write the results of the methods whose jobs are finished."""
    jobs = evaluation.jobs()
    reached = [m.name for m in evaluation.methods if needs(m, jobs) <= finished]
    late = {
        m.name: "not reached in the time given" for m in evaluation.methods if m.name not in reached
    }
    evaluation.methods = [m for m in evaluation.methods if m.name in reached]
    if not reached:
        print(f"{' '.join(phase)}: no method was finished. Give more --seconds.", file=sys.stderr)
        return
    evaluation.answer()
    evaluation.finish(late, pictures=False)
    # What settings were not chosen on: the experts' test sets, and every other held-out task.
    heldout = [task for task in evaluation.tasks if task.role == "heldout"]
    own = [task for task in evaluation.tasks if task.role == "own"]
    unseen = {path.name for path in sorted((args.data / "heldout").iterdir())[1::2]}
    if phase[1] == "report":
        half = evaluation.summary([*own, *(task for task in heldout if task.name in unseen)])
        write_json(evaluation.out / "unseen-half.json", half)


def needs(method: Method, jobs: dict[str, int]) -> set[str]:
    """The jobs without which a method has no score."""
    if not isinstance(method, Afterwards):
        return {method.name}
    suffix = f" on {method.probe or 'all'}"
    return {job for job in jobs if job.startswith("single:") and job.endswith(suffix)}


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if "large" in args.pools and "base" in args.step:
        build_base(args)
    build_pools(args, args.pools, args.step)
    steps = [step for step in ("report", "choose") if step in args.step]
    if steps:
        answer(args, [(pool, step) for step in steps for pool in args.pools])
    if "write" in args.step:
        from write import write

        write(args.out, args.docs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
