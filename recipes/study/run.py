"""The study: pools of experts of the default base, by every method; resumable, on all GPUs.

    python recipes/study/run.py --data DATA --out out/study [--seconds 600]

DATA holds tasks/NAME/{train,validation,test}.jsonl, heldout/NAME/test.jsonl and INDEX.json. OUT
receives

    data/           seeded parts of DATA
    pools/NAME      the experts of each pool of plan.py
    results/NAME    the results of each phase of plan.py, and every answer
    steps.jsonl     what was done, and how long it took; logs/ and memory/ of what was trained

Steps of lower rank are done first. What is done is left alone, so the same command goes on after
an interrupt, or after --seconds are over; results.json of a phase then holds the methods that were
reached. recipes/study/write.py makes docs/study.md of it.
"""

import argparse
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from data import prepare
from phatgoose.models import SMOLLM2
from plan import GATES, Pool, experts_of, phases, pools
from settings import PARTS, variants
from work import Setting, Step, Workers

MEASURED = Path(__file__).with_name("measured.py")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", type=Path, help="the task collection; not needed once OUT/data is there")
    add("--out", type=Path, default=Path("out/study"))
    add("--base", default=SMOLLM2)
    add("--each", type=int, default=4, help="processes on each device")
    add("--seconds", type=float, default=float("inf"), help="stop after this long")
    add("--rank", type=int, default=100, help="leave out steps of a higher rank")
    add("--device", help="cpu, cuda, ... (an accelerator if there is one)")
    add("--rows", type=int, help="prompts per batch of generation")
    add("--tokens", type=int, help="tokens per batch of ranking")
    add("--limit", type=int, help="examples a task at most, to try the study out")
    add("--training", default="", help="more options of training, likewise")
    add("--prepare", action="store_true", help="make OUT/data alone")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    end = time.monotonic() + args.seconds
    args.out = args.out.resolve()
    if args.data:
        prepare(args.data.resolve(), args.out / "data")
    if args.prepare:
        return 0
    setting = Setting(args.out, args.base, args.device, args.limit, args.rows, args.tokens)
    steps = [step for step in [*training(args), *answering(args)] if step.rank <= args.rank]
    workers = Workers(setting, args.each)
    try:
        for _ in workers.run(steps, setting, end):
            pass
    finally:
        workers.stop()
    return 0


def training(args: argparse.Namespace) -> Iterator[Step]:
    """Each pool's parts; a pool that takes another's adapters waits for them."""
    made = {pool.name: pool for pool in pools()}
    for pool in made.values():
        parent = args.out / "data" / pool.tasks / "tasks"
        names = pool.names or [path.name for path in parent.iterdir() if path.is_dir()]
        for number, folders in enumerate(alike([parent / name for name in names], pool.parts)):
            part = args.out / "pools" / pool.name / f"part-{number}"
            make = gating if pool.gates_of else adapting
            yield Step(
                f"{pool.name} part {number}",
                pool.rank,
                frozenset(part_steps(made[pool.gates_of]) if pool.gates_of else ()),
                commands=tuple(make(args, pool, part, folders)),
                makes=args.out / "done" / f"{pool.name}-{number}.txt",
            )


def alike(folders: Sequence[Path], count: int) -> list[list[str]]:
    """Tasks in parts of about the same work and of like lengths, the longest first."""
    long = {folder: mean_length(folder / "train.jsonl") for folder in folders}
    parts: list[list[str]] = [[] for _ in range(count)]
    total, taken = sum(long.values()), 0.0
    for folder in sorted(folders, key=lambda folder: (-long[folder], folder.name)):
        middle = (taken + long[folder] / 2) / total
        parts[min(count - 1, int(middle * count))].append(str(folder))
        taken += long[folder]
    return parts


def mean_length(path: Path) -> float:
    lines = path.read_text(encoding="utf-8").splitlines()
    return sum(map(len, lines)) / len(lines)


def part_steps(pool: Pool) -> list[str]:
    return [f"{pool.name} part {number}" for number in range(pool.parts)]


def adapting(
    args: argparse.Namespace, pool: Pool, part: Path, folders: Sequence[str]
) -> Iterator[tuple[str, ...]]:
    common = ["--base", args.base, "--max-length", "384", *device(args)]
    memory = args.out / "memory" / f"{pool.name}-{part.name}.json"
    command = [sys.executable, str(MEASURED), str(memory), "experts", "train", "--out", str(part)]
    command += ["--tasks", *folders, *common, "--together", "8", "--save-dtype", "bfloat16"]
    command += ["--bf16", *pool.settings.split(), *args.training.split()]
    yield tuple(command)
    if pool.signatures:
        command = [sys.executable, "-m", "phatgoose.cli", "experts", "derive", str(part)]
        yield (*command, "--tasks", *folders, *common, "--batch-size", "64")


def gating(
    args: argparse.Namespace, pool: Pool, part: Path, folders: Sequence[str]
) -> Iterator[tuple[str, ...]]:
    copy = "from run import copy_adapters; import sys; copy_adapters(*sys.argv[1:])"
    path = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); "
    yield (sys.executable, "-c", path + copy, str(args.out), pool.gates_of, str(part))
    command = [sys.executable, "-m", "phatgoose.cli", "experts", "gate", str(part)]
    command += ["--tasks", *folders, "--base", args.base, "--max-length", "384", "--bf16"]
    command += ["--together", "4" if "64" in pool.settings else "8", *pool.settings.split()]
    yield (*command, *device(args))


def copy_adapters(out: str, pool: str, part: str) -> None:
    """A pool's adapters without what routers need; what is there is left alone."""
    for folder in experts_of(Path(out), pool):
        target = Path(part) / folder.name
        if not target.exists():
            shutil.copytree(folder, target, ignore=shutil.ignore_patterns("phatgoose_*"))


def answering(args: argparse.Namespace) -> Iterator[Step]:
    """Each phase by each of its methods, once its pools are there."""
    made = {pool.name: pool for pool in pools()}
    for phase in phases(*variant_ranks()):
        for method, rank in phase.methods.items():
            needed = [phase.pool]
            needed += [method] if method in made else []
            yield Step(
                f"{phase.name}: {method}",
                rank,
                frozenset(step for pool in needed for step in part_steps(made[pool])),
                phase=phase,
                method=method,
                makes=args.out / "results" / phase.name / "done" / f"{method}.txt",
            )


def variant_ranks() -> tuple[dict[str, int], dict[str, int]]:
    """The variants to choose from, and when they are asked: on the small pool and the large."""
    names = [method.name for method in variants()]
    chosen = dict.fromkeys(names, 7) | dict.fromkeys(PARTS, 7) | dict.fromkeys(GATES, 8)
    fewer = [n for n in names if "evidence" in n or n in ("base", "own", "phatgoose")]
    fewer += ["top_k 1", "top_k 4", "unit scale, top_k 1", "not standardised"]
    return chosen, dict.fromkeys(fewer, 11)


def device(args: argparse.Namespace) -> list[str]:
    return ["--device", args.device] if args.device else []


if __name__ == "__main__":
    sys.exit(main())
