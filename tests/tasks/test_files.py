"""Task files, good and bad."""

import gzip
import json
import lzma
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from phatgoose.errors import TaskFormatError
from phatgoose.tasks import (
    LONGEST_LINE,
    MOST_BLANK,
    Example,
    load_examples,
    read_examples,
    split_file,
    task_folders,
)

ROW = b'{"text": "' + 200 * b"a" + b'"}\n'
GOOD = {"inputs": "Is it?", "targets": "yes", "choices": ["yes", "no"], "template": 0}
OPENERS: dict[str, Callable[..., Any]] = {"": open, ".xz": lzma.open, ".gz": gzip.open}


def write(path: Path, *lines: Any) -> Path:
    with OPENERS.get(path.suffix, open)(path, "wt", encoding="utf-8") as file:
        file.writelines((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.xz", "a.jsonl.gz"])
def test_every_form_of_line_and_file(name: str, tmp_path: Path) -> None:
    path = write(
        tmp_path / name,
        GOOD,
        "",
        {"inputs": "é\n", "targets": "", "choices": None},
        {"prompt": "Say: ", "completion": "hi"},
        {"text": "all of it"},
    )
    assert read_examples(path) == [
        Example("Is it?\n", "yes", ("yes", "no")),
        Example("é\n\n", ""),
        Example("Say: ", "hi"),
        Example("", "all of it"),
    ]
    assert read_examples(str(path), limit=2) == read_examples(path)[:2]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"inputs": "a", "targets": ', "is not JSON"),
        ("not json", "is not JSON"),
        ("[1, 2]", "holds list"),
        ('"text"', "holds str"),
        ("null", "holds NoneType"),
        ({}, "(none)"),
        ({"inputs": "a"}, "has the fields inputs"),
        ({"targets": "a", "prompt": "b"}, "wanted inputs and targets"),
        ({"inputs": 3, "targets": "a"}, "inputs is a int"),
        ({"inputs": "a", "targets": None}, "targets is a NoneType"),
        ({"prompt": "a", "completion": ["b"]}, "completion is a list"),
        ({"text": 1}, "text is a int"),
        ({**GOOD, "choices": "yes"}, "choices is not a list of texts"),
        ({**GOOD, "choices": ["yes", 1]}, "choices is not a list of texts"),
        ({**GOOD, "choices": []}, "not in choices"),
        ({**GOOD, "targets": "Yes"}, "'Yes', which is not in choices"),
    ],
)
def test_a_bad_line_is_named(line: Any, words: str, tmp_path: Path) -> None:
    path = write(tmp_path / "test.jsonl", GOOD, "", line, GOOD)
    with pytest.raises(TaskFormatError) as raised:
        read_examples(path)
    message = str(raised.value)
    assert message.startswith(f"{path}, line 3: ") and words in message and "\n" not in message
    assert len(read_examples(path, limit=1)) == 1  # what is not read is not judged


