"""Keeps answers as files, one for each chunk of the stream, so that a run can go on."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from phatgoose.evaluation.eval_tasks import Item
from phatgoose.evaluation.evaluate import grade
from phatgoose.evaluation.methods import Bench, Method, OneExpert, together
from phatgoose.files import write_bytes
from phatgoose.pool import ExpertPool

Row = dict[str, Any]  # task, line, prediction, target, score
Known = Mapping[tuple[str, int], Row]  # by task and line


@dataclass(frozen=True)
class Chunk:
    """Some examples that one method answers, in one file."""

    method: Method
    items: Sequence[Item]
    path: Path

    def read(self) -> list[Row] | None:
        """Read the rows; None if the file is missing, cut short or of other examples."""
        try:
            lines = self.path.read_text(encoding="utf-8").split("\n")
            rows = [json.loads(line) for line in lines if line]
            of = [(row["task"], row["line"], row["target"]) for row in rows]
            scored = all(0 <= row["score"] <= 1 and "prediction" in row for row in rows)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        wanted = [(i.task.name, i.task.lines[i.place], i.example.target) for i in self.items]
        return rows if scored and of == wanted and lines[-1] == "" else None

    def write(self, rows: Sequence[Row]) -> None:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_bytes(self.path, text.encode())


def chunks_of(
    method: Method,
    items: Sequence[Item],
    *,
    settings: Mapping[str, Any],
    out: Path,
    size: int,
) -> list[Chunk]:
    """Cut examples into chunks of at most `size`.

    A file's name has the hash of all that its answers depend on: the examples, the settings, the
    base and how it computes. So nothing stale is ever taken for finished.
    """
    folder = out / "answers" / file_name(method.name)
    chunks = []
    for number, start in enumerate(range(0, len(items), size)):
        some = items[start : start + size]
        asked = [
            (i.task.name, i.task.metric, i.task.lines[i.place], i.task.max_new_tokens) for i in some
        ]
        key = digest([settings, asked, [asdict(i.example) for i in some]])
        chunks.append(Chunk(method, some, folder / f"part-{number:03}-{key[:12]}.jsonl"))
    return chunks


def answer_chunks(
    bench: Bench, method: Method, chunks: Sequence[Chunk], *, known: Known | None = None
) -> Iterator[list[Row]]:
    """Return the rows of each chunk: read them if the file is whole, else compute and write them.

    `known` are rows that need not be computed. The model is set up for the method only if there is
    something to compute.
    """
    found = {chunk.path: chunk.read() for chunk in chunks}
    if all(found.values()):
        yield from (rows for chunk in chunks if (rows := found[chunk.path]))
        return
    with method.ready(bench) as answer:
        for chunk in chunks:
            rows = found[chunk.path]
            if rows is None:
                rows = _rows(chunk.items, answer, known or {})
                chunk.write(rows)
            yield rows


def answer_singles(
    bench: Bench, chunks: Sequence[tuple[OneExpert, Chunk]], *, size: int, pool: ExpertPool
) -> None:
    """Write the chunks of single experts that are missing. One batch answers for several of them.

    Each row of a batch goes through its own chunk's expert, so few examples of many experts fill
    batches as well as many of one.
    """
    missing = [(method, chunk) for method, chunk in chunks if chunk.read() is None]
    if not missing:
        return
    with together(bench, pool) as answer:
        while missing:
            taken: list[tuple[OneExpert, Chunk]] = []
            while missing and (not taken or _count(taken) + len(missing[0][1].items) <= size):
                taken.append(missing.pop(0))
            items = [item for _, chunk in taken for item in chunk.items]
            experts = [name for m, chunk in taken for name in m.choose(chunk.items, bench)]
            rows = iter(map(_row, items, answer(items, experts)))
            for _, chunk in taken:
                chunk.write([next(rows) for _ in chunk.items])


def _count(chunks: Sequence[tuple[OneExpert, Chunk]]) -> int:
    return sum(len(chunk.items) for _, chunk in chunks)


def _rows(
    items: Sequence[Item], answer: Callable[[Sequence[Item]], list[str]], known: Known
) -> list[Row]:
    rows = {k: known[place] for k, i in enumerate(items) if (place := place_of(i)) in known}
    left = [k for k in range(len(items)) if k not in rows]
    predictions = answer([items[k] for k in left]) if left else []
    for k, prediction in zip(left, predictions, strict=True):
        rows[k] = _row(items[k], prediction)
    return [rows[k] for k in range(len(items))]


def _row(item: Item, prediction: str) -> Row:
    (scored,) = grade([prediction], [item.example], item.task.metric)
    task, line = place_of(item)
    return {"task": task, "line": line, **asdict(scored)}


def place_of(item: Item) -> tuple[str, int]:
    return item.task.name, item.task.lines[item.place]


def file_name(name: str) -> str:
    """Turn a method's name into a folder's name that every system takes."""
    return re.sub(r"[^\w.+=,-]+", "-", name)


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
