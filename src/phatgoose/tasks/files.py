"""Files of examples, as JSON lines or one JSON array, packed by xz or gzip, and folders of them.

`rows` has the forms of a line or item.
"""

import gzip
import io
import lzma
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from phatgoose.errors import TaskFormatError, first_line
from phatgoose.reading import open_regular, parse_json
from phatgoose.tasks.example import Example
from phatgoose.tasks.rows import parse_row
from phatgoose.text import visible

BOM = "\ufeff"  # editors on Windows begin a file with it
LONGEST_LINE = 1 << 26  # characters
LONGEST_ARRAY = 1 << 28
MOST_BLANK = 1_000_000  # lines without anything between two examples
MOST_UNPACKED = 200  # times the bytes of a packed file; text is packed to a tenth or so
LEAST_UNPACKED = 1 << 24  # characters, however small the packed file is
_OPENERS: dict[str, Callable[..., Any]] = {".xz": lzma.open, ".gz": gzip.open}


def read_examples(
    path: str | Path, limit: int | None = None, *, chat: bool = False
) -> list[Example]:
    """Read the examples of a file; `chat` as in `parse_row`.

    Raises TaskFormatError, naming file and line, where the file cannot be read, a line is not a
    JSON object of one of the forms in `rows`, or there is no line at all.
    """
    path = Path(path)
    examples: list[Example] = []
    where = "line 0"
    try:
        for where, row in _rows(path):
            examples += parse_row(row, f"{path}, {where}", chat=chat)
            if limit is not None and len(examples) >= limit:
                break  # what is not read is not judged
    except FileNotFoundError:
        raise TaskFormatError(f"{path}: no such file. Give a .jsonl file of examples.") from None
    except (OSError, EOFError, lzma.LZMAError, zlib.error, UnicodeDecodeError) as error:
        raise TaskFormatError(
            f"{path}, after {where}: cannot be read ({error}). Is it whole, in UTF-8, and "
            "really .jsonl, .jsonl.xz or .jsonl.gz?"
        ) from None
    if not examples:
        raise TaskFormatError(f"{path}: holds no examples.")
    return examples[:limit]


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Each line or, where the file is one JSON array, each item of it, and which it is."""
    lines = ((n, line.removeprefix(BOM)) for n, line in enumerate(_lines(path), start=1))
    filled = ((n, line) for n, line in lines if line.strip())
    first = next(filled, None)
    if first is not None and first[1].lstrip().startswith("["):  # no row is a list
        rest = (line for _, line in filled)
        for number, item in enumerate(_array(path, chain([first[1]], rest)), start=1):
            yield f"item {number}", item
    elif first is not None:
        for number, line in chain([first], filled):
            yield f"line {number}", _parse(line, f"{path}, line {number}")


def _array(path: Path, lines: Iterator[str]) -> Iterator[Any]:
    parts, size = [], 0
    for line in lines:
        parts.append(line)
        size += len(line)
        if size > LONGEST_ARRAY:
            raise TaskFormatError(
                f"{path}: is one array of more than {LONGEST_ARRAY} characters. Give one example a "
                "line, as .jsonl."
            )
    yield from _parse("".join(parts), f"{path}, from line 1")


def _parse(text: str, where: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise TaskFormatError(f"{where}: is not JSON ({error}). Correct or remove it.") from None


def _lines(path: Path) -> Iterator[str]:
    """The lines of a file, unpacked; refuses one that a few bytes make endless."""
    packed = path.suffix in _OPENERS
    unpack: Callable[..., Any] = _OPENERS.get(path.suffix, lambda raw: raw)
    with open_regular(path, error=TaskFormatError) as raw:
        most = max(LEAST_UNPACKED, MOST_UNPACKED * os.fstat(raw.fileno()).st_size)
        size = blank = 0
        text = io.TextIOWrapper(unpack(raw), encoding="utf-8")
        while line := text.readline(LONGEST_LINE + 1):
            size += len(line)
            blank = 0 if line.strip() else blank + 1
            if len(line) > LONGEST_LINE or blank > MOST_BLANK:
                what = "a line" if len(line) > LONGEST_LINE else "the blank part"
                raise TaskFormatError(
                    f"{path}: {what} after {size - len(line)} characters does not end. Give one "
                    "example a line."
                )
            if packed and size > most:
                raise TaskFormatError(
                    f"{path}: unpacks to more than {MOST_UNPACKED} times its size. Give the "
                    "unpacked file if that is right."
                )
            yield line


def load_examples(source: str | Path, split: str = "train", *, chat: bool = False) -> list[Example]:
    """Examples of a file, of a task folder's split, or of a Hub data set ("owner/name").

    `chat` as in `parse_row`.

    Raises TaskFormatError where there is no such thing, or a row is of none of the forms in `rows`.
    """
    path = Path(source)
    if os.path.isdir(path):  # Path.is_dir raises on names that are too long
        found = split_file(path, split)
        if found is None:
            raise TaskFormatError(f"{path}: holds no {split}.jsonl (or .jsonl.xz, .jsonl.gz).")
        return read_examples(found, chat=chat)
    if os.path.exists(path) or path.suffix in (".jsonl", ".json", *_OPENERS):
        return read_examples(path, chat=chat)
    return _read_hub(str(source), split, chat=chat)


def _read_hub(name: str, split: str, *, chat: bool) -> list[Example]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise TaskFormatError(
            f"{name}: no such file, and reading Hub data sets needs the datasets package: "
            "pip install 'phatgoose[eval]'"
        ) from None
    try:
        rows = load_dataset(name, split=split)
    except Exception as error:  # datasets raises many kinds
        raise TaskFormatError(
            f"{name}: no such file here, and the Hub gave no data set ({first_line(error)}). Check "
            "the name."
        ) from None
    examples = [
        example
        for number, row in enumerate(rows)
        for example in parse_row(row, f"{name}, row {number}", chat=chat)
    ]
    if not examples:
        raise TaskFormatError(f"{name}: its {split} split holds no examples.")
    return examples


def task_folders(paths: Sequence[str | Path], split: str = "test") -> Iterator[Path]:
    """The task folders among `paths`: folders with a file of this split, or those inside them.

    Raises TaskFormatError where there are none, or one has a name that cannot be seen.
    """
    for path in map(Path, paths):
        inside = [path] if split_file(path, split) is not None else sorted(path.glob("*"))
        found = [f for f in inside if f.is_dir() and split_file(f, split) is not None]
        if not found:
            raise TaskFormatError(f"{path}: no task here. Wanted folders that hold {split}.jsonl.")
        for folder in found:
            if visible(folder.name) != folder.name:
                raise TaskFormatError(
                    f"{folder}: its name has characters that cannot be seen. Rename the folder."
                )
            yield folder


def split_file(folder: Path, split: str) -> Path | None:
    """The file of a split ("train", "validation", "test") in a task folder, if it is there."""
    for suffix in (".jsonl", ".jsonl.xz", ".jsonl.gz"):
        if (path := folder / f"{split}{suffix}").is_file():
            return path
    return None
