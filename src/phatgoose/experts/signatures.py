"""Signatures of an expert: vectors that routers need beside its adapter, gates among them."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Union, final

import torch
from jaxtyping import Float
from torch import Tensor

from phatgoose.errors import ExpertFormatError, IncompatibleExpertError
from phatgoose.experts.base import BaseIdentity
from phatgoose.experts.delta import Delta
from phatgoose.experts.kinds import GATES, KINDS, Kind
from phatgoose.experts.lora import adapter_hash, read_adapter
from phatgoose.experts.older import older_record
from phatgoose.experts.tensors import is_finite, read_tensors
from phatgoose.files import write_tensors
from phatgoose.reading import parse_json

__all__ = ["KINDS", "GateRecord", "Gates", "Signatures", "load_signatures", "vectors_hash"]

# The header has this one entry: of several, safetensors would write some order of its own.
HEADER = "phatgoose"
FORMAT_VERSION = 2


@dataclass(frozen=True)
class Signatures:
    """fp32 vectors [in_features] of one kind, by the module's name in the base."""

    kind: str  # one of KINDS
    vectors: Mapping[str, Float[Tensor, " I"]]
    base: BaseIdentity
    adapter: str  # content hash of the adapter they were made for
    examples: int = 0  # they were made of
    tokens: int = 0
    training: Mapping[str, Any] = field(default_factory=dict)  # how they were made: the settings
    steps: int = 0
    first_loss: float | None = None  # nats per target token, over the first step's batch
    last_loss: float | None = None

    def save(self, adapter_dir: str | Path) -> Path:
        """Write them beside the adapter they were made for, in one step; return the folder.

        Raises:
            ExpertFormatError: `adapter_dir` holds no readable PEFT LoRA.
            IncompatibleExpertError: it holds another adapter.
        """
        folder = Path(adapter_dir)
        _, modules = read_adapter(folder)
        self.check(modules, adapter_hash(modules), folder)
        return self.write(folder)

    def write(self, folder: Path) -> Path:
        """Save without looking at the adapter, for importers that just wrote it."""
        kind = KINDS[self.kind]
        vectors = {name: vector.float() for name, vector in self.vectors.items()}
        record = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "vectors"}
        record |= {"base": self.base.to_json(), "training": dict(self.training)}
        record |= {"format_version": FORMAT_VERSION, "vectors": vectors_hash(vectors)}
        write_tensors(folder / kind.file, vectors, {HEADER: json.dumps(record, sort_keys=True)})
        for name in kind.older:  # a reader no longer looks at them
            (folder / name).unlink(missing_ok=True)
        return folder

    def check(self, modules: Mapping[str, Delta], adapter: str, folder: Path | str) -> None:
        """Raise IncompatibleExpertError unless they belong to these modules, of this hash."""
        kind = KINDS[self.kind]
        again = f"Make them again: {kind.remedy(folder)}"
        if adapter != self.adapter:
            raise IncompatibleExpertError(
                f"{folder}: the {kind.words} were made for adapter {self.adapter[:12]}, the "
                f"adapter here is {adapter[:12]}. {again}. Or keep them beside the adapter that "
                "they were made for, in the dtype that it had."
            )
        for name, vector in self.vectors.items():
            features = modules[name].gate_features if name in modules else None
            if vector.ndim != 1 or (kind.follows_adapter and features not in (None, len(vector))):
                raise IncompatibleExpertError(
                    f"{folder}: the {kind.words} at {name} have shape {list(vector.shape)}, wanted "
                    f"[{features or 'in_features'}]. {again}"
                )
        if not kind.follows_adapter:
            return
        missing, extra = (
            sorted(set(modules) - set(self.vectors)),
            sorted(set(self.vectors) - set(modules)),
        )
        if missing or extra:
            names = missing or extra
            more = f" and {len(names) - 1} more modules" if len(names) > 1 else ""
            raise IncompatibleExpertError(
                f"{folder}: the {kind.words} {'lack' if missing else 'have unadapted'} "
                f"{names[0]}{more}. {again}"
            )


@dataclass(frozen=True)
class GateRecord:
    """What gates keep beside their vectors."""

    base: BaseIdentity
    adapter: str
    training: Mapping[str, Any] = field(default_factory=dict)
    steps: int = 0
    examples: int = 0
    tokens: int = 0
    first_loss: float | None = None
    last_loss: float | None = None


