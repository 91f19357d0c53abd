"""Reading files of strangers: of the right kind, no larger than they may be, parsed as they say."""

import json
import math
import os
import re
import stat
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO

from phatgoose.errors import ExpertFormatError, PhatgooseError

LARGEST_JSON = 32 << 20  # bytes; the config of an adapter of 100,000 modules has half of it
LARGEST_FILE = 1 << 36  # bytes; the largest pool published in one file has 30 GB
DEEPEST = 64  # brackets within brackets
LONGEST_NUMBER = 40  # digits
_DENSE = 1 << 30  # bytes; only larger files are asked for holes
_BRACKETS = re.compile(r'\\.|["\[\]{}]', re.DOTALL)


def open_regular(
    path: Path, *, limit: int = LARGEST_FILE, error: type[PhatgooseError] = ExpertFormatError
) -> BinaryIO:
    """Open a file to read, if it is one and has at most `limit` bytes.

    A pipe, a device, a folder and a file of holes are refused without a byte being read.

    Raises FileNotFoundError where there is nothing, `error` for all else.
    """
    try:
        problem = _not_a_file(os.stat(path), limit)  # opening a device may already do something
        # Without O_NONBLOCK a pipe that comes in between would be waited for.
        handle = None if problem else os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as failure:  # ValueError: a NUL in the path
        reason = getattr(failure, "strerror", None) or failure
        raise error(f"{path}: cannot be opened ({reason}). Give a file that can be read.") from None
    if handle is not None:
        problem = _not_a_file(os.fstat(handle), limit)
        if problem is None:
            return os.fdopen(handle, "rb")
        os.close(handle)
    raise error(f"{path}: {problem}")


def check_regular(
    path: Path, *, limit: int = LARGEST_FILE, error: type[PhatgooseError] = ExpertFormatError
) -> None:
    """Raise what `open_regular` raises, for a file that a library opens by its path."""
    open_regular(path, limit=limit, error=error).close()


def _not_a_file(found: os.stat_result, limit: int) -> str | None:
    if not stat.S_ISREG(found.st_mode):
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe, a socket or a device"
        return f"is {kind}, a file is wanted. Put the file itself there."
    if found.st_size > limit:
        return (
            f"has {found.st_size} bytes, more than the {limit} that such a file may have, so it "
            "was not read. Is it the right file?"
        )
    blocks = getattr(found, "st_blocks", 0) * 512  # some file systems count none
    if found.st_size > _DENSE and 0 < blocks < found.st_size // 64:
        return (
            f"says it has {found.st_size} bytes and takes {blocks} on the disk, so nearly all of "
            "it is a hole. It was not read. Copy or download it again."
        )
    return None


def read_json(
    path: Path, *, limit: int = LARGEST_JSON, error: type[PhatgooseError] = ExpertFormatError
) -> Any:
    """The content of a JSON file. Raises FileNotFoundError where there is none, else `error`."""
    with open_regular(path, limit=limit, error=error) as file:
        data = file.read(limit + 1)
    try:
        return parse_json(data.decode())
    except ValueError as problem:
        raise error(f"{path}: not readable as JSON ({problem}). Copy it again.") from None


def parse_json(text: str) -> Any:
    """Parse what the JSON of a stranger may be: RFC 8259, and one meaning to every reader.

    Raises ValueError, and nothing else, for NaN and infinities (numbers too large for a double
    too), integers of more than `LONGEST_NUMBER` digits, a field that comes twice, half a surrogate
    pair, a byte order mark, and brackets deeper than `DEEPEST`.
    """
    if text.startswith("\ufeff"):
        raise ValueError("it begins with a byte order mark, which JSON has not")
    if text.count("[") + text.count("{") > DEEPEST and _is_deep(text):
        raise ValueError(f"it has brackets more than {DEEPEST} deep")
    found = _DECODER.decode(text)
    if "\\ud" in text or "\\uD" in text or not text.isascii():
        _check_pairs(found)
    return found


def _is_deep(text: str) -> bool:
    depth, quoted = 0, False
    for match in _BRACKETS.finditer(text):
        token = match[0]
        if token == '"':
            quoted = not quoted
        elif not quoted and token in "[{":
            depth += 1
            if depth > DEEPEST:
                return True
        elif not quoted and token in "]}":
            depth -= 1
    return False


def _check_pairs(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("a text in it has half a surrogate pair") from None


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        (twice, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the field {twice!r} comes twice")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number in JSON")


def _finite(text: str) -> float:
    if math.isinf(value := float(text)):
        raise ValueError(f"{text[:LONGEST_NUMBER]} is too large")
    return value


def _integer(text: str) -> int:
    if len(text) > LONGEST_NUMBER:
        raise ValueError(f"a number of {len(text)} digits is too large")
    return int(text)


_DECODER = json.JSONDecoder(
    object_pairs_hook=_distinct,
    parse_constant=_no_constant,
    parse_float=_finite,
    parse_int=_integer,
)
