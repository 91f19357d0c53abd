"""What a stranger may have done to a file: bytes, JSON, tensors, or something that is no file.

Every function takes a `random.Random` first, and is the same for the same state of it.
"""

import gzip
import io
import json
import lzma
import os
import pickle
import socket
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch

TEXTS = [
    "",
    "x" * 10_000,
    "\x1b]0;owned\x07",
    "a\nCRITICAL b",
    "\u202egnp",
    "a\0b",
    "\ud800",
    "../..",
    "/dev/zero",
    "nan",
    "true",
    "5",
    "q_proj",
    "\ufeff",
    "é",
    "名",
    "__metadata__",
    "a.b.c",
    ".",
]
NUMBERS = [
    0,
    -1,
    1,
    3,
    5,
    2**31,
    2**63,
    10**39,
    10**400,
    1e308,
    -1e308,
    1e39,
    3e38,
    1e-320,
    0.5,
    5.0,
]
PATTERNS = [
    "(?:[a-z_.0-9]+)+!",
    "(a|a)*b",
    "(a*)*c",
    "q_proj",
    r".*\.q_proj",
    "^model",
    "(?=q)",
    "(q|k)_proj",
    "(" * 50,
    "[",
    "(((a{99}){99}){99})",
    r"layers\.\d+\..*q_proj",
    "(?i)Q_PROJ",
    r"(.)\1",
    ".*" * 50,
    "",
    "$",
    "q_proj$",
    "[^.]+_proj",
    "a{2,1}",
    "(?P<n>q)",
    "\\",
    r"\bq_proj",
    ".*.*.*.*.*.*.*.*=.*",
]
RAW = ["NaN", "Infinity", "-Infinity", "1e999", "9" * 5000, "[" * 100_000, '{"a":' * 5000, "01",
       "0x10", '"\\ud800"', "'a'", "//", "1e400", '{"a": 1, "a": 2}', "\ufeff"]  # fmt: skip
DTYPES = [
    "F16",
    "BF16",
    "F32",
    "F64",
    "F8_E4M3",
    "F8_E5M2",
    "I64",
    "U8",
    "BOOL",
    "C64",
    "F4",
    "F7",
    5,
    None,
]


