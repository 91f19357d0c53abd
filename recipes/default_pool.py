"""Train, choose and measure the pool in the package: experts of the default base.

    python recipes/default_pool.py --data DATA --out OUT [--jobs 6] [--seconds 540]

DATA holds tasks/NAME/{train,validation,test}.jsonl, heldout/NAME/test.jsonl and INDEX.json (which
names each task's metric, source and licence). OUT receives

    data/           what is trained and measured on: a seeded part of DATA's files
    VARIANT/experts an expert for each task, by the settings in VARIANTS
    VARIANT/validation, VARIANT/test, VARIANT/heldout   results of `phatgoose eval`
    choice.json     each variant's gain and size on the validation sets, and which one is chosen
    chosen/         the chosen experts with their model cards, as the package has them

Of the variants that fit the package, the smallest whose experts keep 95% of the reference's gain
over the base, on the validation sets, is chosen; where none does, the one that keeps most. Test
sets are only reported. Everything that is there is left alone, so the same command goes on after
an interrupt, or after --seconds are over. One H200 took some ten minutes to train the five
variants at once, in 133 GB of its memory: fewer --jobs take less.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phatgoose.experts.kinds import KINDS
from phatgoose.files import write_bytes, write_json
from phatgoose.models import SMOLLM2
from phatgoose.tasks import split_file

# Tasks whose licences allow to pass on what was learned from them (INDEX.json quotes each).
TASKS = (
    "snips banking77 trec_question_type subjectivity restaurant_aspects "  # classification
    "restaurant_slots wnut_ner ud_pos "  # extraction and tagging
    "disfl_qa wiki_split e2e_nlg "  # rewriting
    "policy_qa proc_where_is "  # question answering
    "proc_reverse_words proc_last_letters proc_pluralise proc_change_case proc_sort_words"
).split()
REFERENCE = "rank16"
STRANGERS = "strangers"
KEEP = 0.95  # of the reference's gain
ATTENTION = "--target-modules q_proj k_proj v_proj o_proj"
MLP = "--target-modules gate_proj up_proj down_proj"
VARIANTS = {  # in the order in which they are trained
    "rank16": "--rank 16 --alpha 32 --learning-rate 1e-3",
    "rank2": "--rank 2 --alpha 4 --learning-rate 1e-3",
    "rank8-attention": f"--rank 8 --alpha 16 --learning-rate 1e-3 {ATTENTION}",
    "rank4-mlp": f"--rank 4 --alpha 8 --learning-rate 1e-3 {MLP}",
    # As adapters are found: a low rate and a seed each, so that no two start alike.
    STRANGERS: "--rank 16 --alpha 32 --learning-rate 2e-4 --seed-each",
}
METHODS = (
    "base own phatgoose phatgoose+evidence phatgoose+prompt_evidence arrow merged "
    "average_activation retrieval"
).split()
STRANGERS_METHODS = (
    "base own phatgoose phatgoose+prompt_evidence arrow merged adapter_prompt_evidence".split()
)
PHATGOOSE = (sys.executable, "-m", "phatgoose.cli")


@dataclass(frozen=True)
class Job:
    """A command, what it makes, and where its output goes."""

    name: str
    command: Sequence[Any]
    makes: Path  # nothing is run where this is

    def done(self) -> bool:
        return self.makes.exists()


def main() -> None:
    args = parse()
    until = time.monotonic() + args.seconds if args.seconds else None
    if args.data:
        prepare(args)
    run(args, [train(args, name) for name in args.variants], until)
    run(args, [derive(args, name) for name in args.variants], until)
    run(args, [*validate(args)], until)
    chosen = choose(args)
    measure(args, chosen, "test", METHODS, until)
    if STRANGERS in args.variants:
        measure(args, STRANGERS, "test", STRANGERS_METHODS, until)
    measure(args, chosen, "heldout", [name for name in METHODS if name != "own"], until)
    print(f"done: {args.out}", file=sys.stderr)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--data", type=Path, help="the task collection; not needed once OUT/data is there")
    add("--out", type=Path, required=True)
    add("--base", default=SMOLLM2)
    add("--tasks", nargs="+", default=TASKS, metavar="NAME")
    add("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), metavar="NAME")
    add("--steps", type=int, default=300)
    add("--gate-steps", type=int, default=100)
    add("--batch", type=int, default=16, help="examples of an expert a step, gates too")
    add("--together", type=int, default=8, help="experts in one pass over the base")
    add("--examples", type=int, default=5000, help="of each task to train on")
    add("--validation-limit", type=int, default=60, help="examples a task to choose by")
    add("--limit", type=int, default=100, help="test examples a task to report")
    add("--largest", type=float, default=45, metavar="MB", help="that the chosen experts may be")
    add("--jobs", type=int, default=6, help="processes side by side")
    add("--seconds", type=float, help="stop after this long; the same command goes on")
    add("--device", help="cpu, cuda, ... (an accelerator if there is one)")
    return parser.parse_args()


def prepare(args: argparse.Namespace) -> None:
    """Bring a seeded part of the data into OUT/data, in the folders that evaluations read."""
    data = args.out / "data"
    parts = (("train", "train", args.examples), ("validation", "validation", None))
    for name in args.tasks:
        for split, folder, count in (*parts, ("test", "test", None)):
            target = data / folder / "tasks" / name
            target /= "train.jsonl" if split == "train" else "test.jsonl"
            if not target.exists():
                copy_lines(args.data / "tasks" / name, split, target, count)
    for source in sorted((args.data / "heldout").iterdir()):
        if source.name.startswith("bbh_"):  # BIG-Bench Hard is at chance for a model this small
            continue
        target = data / "heldout" / "heldout" / source.name / "test.jsonl"
        if not target.exists() and split_file(source, "test"):
            copy_lines(source, "test", target, None)
    index = json.loads((args.data / "INDEX.json").read_text(encoding="utf-8"))
    for folder in ("train", "validation", "test", "heldout"):
        write_json(data / folder / "INDEX.json", index)


def copy_lines(task: Path, split: str, target: Path, count: int | None) -> None:
    """Some lines of a split at random, in their order."""
    import gzip
    import lzma

    source = split_file(task, split)
    if source is None:
        raise SystemExit(f"{task}: holds no {split}.jsonl")
    opener = {".xz": lzma.open, ".gz": gzip.open}.get(source.suffix, open)
    with opener(source, "rt", encoding="utf-8") as file:
        lines = [line for line in file if line.strip()]
    if count is not None and count < len(lines):
        chosen = random.Random(f"{task.name} {split}").sample(range(len(lines)), count)
        lines = [lines[index] for index in sorted(chosen)]
    write_bytes(target, "".join(lines).encode())


def train(args: argparse.Namespace, variant: str) -> Job:
    """`phatgoose experts train`, which goes on where it stopped and leaves what is there alone."""
    out = args.out / variant
    command = [*PHATGOOSE, "experts", "train", "--base", args.base, "--out", out / "experts"]
    command += ["--tasks", *task_folders(args, "train"), "--together", args.together]
    command += ["--steps", args.steps, "--gate-steps", args.gate_steps, "--batch-size", args.batch]
    command += ["--max-length", 384, "--bf16", "--save-dtype", "bfloat16"]
    command += [*VARIANTS[variant].split(), *device(args)]
    return Job(f"{variant}-train", command, out / "trained.txt")


def derive(args: argparse.Namespace, variant: str) -> Job:
    """Mean prompts and average activations, of 256 training examples."""
    out = args.out / variant
    command = [*PHATGOOSE, "experts", "derive", out / "experts", "--base", args.base]
    command += ["--tasks", *task_folders(args, "train"), "--max-length", 384, *device(args)]
    return Job(f"{variant}-derive", command, out / "derived.txt")


def validate(args: argparse.Namespace) -> Iterator[Job]:
    """Each variant's own experts on the validation sets, and the base."""
    for variant in args.variants:
        methods = ["base", "own"] if variant == REFERENCE else ["own"]
        yield evaluation(args, variant, "validation", methods, args.validation_limit)