@final
@dataclass(frozen=True, init=False)
class Gates(Signatures):
    """The signatures that PHATGOOSE trains. Made of vectors and a record, or of its fields."""

    def __init__(
        self,
        vectors: Mapping[str, Float[Tensor, " I"]],
        record: GateRecord | None = None,
        **others: Any,
    ) -> None:
        given = {**others, **({} if record is None else vars(record))}
        super().__init__(**{**given, "kind": GATES, "vectors": vectors})

    @property
    def record(self) -> GateRecord:
        """All of them but the vectors."""
        return GateRecord(**{f.name: getattr(self, f.name) for f in fields(GateRecord)})

    @classmethod
    def load(cls, folder: str | Path) -> Union["Gates", None]:
        """Read the gates of an expert folder; None if it has none.

        Raises ExpertFormatError if they are damaged.
        """
        found = read_signatures(Path(folder), KINDS[GATES])
        assert found is None or isinstance(found, Gates)
        return found


def vectors_hash(vectors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names and fp32 values."""
    digest = hashlib.sha256()
    for name, vector in sorted(vectors.items()):
        digest.update(name.encode())
        digest.update(vector.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()


def load_signatures(folder: Path, modules: Mapping[str, Delta]) -> dict[str, Signatures]:
    """All kinds there are beside an adapter, checked against it and against each other.

    Raises ExpertFormatError where a file is damaged, IncompatibleExpertError where one belongs to
    another adapter, or to another base than the others.
    """
    read = [read_signatures(folder, kind) for kind in KINDS.values()]
    found = {signatures.kind: signatures for signatures in read if signatures}
    adapter = adapter_hash(modules) if found else ""
    for kind, signatures in found.items():
        signatures.check(modules, adapter, folder)
        first = next(iter(found.values()))
        difference = first.base.difference(signatures.base)
        if difference:
            raise IncompatibleExpertError(
                f"{folder}: the {KINDS[first.kind].words} and the {KINDS[kind].words} were made on "
                f"different bases: {difference}. Make both on one: {KINDS[kind].remedy(folder)}"
            )
    return found


def read_signatures(folder: Path, kind: Kind) -> Signatures | None:
    """One kind, as it is in the folder; None where it is not there.

    A record in the header counts alone. Only without one is the file that older releases wrote
    beside it looked at, so that what they left there never mixes with what this one wrote.
    """
    path = folder / kind.file
    if not any((folder / name).exists() for name in kind.files):
        return None
    vectors, metadata = read_tensors(path)
    try:
        if HEADER in metadata:
            record = _parse(metadata[HEADER])
        else:
            record = older_record(path, kind)
        expected = record.pop("vectors", None)
        found = _signatures(kind, vectors, record)
    except (KeyError, TypeError, ValueError) as error:
        raise ExpertFormatError(
            f"{path}: a field of its record is missing or unknown ({error}). Copy it again, update "
            f"phatgoose, or make it again: {kind.remedy(folder)}"
        ) from None
    for name, vector in vectors.items():
        if not is_finite(vector):
            raise ExpertFormatError(
                f"{path}: the {kind.words} at {name} hold NaN or infinite values. Make them again: "
                f"{kind.remedy(folder)}"
            )
    if vectors_hash(vectors) != expected:
        raise ExpertFormatError(
            f"{path}: holds other vectors than its record was written with (the hash differs). "
            f"Copy it again, or make it again: {kind.remedy(folder)}"
        )
    return found


def _parse(text: str) -> dict[str, Any]:
    record: dict[str, Any] = parse_json(text)
    version = record.pop("format_version") if isinstance(record, dict) else None
    if version != FORMAT_VERSION:
        raise ValueError(f"format_version is {version!r}, this release reads {FORMAT_VERSION}")
    if not isinstance(record["vectors"], str):
        raise TypeError(f"vectors is {record['vectors']!r}")
    return record


_TYPES: dict[str, tuple[type, ...]] = {
    "adapter": (str,),
    "examples": (int,),
    "tokens": (int,),
    "training": (dict,),
    "steps": (int,),
    "first_loss": (int, float, type(None)),
    "last_loss": (int, float, type(None)),
}


def _signatures(kind: Kind, vectors: dict[str, Tensor], record: dict[str, Any]) -> Signatures:
    """Raises KeyError, TypeError or ValueError where the record is not what it should be."""
    if record.pop("kind") != kind.name:
        raise ValueError(f"it is not of the kind {kind.name}")
    base = BaseIdentity.from_json(record.pop("base"))
    for name, value in record.items():
        if not isinstance(value, _TYPES[name]) or isinstance(value, bool):
            raise TypeError(f"{name} is {value!r}")
    vectors = {name: vector.float() for name, vector in vectors.items()}
    if kind.name == GATES:
        return Gates(vectors, base=base, **record)
    return Signatures(kind.name, vectors, base, **record)
