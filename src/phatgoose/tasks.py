"""Tasks as files of examples, and examples as token ids.

A file holds one JSON object per line (.jsonl, .jsonl.xz or .jsonl.gz):

- `{"inputs": "...", "targets": "..."}`, a prompt and its answer, with `"choices": [...]` where the
  answer is one of a few; the two are joined by a newline;
- `{"prompt": "...", "completion": "..."}`, joined as they are;
- `{"text": "..."}`, learnt as a whole.
"""

import gzip
import io
import lzma
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import DataLoader

from phatgoose.errors import TaskFormatError, first_line
from phatgoose.reading import open_regular, parse_json
from phatgoose.text import visible

SEPARATOR = "\n"  # between `inputs` and `targets`
LONGEST_LINE = 1 << 26  # characters
MOST_BLANK = 1_000_000  # lines without anything between two examples
MOST_UNPACKED = 200  # times the bytes of a packed file; text is packed to a tenth or so
LEAST_UNPACKED = 1 << 24  # characters, however small the packed file is
IGNORED = -100  # the label of a token that has no loss
_OPENERS: dict[str, Callable[..., Any]] = {".xz": lzma.open, ".gz": gzip.open}
_FIELDS = (("inputs", "targets", SEPARATOR), ("prompt", "completion", ""))


@dataclass(frozen=True)
class Example:
    """One prompt with its reference answer."""

    prompt: str  # the inputs, with the separator after them
    target: str
    choices: tuple[str, ...] | None = None  # the answers to choose from, `target` among them


@dataclass(frozen=True)
class Encoded:
    """An example as token ids; for an encoder-decoder the two parts go to the two stacks."""

    prompt: list[int]
    target: list[int]  # with end-of-sequence


def read_examples(path: str | Path, limit: int | None = None) -> list[Example]:
    """Read the examples of a file.

    Raises TaskFormatError, naming file and line, where the file cannot be read, a line is not a
    JSON object of one of the three forms, or there is no line at all.
    """
    path = Path(path)
    examples: list[Example] = []
    number = 0
    try:
        for number, line in enumerate(_lines(path), start=1):
            if limit is not None and len(examples) == limit:
                break
            if line.strip():
                examples.append(_parse(line, f"{path}, line {number}"))
    except FileNotFoundError:
        raise TaskFormatError(f"{path}: no such file. Give a .jsonl file of examples.") from None
    except (OSError, EOFError, lzma.LZMAError, zlib.error, UnicodeDecodeError) as error:
        raise TaskFormatError(
            f"{path}, after line {number}: cannot be read ({error}). Is it whole, and "
            "really .jsonl, .jsonl.xz or .jsonl.gz?"
        ) from None
    if not examples:
        raise TaskFormatError(f"{path}: holds no examples.")
    return examples


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


def load_examples(source: str | Path, split: str = "train") -> list[Example]:
    """Examples of a file, of a task folder's split, or of a Hub data set ("owner/name").

    Raises TaskFormatError where there is no such thing, or a row is not of one of the three forms.
    """
    path = Path(source)
    if os.path.isdir(path):  # Path.is_dir raises on names that are too long
        found = split_file(path, split)
        if found is None:
            raise TaskFormatError(f"{path}: holds no {split}.jsonl (or .jsonl.xz, .jsonl.gz).")
        return read_examples(found)
    if os.path.exists(path) or path.suffix in (".jsonl", *_OPENERS):
        return read_examples(path)
    return _read_hub(str(source), split)


def _read_hub(name: str, split: str) -> list[Example]:
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
    examples = [parse_example(row, f"{name}, row {number}") for number, row in enumerate(rows)]
    if not examples:
        raise TaskFormatError(f"{name}: its {split} split holds no examples.")
    return examples


def parse_example(row: Any, where: str) -> Example:
    """One row of a file or data set as an Example; `where` names it in a TaskFormatError."""
    if not isinstance(row, dict):
        raise TaskFormatError(f"{where}: holds {type(row).__name__}, a JSON object is wanted.")
    for first, second, separator in _FIELDS:
        if first in row and second in row:
            _want_text(row, where, first, second)
            return Example(row[first] + separator, row[second], _choices(row, second, where))
    if "text" in row:
        _want_text(row, where, "text")
        return Example("", row["text"])
    raise TaskFormatError(
        f"{where}: has the fields {', '.join(sorted(map(str, row))) or '(none)'}; wanted inputs "
        "and targets, or prompt and completion, or text."
    )


def _parse(line: str, where: str) -> Example:
    try:
        row = parse_json(line)
    except ValueError as error:
        raise TaskFormatError(f"{where}: is not JSON ({error}). Correct or remove it.") from None
    return parse_example(row, where)


def _want_text(row: dict[str, Any], where: str, *fields: str) -> None:
    for field in fields:
        if not isinstance(row[field], str):
            kind = type(row[field]).__name__
            raise TaskFormatError(f"{where}: {field} is a {kind}, text is wanted.")


def _choices(row: dict[str, Any], target: str, where: str) -> tuple[str, ...] | None:
    choices = row.get("choices")
    if choices is None:
        return None
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise TaskFormatError(f"{where}: choices is not a list of texts.")
    if row[target] not in choices:
        raise TaskFormatError(f"{where}: {target} is {row[target]!r}, which is not in choices.")
    return tuple(choices)


def encode(
    tokenizer: Any, prompt: str, target: str, *, max_length: int, seq2seq: bool = False
) -> Encoded:
    """Token ids of a prompt and its target; what is too long loses the prompt's beginning.

    The two parts are tokenised apart, so that the same target has the same ids after any prompt.
    For a decoder-only model `max_length` bounds both together, otherwise each.
    """
    target_ids = tokenizer(target, add_special_tokens=False)["input_ids"]
    target_ids = [*target_ids, tokenizer.eos_token_id][:max_length]
    prompt_ids = tokenizer(prompt)["input_ids"] if prompt or seq2seq else []
    room = max_length if seq2seq else max_length - len(target_ids)
    return Encoded(prompt_ids[max(0, len(prompt_ids) - room) :], target_ids)


def collate(
    encoded: Sequence[Encoded], *, pad: int, seq2seq: bool = False
) -> dict[str, Int[Tensor, "B L"]]:
    """A training batch padded on the right, with a loss on the targets only."""
    if seq2seq:
        inputs = [row.prompt for row in encoded]
        labels = [row.target for row in encoded]
    else:
        inputs = [row.prompt + row.target for row in encoded]
        labels = [[IGNORED] * len(row.prompt) + row.target for row in encoded]
    return {
        "input_ids": _padded(inputs, pad),
        "attention_mask": _padded([[1] * len(row) for row in inputs], 0),
        "labels": _padded(labels, IGNORED),
    }


def batches(
    encoded: Sequence[Encoded], batch_size: int, *, pad: int, seq2seq: bool = False, seed: int = 0
) -> "DataLoader[dict[str, Tensor]]":
    """Shuffled training batches, in an order that depends on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(
        list(encoded),  # type: ignore[arg-type]
        batch_size=min(batch_size, len(encoded)),
        shuffle=True,
        drop_last=True,
        generator=generator,
        collate_fn=lambda rows: collate(rows, pad=pad, seq2seq=seq2seq),
    )


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


def _padded(rows: list[list[int]], fill: int) -> Tensor:
    length = max(len(row) for row in rows)
    return torch.tensor([row + [fill] * (length - len(row)) for row in rows], dtype=torch.long)
