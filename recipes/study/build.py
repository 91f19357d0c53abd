"""The study's pools: the one in the package, and a larger one on a larger base.

Every step leaves alone what is there, so an interrupted build goes on.
"""

import json
import random
import shutil
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path

from jobs import devices, run_all
from phatgoose.default import tiny
from phatgoose.experts.kinds import KINDS
from phatgoose.files import write_bytes
from phatgoose.tasks import read_examples, split_file

RECIPES = Path(__file__).parent.parent
PACKAGED = tiny.BASE.parent / "experts"
PHATGOOSE = (sys.executable, "-m", "phatgoose.cli")
DONE = "phatgoose_gates.safetensors"  # what `phatgoose train` writes last
MEASURED = ("average_activation", "prompt_mean")
GATE_STEPS = (10, 30, 100, 300)
LARGE_BASE = (
    "--hidden 512 --layers 8 --heads 8 --kv-heads 8 --intermediate 1408 --lr 2.5e-3".split()
)
Job = tuple[str, list[str]]  # its name and its command
ROUGHLY = 1500  # training examples of each task that the multitask adapter sees


def build_base(args: Namespace) -> None:
    """Pretrain the larger base on text."""
    base = args.out / "large" / "base"
    if (base / "model.safetensors").exists():
        return
    on = devices()
    command = [sys.executable, "-m", "torch.distributed.run", "--master-addr", "127.0.0.1"]
    command += ["--master-port", 29511, "--nproc-per-node", len(on)]
    command += [RECIPES / "pretrain.py", args.text, base, "--tokenizer", tiny.BASE]
    command += ["--minutes", args.minutes, "--resume", *LARGE_BASE]
    run_all([("base", [*map(str, command)])], logs=args.out / "logs", each=1, on=[",".join(on)])


def build_pools(args: Namespace, pools: Sequence[str], steps: Sequence[str]) -> None:
    """The larger pool's experts, and what both pools need beside gates, side by side."""
    rest_of = pools if "rest" in steps else ()
    commands = [*gates(args)] if "default" in rest_of else []  # longest first
    if "large" in pools and "experts" in steps:
        commands += experts(args)
    if "default" in rest_of:
        commands += rest(args, "default")
    run_all(commands, logs=args.out / "logs", each=args.each, on=devices())
    large = args.out / "large"
    for folder in sorted((large / "parts").glob("*/[!.]*")):
        (large / "experts").mkdir(exist_ok=True)
        folder.rename(large / "experts" / folder.name)
    if "large" in rest_of:
        run_all([*rest(args, "large")], logs=args.out / "logs", each=args.each, on=devices())


def experts(args: Namespace) -> Iterator[Job]:
    """An expert for every task, a few in one pass over the base; and one for all tasks together."""
    large, on = args.out / "large", devices()
    names = [n for n in by_length(args.data / "tasks") if not (large / "experts" / n).exists()]
    alone = not (large / "multitask" / DONE).exists()  # one of the processes is for that
    count = max(1, min(len(names), args.each * len(on) - alone))
    groups = [names[k * len(names) // count : (k + 1) * len(names) // count] for k in range(count)]
    if alone:
        yield multitask(args, "large", large / "base")
    for number, group in enumerate(groups):
        tasks = [str(args.data / "tasks" / name) for name in group]
        command = [*PHATGOOSE, "experts", "train", "--tasks", *tasks, "--base", large / "base"]
        command += ["--out", large / "parts" / str(number), "--bf16", "--save-dtype", "bfloat16"]
        command += ["--steps", args.steps, "--batch-size", args.batch, "--learning-rate", "2e-3"]
        command += ["--gate-batch-size", args.batch, "--gate-steps", args.gate_steps]
        command += ["--max-length", 512, "--dropout", 0.05]
        yield f"experts-{number}", [*map(str, command)]


def rest(args: Namespace, pool: str) -> Iterator[Job]:
    """The multitask adapter, and the experts' signatures."""
    folder = args.out / pool
    if pool == "default" and not (folder / "experts").exists():
        shutil.copytree(PACKAGED, folder / "experts")
    base = tiny.BASE if pool == "default" else folder / "base"
    if not (folder / "multitask" / DONE).exists():
        yield multitask(args, pool, base)
    found = sorted(p for p in (folder / "experts").iterdir() if p.is_dir())
    found = [p for p in found if not all((p / KINDS[kind].file).exists() for kind in MEASURED)]
    count = min(len(found), args.each * len(devices()))
    for number in range(count):
        command = [*PHATGOOSE, "experts", "derive", *found[number::count]]
        command += ["--base", base, "--tasks", args.data / "tasks", "--max-length", 512]
        command += ["--batch-size", 64]
        yield f"derive-{pool}-{number}", [*map(str, command)]


def multitask(args: Namespace, pool: str, base: Path) -> Job:
    """One adapter trained on the union of the data of the pool's experts."""
    folder = args.out / pool
    shutil.rmtree(folder / "multitask", ignore_errors=True)
    found = folder / "experts" if pool == "default" else args.data / "tasks"
    names = sorted(path.name for path in found.iterdir() if path.is_dir())
    union = write_union(args, names, folder / "union.jsonl")
    command = [*PHATGOOSE, "train", "--data", union, "--base", base, "--gate-steps", 1]
    command += ["--out", folder / "multitask", "--rank", 32, "--alpha", 64, "--bf16"]
    command += ["--steps", args.multitask_steps, "--batch-size", 64, "--max-length", 512]
    command += ["--learning-rate", "2e-3", "--gate-batch-size", 16, "--save-dtype", "bfloat16"]
    return f"multitask-{pool}", [*map(str, command)]


def gates(args: Namespace) -> Iterator[Job]:
    """Gates of the default pool, trained anew for several numbers of steps, most first."""
    for steps in sorted(GATE_STEPS, reverse=True):
        folder = args.out / "default" / f"gates-{steps}"
        if not folder.exists():
            leave = shutil.ignore_patterns("phatgoose_*")
            shutil.copytree(PACKAGED, folder, ignore=leave)
        command = [*PHATGOOSE, "experts", "gate", folder, "--base", tiny.BASE, "--bf16"]
        command += ["--tasks", args.data / "tasks", "--gate-steps", steps, "--max-length", 512]
        command += ["--gate-batch-size", 32, "--batch-size", 32]
        yield f"gates-{steps}", [*map(str, command)]


def by_length(tasks: Path) -> list[str]:
    """Task names, shortest examples first, so that a batch of several pads little."""

    def mean(folder: Path) -> float:
        path = split_file(folder, "train")
        assert path is not None
        rows = read_examples(path, limit=100)
        return sum(len(row.prompt) + len(row.target) for row in rows) / len(rows)

    return [path.name for path in sorted(tasks.iterdir(), key=mean) if path.is_dir()]


def write_union(args: Namespace, names: Sequence[str], path: Path) -> Path:
    """The training examples of these tasks, shuffled, into one file."""
    lines = []
    for name in names:
        source = split_file(args.data / "tasks" / name, "train")
        assert source is not None
        for row in read_examples(source, limit=ROUGHLY):
            example = {"prompt": row.prompt, "completion": row.target}
            lines.append(json.dumps(example, ensure_ascii=False))
    random.Random(0).shuffle(lines)
    write_bytes(path, ("\n".join(lines) + "\n").encode())
    return path