@pytest.mark.parametrize("content", [b"", b"\n \n\n"], ids=["empty", "blank"])
def test_a_file_without_examples(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(TaskFormatError, match="holds no examples"):
        read_examples(path)


def test_what_an_editor_on_windows_writes(tmp_path: Path) -> None:
    path, line = tmp_path / "a.jsonl", json.dumps({"prompt": "é", "completion": "x\ny"})
    path.write_bytes(b"\xef\xbb\xbf" + f"{line}\r\n\r\n{line}\r\n".encode())
    assert read_examples(path) == [Example("é", "x\ny")] * 2
    path.write_bytes(path.read_bytes() * 2)  # two such files, one after the other
    assert len(read_examples(path)) == 4
    path.write_bytes(line.encode("utf-16"))
    with pytest.raises(TaskFormatError, match="after line 0: cannot be read .* in UTF-8"):
        read_examples(path)


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.json.gz"])
def test_one_array(name: str, indent: int | None, tmp_path: Path) -> None:
    """As Alpaca's and ShareGPT's own files are."""
    rows = [{"text": "one"}, GOOD]
    path = write(tmp_path / name, "", json.dumps(rows, indent=indent))
    assert load_examples(path) == [Example("", "one"), Example("Is it?\n", "yes", ("yes", "no"))]
    write(path, json.dumps([{"text": "one"}, {"texts": "two"}], indent=indent))
    with pytest.raises(TaskFormatError, match=r"item 2: has the fields texts; wanted"):
        read_examples(path)
    assert len(read_examples(path, limit=1)) == 1
    write(path, "[]")
    with pytest.raises(TaskFormatError, match="holds no examples"):
        read_examples(path)


def test_an_array_that_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phatgoose.tasks.files.LONGEST_ARRAY", 30)
    path = write(tmp_path / "a.json", json.dumps([{"text": "one"}] * 9, indent=1))
    with pytest.raises(TaskFormatError, match="one array of more than 30 characters"):
        read_examples(path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(TaskFormatError, match=r"a\.jsonl: no such file"):
        read_examples(tmp_path / "a.jsonl")
    with pytest.raises(TaskFormatError, match="is a folder"):
        read_examples(tmp_path)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: path.write_bytes(gzip.compress(b"\n" * (MOST_BLANK + 2))), "does not end"),
        (lambda path: path.write_bytes(gzip.compress(b" " * (LONGEST_LINE + 2))), "does not end"),
        (lambda path: path.write_bytes(gzip.compress(ROW * 100_000)), "more than 200 times"),
        (lambda path: path.write_bytes(gzip.compress(b"[" * 100_000)), "line 1: is not JSON"),
        (lambda path: path.write_bytes(gzip.compress(ROW[:-2] + b',"text":"b"}')), "twice"),
        (lambda path: path.write_bytes(gzip.compress(b'{"text": "\\ud800"}')), "surrogate"),
        (os.mkfifo, "is a pipe"),
    ],
)
def test_a_file_that_would_not_end(make: Any, says: str, tmp_path: Path) -> None:
    make(tmp_path / "a.jsonl.gz")
    with pytest.raises(TaskFormatError, match=says):
        read_examples(tmp_path / "a.jsonl.gz")


def test_a_small_file_may_be_packed_to_almost_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(ROW * 20_000))
    assert len(read_examples(tmp_path / "a.jsonl.gz")) == 20_000


@pytest.mark.parametrize("suffix", ["xz", "gz"])
def test_damaged_files(suffix: str, tmp_path: Path) -> None:
    """Cut short, overwritten, or never compressed: each is said, with the file and the line."""
    rows = [{**GOOD, "inputs": f"Is it {i * i}?"} for i in range(2000)]
    path = write(tmp_path / f"a.jsonl.{suffix}", *rows)
    whole = path.read_bytes()
    middle = len(whole) // 2
    damaged = whole[:middle] + bytes(64) + whole[middle + 64 :]
    for content in (whole[: len(whole) * 3 // 4], damaged, b"{}", json.dumps(GOOD).encode()):
        path.write_bytes(content)
        with pytest.raises(TaskFormatError) as raised:
            read_examples(path)
        assert str(raised.value).startswith(f"{path}, ")
        assert " line " in str(raised.value) and "\n" not in str(raised.value)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b'\n{"text": "\xff\xfe"}\n')
    with pytest.raises(TaskFormatError, match="cannot be read") as raised:
        read_examples(path)
    assert str(path) in str(raised.value)


def test_task_folders_are_found(tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "test.jsonl.xz", GOOD)
    (tmp_path / "notes").mkdir()
    assert list(task_folders([tmp_path])) == [tmp_path / "a", tmp_path / "b"]
    assert list(task_folders([tmp_path / "b"])) == [tmp_path / "b"]
    assert split_file(tmp_path / "a", "train") is None
    with pytest.raises(TaskFormatError, match="no task here"):
        list(task_folders([tmp_path / "notes"]))


def test_a_task_whose_name_cannot_be_seen(tmp_path: Path) -> None:
    (tmp_path / "a\x1b[2K").mkdir()
    write(tmp_path / "a\x1b[2K" / "test.jsonl", GOOD)
    with pytest.raises(TaskFormatError, match=r"a\\x1b\[2K: its name"):
        list(task_folders([tmp_path]))