def measure(
    args: argparse.Namespace,
    variant: str,
    split: str,
    methods: Sequence[str],
    until: float | None,
) -> None:
    """Each method in a process of its own, into one folder; then all of them, which are there."""
    each = [evaluation(args, variant, split, [name], args.limit, name=name) for name in methods]
    run(args, each, until)
    run(args, [evaluation(args, variant, split, methods, args.limit)], until)


def evaluation(
    args: argparse.Namespace,
    variant: str,
    split: str,
    methods: Sequence[str],
    limit: int,
    *,
    name: str = "all",
) -> Job:
    out = args.out / variant / split
    folder = args.out / "data" / split / ("heldout" if split == "heldout" else "tasks")
    command = [*PHATGOOSE, "eval", "--base", args.base, "--experts", args.out / variant / "experts"]
    command += ["--tasks", folder, "--methods", *methods, "--limit", limit, "--out", out]
    command += ["--train-tasks", args.out / "data" / "train" / "tasks"]
    command += ["--tokens", 32768, "--rows", 512] if not on_cpu(args) else []
    return Job(f"{variant}-{split}-{name}", [*command, *device(args)], out / f"{name}.txt")


def choose(args: argparse.Namespace) -> str:
    """The smallest variant that keeps enough of the reference's gain; write OUT/choice.json."""
    found = {name: scores(args.out / name / "validation", "own") for name in args.variants}
    base = mean(scores(args.out / REFERENCE / "validation", "base"))
    whole = mean(found[REFERENCE]) - base
    table = {}
    for name, of_task in found.items():
        folder = args.out / name / "experts"
        table[name] = {
            "own": mean(of_task),
            "gain": mean(of_task) - base,
            "kept": (mean(of_task) - base) / whole if whole else None,
            "bytes": sum(path.stat().st_size for path in shipped(folder)),
            "settings": VARIANTS[name],
        }
    fits = {
        name: row
        for name, row in table.items()
        if name != STRANGERS and row["bytes"] <= args.largest * 1_000_000
    }
    if not fits:
        raise SystemExit(f"choose: no variant fits --largest {args.largest}: see {args.out}")
    enough = [name for name, row in fits.items() if (row["kept"] or 0) >= KEEP]
    if enough:
        chosen = min(enough, key=lambda name: fits[name]["bytes"])
    else:
        chosen = max(fits, key=lambda name: fits[name]["kept"] or 0)
    write_json(args.out / "choice.json", {"base": base, "chosen": chosen, "variants": table})
    print(f"chosen: {chosen}", file=sys.stderr)
    ship(args, chosen)
    return chosen