def value(random: Random, depth: int = 0) -> Any:
    """Any value of JSON."""
    kind = random.randrange(9 if depth < 3 else 6)
    if kind == 0:
        return random.choice([None, True, False])
    if kind in (1, 2):
        return random.choice(NUMBERS)
    if kind in (3, 4):
        return random.choice(TEXTS)
    if kind == 5:
        return random.choice(PATTERNS)
    if kind == 6:
        return [value(random, depth + 1) for _ in range(random.randrange(4))]
    if kind == 7:
        return {
            str(random.choice(TEXTS)): value(random, depth + 1) for _ in range(random.randrange(3))
        }
    return {random.choice(PATTERNS): random.choice(NUMBERS) for _ in range(random.randrange(1, 4))}


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of everything in a tree of dicts and lists."""
    inside = (
        tree.items()
        if isinstance(tree, dict)
        else enumerate(tree)
        if isinstance(tree, list)
        else ()
    )
    return [path] * bool(path) + [p for key, child in inside for p in places(child, (*path, key))]


def tree(random: Random, data: Any, favourites: tuple[str, ...] = ()) -> Any:
    """Change one thing of a parsed JSON document."""
    data = json.loads(json.dumps(data))
    if isinstance(data, dict) and favourites and random.random() < 0.6:
        data[random.choice(favourites)] = value(random)
        return data
    found = places(data)
    if not found or random.random() < 0.03:
        return value(random)
    *way, key = random.choice(found)
    parent = data
    for step in way:
        parent = parent[step]
    action = random.randrange(5)
    if action == 0:
        del parent[key]
    elif action == 1 and isinstance(parent, dict):
        parent[random.choice(TEXTS)] = parent.pop(key)
    elif action == 2 and isinstance(parent, dict):
        parent[random.choice(TEXTS)] = value(random)
    else:
        parent[key] = value(random)
    return data


def dump(random: Random, data: Any) -> bytes:
    """A JSON document as text, as it should be or nearly."""
    text = json.dumps(data, ensure_ascii=random.random() < 0.8)
    if random.random() < 0.15:  # a value that json.dumps does not write
        spots = [i for i, c in enumerate(text) if c in ":,["] or [0]
        at = random.choice(spots) + 1
        text = text[:at] + random.choice(RAW) + text[at + random.randrange(3) :]
    if random.random() < 0.03:
        text = random.choice(["\ufeff", " ", "\0", "#"]) + text
    if random.random() < 0.03:
        text += random.choice(["}", "\0", "\n\n", text])
    encoding = random.choice(["utf-16", "latin-1"]) if random.random() < 0.02 else "utf-8"
    return text.encode(encoding, "surrogatepass" if encoding != "latin-1" else "replace")


def raw(random: Random, data: bytes) -> bytes:
    """Change bytes, without a thought of what they mean."""
    data = bytearray(data)
    for _ in range(random.choice([1, 1, 1, 2, 8])):
        at, size = random.randrange(len(data) + 1), random.choice([1, 2, 8, 100])
        action = random.randrange(7)
        if action == 0 and data:
            data[at % len(data)] ^= 1 << random.randrange(8)
        elif action == 1:
            del data[at:]
        elif action == 2:
            data[at:at] = random.randbytes(size)
        elif action == 3:
            data[at : at + size] = b""
        elif action == 4:
            data[at : at + size] = bytes(size)
        elif action == 5:
            data += data[at : at + size]
        else:
            data[at : at + size] = random.choice([b"\xff" * size, b"{" * size, b'"', b"NaN"])
    return bytes(data)


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """A safetensors file as header and values."""
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def join(header: bytes, values: bytes, size: int | None = None) -> bytes:
    return (len(header) if size is None else size).to_bytes(8, "little") + header + values


def tensors(random: Random, data: bytes, record: str | None = None) -> bytes:
    """Change what a safetensors file says: names, shapes, dtypes, values, its metadata."""
    header, values = split(data)
    names = [name for name in header if name != "__metadata__"]
    name, action = random.choice(names), random.randrange(12)
    if action < 3:
        values = numbers(random, values)
    elif action == 3:
        new = random.choice([*TEXTS, name.removeprefix("base_model.model."), name + "x", name[:-9]])
        header[new] = header[name] if random.random() < 0.5 else header.pop(name)
    elif action == 4:
        del header[name]
    elif action == 5:
        header[name]["dtype"] = random.choice(DTYPES)
    elif action == 6:
        shape = header[name]["shape"]
        shapes = [shape[::-1], [1, *shape], [], [0, *shape[1:]], [2**62, 4], [-1], value(random)]
        header[name]["shape"] = random.choice(shapes)
    elif action == 7:
        offsets = header[name]["data_offsets"]
        wrong = [offsets[::-1], [0, 2**40], [0, 0], [offsets[0], offsets[1] + 4], value(random)]
        header[name]["data_offsets"] = random.choice(wrong)
    elif action == 8 and record and record in header.get("__metadata__", {}):
        inside = json.loads(header["__metadata__"][record])
        changed = dump(random, tree(random, inside, tuple(inside)))
        header["__metadata__"][record] = changed.decode("utf-8", "replace")
    elif action == 9:
        header["__metadata__"] = random.choice([None, {}, {"a": "b"}, {"a": 5}, value(random)])
    elif action == 10:
        header = tree(random, header)
    else:
        wrong = [2**63, 2**32, 0, len(data), 8]
        return join(json.dumps(header).encode(), values, random.choice(wrong))
    return join(dump(random, header) if random.random() < 0.2 else plain(header), values)


def as_before(data: bytes, record: str) -> bytes:
    """The same in the format of release 0.1, which had no hash of the values."""
    header, values = split(data)
    known = json.loads(header["__metadata__"][record])
    about = {"format_version": "1", "base": json.dumps(known["base"])}
    about |= {key: str(known[key]) for key in ("kind", "adapter", "examples", "tokens")}
    return join(plain({**header, "__metadata__": about}), values)


def plain(header: Any) -> bytes:
    return json.dumps(header).encode("utf-8", "surrogatepass")


def numbers(random: Random, values: bytes) -> bytes:
    """Change float32 values: a few, to something that is hard on arithmetic."""
    found = torch.frombuffer(bytearray(values), dtype=torch.float32).clone()
    nasty = [float("nan"), float("inf"), float("-inf"), 3e38, 1e30, 1e-45, 0.0, -0.0, 1.5]
    for _ in range(random.choice([1, 1, 4])):
        found[random.randrange(len(found))] = random.choice(nasty)
    if random.random() < 0.1:
        found *= random.choice([1e20, 1e38, 0.0])
    return found.numpy().tobytes()


def no_file(random: Random, path: Path) -> None:
    """Put something else in a file's place."""
    path.unlink(missing_ok=True)
    kind = random.randrange(10)
    if kind == 0:
        os.mkfifo(path)
    elif kind == 1:
        path.mkdir()
    elif kind == 2:
        path.symlink_to(path.name)
    elif kind == 3:
        path.symlink_to(random.choice(["/dev/zero", "/dev/urandom", "/dev/full", "/nowhere", "."]))
    elif kind == 4:
        with socket.socket(socket.AF_UNIX) as here:
            here.bind(os.path.relpath(path))  # its path may have 107 characters
    elif kind in (5, 6):
        with open(path, "wb") as file:
            file.write(random.choice([b"{}", (64).to_bytes(8, "little") + b"{}", b"\n"]))
            file.truncate(random.choice([1 << 31, 1 << 40]))
    elif kind == 7:
        path.write_bytes(b"")
    elif kind == 8:
        path.write_bytes(random.randbytes(random.randrange(300)))


