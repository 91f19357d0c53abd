"""The study's data: seeded parts of the collection, in the folders that evaluations read."""

import gzip
import json
import lzma
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from phatgoose.files import write_bytes, write_json
from phatgoose.tasks import split_file
from plan import SHIPPED

TRAIN, VALIDATION = 5000, 100  # examples of a task at most
FEW = 16  # of a held-out task, which no evaluation asks
CONTEXTS = 25  # examples of a task, each asked first, second and third in a context
PLACES = ("first", "second", "third")
Record = dict[str, Any]


def prepare(source: Path, data: Path) -> None:
    """Write data/ once; what is there is left alone."""
    done = data / "done.txt"
    if done.exists():
        return
    records = json.loads((source / "INDEX.json").read_text(encoding="utf-8"))
    for folder in sorted((source / "tasks").iterdir()):
        write(data / "train" / "tasks", folder.name, "train", read(folder, "train", TRAIN))
        rows = read(folder, "validation", VALIDATION)
        write(data / "validation" / "tasks", folder.name, "test", rows)
        write(data / "test" / "tasks", folder.name, "test", read(folder, "test"))
    for folder in sorted((source / "heldout").iterdir()):
        kind = "bbh" if folder.name.startswith("bbh_") else "heldout"
        rows = read(folder, "test")
        if kind == "heldout":
            random.Random(f"{folder.name} few").shuffle(rows)
            write(data / "few" / "tasks", folder.name, "train", rows[:FEW])
            rows = rows[FEW:]
        write(data / kind / "heldout", folder.name, "test", rows)
    tests = {name: read(source / "tasks" / name, "test") for name in SHIPPED}
    for name in SHIPPED:
        for place, rows in in_contexts(name, tests).items():
            write(data / "contexts" / "heldout", f"{name}_{place}", "test", rows)
    metrics = {record["name"]: record["metric"] for record in records}
    records += [
        {"name": f"{name}_{place}", "split": "heldout", "metric": metrics[name]}
        for name in SHIPPED
        for place in PLACES
    ]
    for kind in ("train", "validation", "test", "heldout", "bbh", "few", "contexts"):
        write_json(data / kind / "INDEX.json", records)
    write_bytes(done, b"")


def read(folder: Path, split: str, count: int | None = None) -> list[Record]:
    """A split's examples; at most `count` of them, at random and in their order."""
    path = split_file(folder, split)
    if path is None:
        raise SystemExit(f"{folder}: holds no {split}.jsonl")
    opener: Any = {".xz": lzma.open, ".gz": gzip.open}.get(path.suffix, open)
    with opener(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file if line.strip()]
    if count is None or count >= len(rows):
        return rows
    places = random.Random(f"{folder.name} {split}").sample(range(len(rows)), count)
    return [rows[place] for place in sorted(places)]


def in_contexts(name: str, tests: dict[str, list[Record]]) -> dict[str, list[Record]]:
    """The same examples alone, after one example of another task, and after two of two others."""
    draw = random.Random(f"{name} contexts")
    others = [other for other in tests if other != name]
    found: dict[str, list[Record]] = {place: [] for place in PLACES}
    for row in draw.sample(tests[name], CONTEXTS):
        before = [draw.choice(tests[other]) for other in draw.sample(others, 2)]
        for count, place in enumerate(PLACES):
            texts = [f"{b['inputs']} {b['targets']}" for b in before[:count]]
            found[place].append({**row, "inputs": "\n\n".join([*texts, row["inputs"]])})
    return found


def write(parent: Path, name: str, split: str, rows: Sequence[Record]) -> None:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    write_bytes(parent / name / f"{split}.jsonl", "".join(lines).encode())
