"""Task files, good and bad, and their examples as token ids."""

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
    IGNORED,
    LONGEST_LINE,
    MOST_BLANK,
    Encoded,
    Example,
    batches,
    collate,
    encode,
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


class Characters:
    """A tokenizer whose ids are code points; a prompt begins with 2, an answer ends with 1."""

    eos_token_id = 1

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [2] * add_special_tokens + [ord(c) for c in text]}


def test_prompt_and_target_are_encoded_apart() -> None:
    a, b, c = map(ord, "abc")
    tokenizer = Characters()
    assert encode(tokenizer, "ab", "c", max_length=9) == Encoded([2, a, b], [c, 1])
    assert encode(tokenizer, "ab", "c", max_length=4) == Encoded([a, b], [c, 1])
    assert encode(tokenizer, "ab", "c", max_length=2) == Encoded([], [c, 1])
    assert encode(tokenizer, "ab", "cc", max_length=2) == Encoded([], [c, c])
    assert encode(tokenizer, "", "c", max_length=9) == Encoded([], [c, 1])
    # The two stacks of an encoder-decoder each have the whole length.
    assert encode(tokenizer, "ab", "c", max_length=2, seq2seq=True) == Encoded([a, b], [c, 1])
    assert encode(tokenizer, "", "c", max_length=2, seq2seq=True) == Encoded([2], [c, 1])


def test_batches_have_their_loss_on_targets() -> None:
    rows = [Encoded([5, 6, 7], [8, 1]), Encoded([5], [1])]
    batch = {key: value.tolist() for key, value in collate(rows, pad=0).items()}
    x = IGNORED
    assert batch == {
        "input_ids": [[5, 6, 7, 8, 1], [5, 1, 0, 0, 0]],
        "attention_mask": [[1] * 5, [1, 1, 0, 0, 0]],
        "labels": [[x, x, x, 8, 1], [x, 1, x, x, x]],
    }
    batch = {key: value.tolist() for key, value in collate(rows, pad=0, seq2seq=True).items()}
    assert batch == {
        "input_ids": [[5, 6, 7], [5, 0, 0]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
        "labels": [[8, 1], [1, x]],
    }


def test_the_seed_alone_orders_training_batches() -> None:
    rows = [Encoded([i], [1]) for i in range(10)]

    def order(seed: int) -> list[Any]:
        return [b["input_ids"][:, 0].tolist() for b in batches(rows, 3, pad=0, seed=seed)]

    assert order(0) == order(0) != order(1)
    assert [len(batch) for batch in order(0)] == [3, 3, 3]
    assert len(list(batches(rows[:2], 3, pad=0))) == 1  # fewer rows than a batch are one batch


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
