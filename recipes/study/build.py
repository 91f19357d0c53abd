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
from phatgoose import default
from phatgoose.experts.signatures import file_name
from phatgoose.files import write_bytes
from phatgoose.tasks import read_examples, split_file

RECIPES = Path(__file__).parent.parent
PACKAGED = default.BASE.parent / "experts"
PHATGOOSE = (sys.executable, "-m", "phatgoose.cli")
DONE = "phatgoose_config.json"  # what `phatgoose train` writes last
MEASURED = ("average_activation", "prompt_mean")
GATE_STEPS = (10, 30, 100, 300)
LARGE_BASE = (
    "--hidden 512 --layers 8 --heads 8 --kv-heads 8 --intermediate 1408 --lr 2.5e-3".split()
)
ROUGHLY = 1500  # training examples of each task that the multitask adapter sees


def build_base(args: Namespace) -> None:
    """Pretrain the larger base on text."""
    base = args.out / "large" / "base"
    if (base / "model.safetensors").exists():
        return
    on = devices()
    command = [sys.executable, "-m", "torch.distributed.run", "--master-addr", "127.0.0.1"]
    command += ["--master-port", 29511, "--nproc-per-node", len(on)]
    command += [RECIPES / "pretrain.py", args.text, base, "--tokenizer", default.BASE]
    command += ["--minutes", args.minutes, "--resume", *LARGE_BASE]
    run_all([("base", [*map(str, command)])], logs=args.out / "logs", each=1, on=[",".join(on)])


def build_experts(args: Namespace) -> None:
    """Train an expert for every task, a few in one pass over the base, side by side."""
    large, on = args.out / "large", devices()
    names = [n for n in by_length(args.data / "tasks") if not (large / "experts" / n).exists()]
    alone = not (large / "multitask" / DONE).exists()  # one of the processes is for that
    count = max(1, min(len(names), args.each * len(on) - alone))
    groups = [names[k * len(names) // count : (k + 1) * len(names) // count] for k in range(count)]
    commands = []
    for number, group in enumerate(groups):
        tasks = [str(args.data / "tasks" / name) for name in group]
        command = [*PHATGOOSE, "experts", "train", "--tasks", *tasks, "--base", large / "base"]
        command += ["--out", large / "parts" / str(number), "--bf16", "--save-dtype", "bfloat16"]
        command += ["--steps", args.steps, "--batch-size", args.batch, "--learning-rate", "2e-3"]
        command += ["--gate-batch-size", args.batch, "--gate-steps", args.gate_steps]
        command += ["--max-length", 512, "--dropout", 0.05]
        commands.append((f"experts-{number}", [*map(str, command)]))
    if alone:
        commands.insert(0, multitask(args, "large", large / "base"))
    run_all(commands, logs=args.out / "logs", each=args.each, on=on)
    for folder in sorted((large / "parts").glob("*/[!.]*")):
        (large / "experts").mkdir(exist_ok=True)
        folder.rename(large / "experts" / folder.name)


def build_rest(args: Namespace, pools: Sequence[str]) -> None:
    """Signatures, the multitask adapters, and gates trained for other numbers of steps."""
    commands = []
    for pool in pools:
        folder = args.out / pool
        if pool == "default" and not (folder / "experts").exists():
            shutil.copytree(PACKAGED, folder / "experts")
        base = default.BASE if pool == "default" else folder / "base"
        experts = sorted(p for p in (folder / "experts").iterdir() if p.is_dir())
        measured = [(p / file_name(kind)).exists() for p in experts for kind in MEASURED]
        for number in range(args.each if not all(measured) else 0):
            command = [*PHATGOOSE, "experts", "derive", *experts[number :: args.each]]
            command += ["--base", base, "--tasks", args.data / "tasks", "--max-length", 512]
            command += ["--batch-size", 64]
            commands.append((f"derive-{pool}-{number}", [*map(str, command)]))
        if not (folder / "multitask" / DONE).exists():
            commands.insert(0, multitask(args, pool, base))
    if "default" in pools:
        commands += gates(args)
    run_all(commands, logs=args.out / "logs", each=args.each, on=devices())


def multitask(args: Namespace, pool: str, base: Path) -> tuple[str, list[str]]:
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


def gates(args: Namespace) -> Iterator[tuple[str, list[str]]]:
    """Gates of the default pool, trained anew for several numbers of steps."""
    for steps in GATE_STEPS:
        folder = args.out / "default" / f"gates-{steps}"
        if not folder.exists():
            leave = shutil.ignore_patterns("phatgoose_*")
            shutil.copytree(PACKAGED, folder, ignore=leave)
        command = [*PHATGOOSE, "experts", "gate", folder, "--base", default.BASE, "--bf16"]
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
