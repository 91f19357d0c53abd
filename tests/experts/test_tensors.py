"""Safetensors files of strangers: what their headers may say."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from phatgoose.errors import ExpertFormatError
from phatgoose.experts.tensors import LARGEST_HEADER, is_finite, largest, read_tensors

FOUR = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


def with_header(path, header, data=b"\0" * 4):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


@pytest.mark.parametrize(
    ("header", "says"),
    [
        (b'{"a": %s, "a": %s}' % ((json.dumps(FOUR).encode(),) * 2), "'a' comes twice"),
        ({"a": {**FOUR, "dtype": "F7"}}, "F7"),
        ({"a": {**FOUR, "dtype": "I32"}}, "I32"),
        ({"a": {**FOUR, "dtype": "BOOL"}}, "BOOL"),
        ({"a": {**FOUR, "dtype": 7}}, "floats are wanted"),
        ({"a": {**FOUR, "dtype": {"F32": 1}}}, "floats are wanted"),
        ({"a": 7}, "floats are wanted"),
        ({"a\x00b": FOUR}, r"a\\x00b.* cannot be seen"),
        ({"\x1b]0;x\x07": FOUR}, "cannot be seen"),
        ([], "no JSON object"),
        (b"[" * 100_000, "deep"),
        ({"a": {**FOUR, "shape": [2]}}, "not a readable safetensors"),
        ({"a": {**FOUR, "shape": [1 << 63, 1 << 63]}}, "not a readable safetensors"),
        ({"a": {**FOUR, "data_offsets": [0, 1 << 40]}}, "not a readable safetensors"),
    ],
)
def test_headers_that_are_refused(header, says, tmp_path, one_line):
    path = with_header(tmp_path / "x.safetensors", header)
    with pytest.raises(ExpertFormatError, match=says) as info:
        read_tensors(path)
    assert one_line(info).startswith(str(path))


def test_a_header_longer_than_any(tmp_path):
    path = tmp_path / "x.safetensors"
    with open(path, "wb") as file:
        file.write((LARGEST_HEADER + 1).to_bytes(8, "little"))
        file.truncate(1 << 20)
    with pytest.raises(ExpertFormatError, match="its header says"):
        read_tensors(path)


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda p: p.symlink_to(p.name)])
def test_what_is_no_file(make, tmp_path):
    make(tmp_path / "x.safetensors")
    with pytest.raises(ExpertFormatError, match=r"x\.safetensors: "):
        read_tensors(tmp_path / "x.safetensors")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_keeps_its_values(dtype, tmp_path):
    every = torch.arange(256, dtype=torch.uint8).view(dtype)
    every = every[every.float().isfinite()]
    save_file({"a": every}, tmp_path / "x.safetensors")
    found = read_tensors(tmp_path / "x.safetensors")[0]["a"]
    assert found.dtype == torch.bfloat16 and torch.equal(found.float(), every.float())


@pytest.mark.parametrize(
    ("values", "value", "finite"),
    [
        ([], 0.0, True),
        ([-3.0, 2.0], 3.0, True),
        ([1.0, float("nan")], None, False),
        ([float("-inf")], float("inf"), False),
        ([1e39], 1e39, False),
        ([3.4e38], 3.4e38, True),
    ],
)
def test_largest(values, value, finite):
    tensor = torch.tensor(values, dtype=torch.float64)
    assert is_finite(tensor) is finite
    assert value is None or largest(tensor) == value
