"""Train a pool: one expert per task folder, several at a time, each by `phatgoose train`.

    python recipes/experts.py TASKS_DIR OUT_DIR --tasks snips banking77 --jobs 8 -- --steps 1200

TASKS_DIR holds one folder per task (train.jsonl, ...), and may hold INDEX.json with each task's
source and licence, which go into the model cards. What follows `--` goes to `phatgoose train`. An
expert that is there already is left alone, so an interrupted run can be started again.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

CARD = """---
base_model: {base}
library_name: peft
tags: [lora, phatgoose]
---
# {name}

A rank-{rank} LoRA for the task `{name}` ({category}), with PHATGOOSE gates
(arXiv:2402.05859), for the base model beside it.

| | |
|---|---|
| data | {source} at {commit} |
| licence of the data | {licence} |
| what it does | {description} |
| made by | `recipes/experts.py`: `phatgoose train {options}` |
| gates | {steps} steps, {examples} examples, loss {first:.3f} to {last:.3f} nats a target token |

Trained on the task's train split only. Numbers on its test split: `docs/default-pool.md`.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tasks_dir", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tasks", nargs="+", help="names of task folders; default: all")
    parser.add_argument("--jobs", type=int, default=1, help="experts trained at the same time")
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args, options = parser.parse_args(sys.argv[1:split]), sys.argv[split + 1 :]
    names = args.tasks or sorted(p.name for p in args.tasks_dir.iterdir() if p.is_dir())
    args.out.mkdir(parents=True, exist_ok=True)
    index = _index(args.tasks_dir)
    started, failed = time.monotonic(), []
    with ThreadPoolExecutor(args.jobs) as pool:
        jobs = {name: pool.submit(train, name, args, options, index.get(name)) for name in names}
        for number, (name, job) in enumerate(jobs.items(), start=1):
            message = job.result()
            failed += [name] if message.startswith("failed") else []
            seconds = time.monotonic() - started
            print(f"{number}/{len(names)} {name}: {message} ({seconds:.0f} s)", file=sys.stderr)
    return 1 if failed else 0


def train(
    name: str, args: argparse.Namespace, options: list[str], record: dict[str, Any] | None
) -> str:
    """Train one expert in a process of its own, under a temporary name until it is whole."""
    folder, part = args.out / name, args.out / f".{name}.part"
    if folder.exists():
        return "there already"
    shutil.rmtree(part, ignore_errors=True)
    command = [sys.executable, "-m", "phatgoose.cli", "train", "--out", str(part)]
    command += ["--data", str(args.tasks_dir / name), "--json", *options]
    log = args.out / f"{name}.log"
    with log.open("w") as errors:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, text=True)
    if done.returncode:
        return f"failed, see {log}: {log.read_text().strip().splitlines()[-1:]}"
    gates = json.loads(done.stdout.splitlines()[-1])
    (part / "README.md").write_text(card(name, gates, part, options, record or {}))
    part.rename(folder)
    log.unlink()
    return f"gate loss {gates['first_loss']:.3f} to {gates['last_loss']:.3f}"


def card(
    name: str, gates: dict[str, Any], folder: Path, options: list[str], record: dict[str, Any]
) -> str:
    """The model card of one expert."""
    config = json.loads((folder / "adapter_config.json").read_text())
    known = {key: record.get(key, "not stated") for key in ("category", "source", "commit")}
    known |= {key: record.get(key, "not stated") for key in ("licence", "description")}
    return CARD.format(
        name=name,
        base=gates["base"]["name"],
        rank=config["r"],
        options=" ".join(options),
        steps=gates["steps"],
        examples=gates["examples"],
        first=gates["first_loss"],
        last=gates["last_loss"],
        **known,
    )


def _index(folder: Path) -> dict[str, dict[str, Any]]:
    for path in (folder / "INDEX.json", folder.parent / "INDEX.json"):
        if path.exists():
            return {record["name"]: record for record in json.loads(path.read_text())}
    return {}


if __name__ == "__main__":
    sys.exit(main())
