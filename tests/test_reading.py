"""Files of strangers: of the right kind, no larger than they may be, and of one meaning."""

import json
import os
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phatgoose.errors import ExpertFormatError, TaskFormatError
from phatgoose.reading import (
    DEEPEST,
    LARGEST_FILE,
    LONGEST_NUMBER,
    open_regular,
    parse_json,
    read_json,
)


def loop(path):
    path.symlink_to(path.name)


def bind(path):
    with socket.socket(socket.AF_UNIX) as here:
        here.bind(str(path))


def punch(path, size=1 << 31):
    with open(path, "wb") as file:
        file.write(b"{}")
        file.truncate(size)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (os.mkdir, "is a folder"),
        (os.mkfifo, "is a pipe"),
        (bind, "is a pipe, a socket"),
        (lambda path: path.symlink_to("/dev/zero"), "or a device"),
        (loop, "cannot be opened"),
        (punch, "is a hole"),
        (lambda path: punch(path, LARGEST_FILE + 1), "more than"),
    ],
)
def test_only_files_are_opened(make, says, tmp_path):
    make(tmp_path / "x")
    with pytest.raises(ExpertFormatError, match=says):
        open_regular(tmp_path / "x")
    with pytest.raises(TaskFormatError, match=r"x: "):
        read_json(tmp_path / "x", error=TaskFormatError)


def test_a_name_with_nul_and_a_missing_file(tmp_path):
    with pytest.raises(ExpertFormatError, match="cannot be opened"):
        open_regular(tmp_path / "a\0b")
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "nothing")


def test_the_limit_is_the_limit(tmp_path):
    (tmp_path / "x").write_bytes(b"[   1]")
    assert read_json(tmp_path / "x", limit=6) == [1]
    with pytest.raises(ExpertFormatError, match="has 6 bytes, more than the 5"):
        read_json(tmp_path / "x", limit=5)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("NaN", "NaN is no number"),
        ('{"a": -Infinity}', "no number"),
        ("1e999", "too large"),
        ("9" * (LONGEST_NUMBER + 1), "digits is too large"),
        ("9" * 10_000, "digits is too large"),
        ('{"r": 1, "a": 2, "r": 3}', "'r' comes twice"),
        (r'"\ud800"', "surrogate"),
        (r'{"\uDFFF": 1}', "surrogate"),
        ("\ufeff{}", "byte order mark"),
        ("[" * (DEEPEST + 1), "deep"),
        ("[" * 100_000, "deep"),
        ('{"a":' * 100_000, "deep"),
        ('"' + "[" * 100 + '\\"' * 99, "Unterminated"),
        ("{'r': 1}", "quotes"),
        ("", "Expecting"),
    ],
)
def test_json_that_is_refused(text, says):
    with pytest.raises(ValueError, match=says):
        parse_json(text)


@pytest.mark.parametrize(
    "text",
    [
        "[" * DEEPEST + "]" * DEEPEST,
        '"' + "[" * 100 + '\\""',
        r'"\ud83d\ude00"',
        "[]" * 0 + "1e308",
    ],
)
def test_json_at_the_limits(text):
    assert parse_json(text) == json.loads(text)


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(plain)
def test_plain_json_reads_as_it_does_everywhere(value):
    assert parse_json(json.dumps(value)) == value
    assert parse_json(json.dumps(value, ensure_ascii=False)) == value


def test_many_brackets_side_by_side_are_not_deep():
    assert len(parse_json("[" + "[]," * 10_000 + "[]]")) == 10_001