def scores(folder: Path, method: str) -> dict[str, float]:
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))["results"]
    return {task: cells[method]["score"] for task, cells in results.items()}


def mean(of_task: dict[str, float]) -> float:
    return sum(of_task.values()) / len(of_task)


def shipped(experts: Path) -> Iterator[Path]:
    """The files of a pool that go into the package: what can be derived from others does not."""
    for path in sorted(experts.glob("*/*")):
        if path.name != KINDS["arrow"].file and path.is_file():
            yield path


def ship(args: argparse.Namespace, variant: str) -> None:
    """The chosen experts into OUT/chosen, with cards that say whose data they are from."""
    target, source = args.out / "chosen", args.out / variant / "experts"
    shutil.rmtree(target, ignore_errors=True)
    for path in shipped(source):
        (target / path.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target / path.parent.name)
    index = json.loads((args.out / "data" / "train" / "INDEX.json").read_text(encoding="utf-8"))
    records = {record["name"]: record for record in index if record.get("split") != "heldout"}
    for folder in sorted(target.iterdir()):
        card = folder / "README.md"
        told = card.read_text(encoding="utf-8").rstrip("\n")
        record = records.get(folder.name, {})
        where = f"{record.get('source')} at {record.get('commit')}"
        told += (
            f"\n\n| | |\n|---|---|\n| data | {where} |\n"
            f"| licence of the data | {record.get('licence')} |\n"
            f"| what it does | {record.get('description')} |\n"
            f"| made by | `recipes/default_pool.py`, variant {variant}: `{VARIANTS[variant]}` |\n\n"
            "Trained on the task's train split only.\n"
        )
        write_bytes(card, told.encode())


def task_folders(args: argparse.Namespace, split: str) -> list[Path]:
    return [args.out / "data" / split / "tasks" / name for name in args.tasks]


def device(args: argparse.Namespace) -> list[str]:
    return ["--device", args.device] if args.device else []


def on_cpu(args: argparse.Namespace) -> bool:
    import torch

    return args.device == "cpu" or not torch.accelerator.is_available()


def run(args: argparse.Namespace, jobs: Sequence[Job], until: float | None) -> None:
    """Run what is not done yet, some at a time; stop where time is over or one fails."""
    jobs = [job for job in jobs if not job.done()]
    with ThreadPoolExecutor(args.jobs) as threads:
        failures = [f for f in threads.map(lambda job: run_one(args, job, until), jobs) if f]
    if failures:
        raise SystemExit("\n".join(failures))


def run_one(args: argparse.Namespace, job: Job, until: float | None) -> str | None:
    """Run a job; return what went wrong."""
    logs = args.out / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    left = None if until is None else until - time.monotonic()
    if left is not None and left < 1:
        return f"{job.name}: no time left; the same command goes on"
    started = time.monotonic()
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "TOKENIZERS_PARALLELISM": "false"}
    try:
        with (logs / f"{job.name}.log").open("ab") as log:
            command = [str(word) for word in job.command]
            done = subprocess.run(command, stdout=log, stderr=log, env=environment, timeout=left)
    except subprocess.TimeoutExpired:
        return f"{job.name}: stopped after {left:.0f} s; the same command goes on"
    took = time.monotonic() - started
    if done.returncode:
        tail = (logs / f"{job.name}.log").read_text(errors="replace")[-1500:]
        return f"{job.name} failed ({done.returncode}):\n{tail}"
    write_bytes(job.makes, f"{took:.0f} s\n".encode())
    print(f"{job.name}: {took:.0f} s", file=sys.stderr, flush=True)
    return None


if __name__ == "__main__":
    main()