def lines(random: Random, rows: list[Any]) -> bytes:
    """Rows of a task, as a file of them."""
    texts = [json.dumps(row).encode() for row in rows]
    for _ in range(random.randrange(3)):
        at = random.randrange(len(texts))
        texts[at] = dump(random, tree(random, rows[at % len(rows)], tuple(rows[at % len(rows)])))
    if random.random() < 0.1:
        texts.insert(
            random.randrange(len(texts)), random.choice([b"", b"[]", b"5", b"\xff", b"{" * 9999])
        )
    return random.choice([b"\n"] * 9 + [b"\r"]).join(texts) + b"\n" * random.randrange(3)


def packed(random: Random, data: bytes) -> tuple[str, bytes]:
    """A suffix, and the data as such a file."""
    suffix: str = random.choice(["", "", ".gz", ".xz"])
    if random.random() < 0.01:
        data = random.choice(
            [b"\n" * 2_000_000, b" " * (1 << 26) + b" ", b'{"text": "a"}\n' * 100_000]
        )
    packs: dict[str, Callable[[bytes], bytes]] = {
        "": bytes,
        ".gz": gzip.compress,
        ".xz": lzma.compress,
    }
    data = packs[suffix](data)
    return suffix, raw(random, data) if random.random() < 0.3 else data


class Asks:
    """Pickled, it asks whoever opens it to make a folder."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("/tmp/phatgoose-fuzz-ran",)


def published(random: Random, pool: dict[str, torch.Tensor]) -> bytes:
    """A published pool as a file, with one thing of it changed."""
    pool = dict(pool)
    key = random.choice(list(pool))
    tensor, action = pool[key], random.randrange(16)
    changes: dict[int, Callable[[], Any]] = {
        0: lambda: tensor * float("nan"),
        1: lambda: tensor.double() * 1e300,
        2: lambda: (
            tensor.flatten()[:1].clone().expand(random.choice([tensor.shape, (10**9, 10**9)]))
        ),
        3: lambda: tensor.to_sparse(),
        4: lambda: torch.empty(random.choice([tensor.shape, (10**9, 10**9)]), device="meta"),
        5: lambda: tensor.int(),
        6: lambda: tensor.T if tensor.ndim == 2 else tensor[None],
        7: lambda: tensor[:0],
        8: lambda: tensor.to(random.choice([torch.float16, torch.bfloat16, torch.float8_e4m3fn])),
        9: lambda: random.choice([None, 5, "x", [tensor], {"a": tensor}, float("nan")]),
        10: lambda: Asks(),
    }
    if action in changes:
        pool[key] = changes[action]()
    elif action == 11:
        new = random.choice(
            [*TEXTS, key + "0", key[:-1] + "9" * 5000, key.replace("block", "\x1b"), 5, ()]
        )
        pool[new] = pool.pop(key)
    elif action == 12:
        del pool[key]
    content: Any = (
        pool if random.random() < 0.95 else random.choice([[pool], None, tensor, {"a": pool}])
    )
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=random.random() < 0.97)
    data = file.getvalue()
    if action == 13 and zipfile.is_zipfile(io.BytesIO(data)):
        data = repacked(random, data)
    return raw(random, data) if action in (14, 15) else data


def repacked(random: Random, data: bytes) -> bytes:
    """The archive packed again: deflated, with another pickle, or with a part left out."""
    file = io.BytesIO()
    how = random.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(file, "w", how) as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith("data.pkl") and random.random() < 0.7:
                bombs = [
                    pickle.dumps(Asks()),
                    b"(" * 10_000,
                    b"\x80\x02" + b"]" * 99_999,
                    raw(random, content),
                ]
                content = random.choice(bombs)
            if random.random() > 0.05:
                new.writestr(random.choice([name, name, name, "constants.pkl"]), content)
    return file.getvalue()
