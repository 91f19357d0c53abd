"""The gates of one expert: one vector per adapted module, and how they were trained."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from phatgoose.errors import ExpertFormatError, IncompatibleExpertError
from phatgoose.experts.base import BaseIdentity
from phatgoose.experts.lora import LoraModule, adapter_hash, read_adapter
from phatgoose.experts.tensors import read_tensors
from phatgoose.files import write_bytes, write_json, write_tensors

GATES_FILE = "phatgoose_gates.safetensors"
CONFIG_FILE = "phatgoose_config.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class GateRecord:
    """What phatgoose_config.json says about the gates beside it."""

    base: BaseIdentity
    adapter: str  # content hash of the adapter the gates were trained for
    training: Mapping[str, Any] = field(default_factory=dict)  # the settings
    steps: int = 0
    examples: int = 0
    tokens: int = 0
    first_loss: float | None = None  # nats per target token, over the first step's batch
    last_loss: float | None = None


@dataclass(frozen=True)
class Gates:
    """One fp32 vector [in_features] per adapted module, by the module's name in the base."""

    vectors: Mapping[str, Float[Tensor, " I"]]
    record: GateRecord

    def save(self, adapter_dir: str | Path) -> Path:
        """Write the gates beside the adapter they were trained for; return the folder.

        Raises:
            ExpertFormatError: `adapter_dir` holds no readable PEFT LoRA.
            IncompatibleExpertError: it holds another adapter than the one trained on.
        """
        folder = Path(adapter_dir)
        _, modules = read_adapter(folder)
        found = adapter_hash(modules)
        if found != self.record.adapter:
            raise IncompatibleExpertError(
                f"{folder}: holds adapter {found[:12]}, these gates were trained for "
                f"{self.record.adapter[:12]}. Save them beside the adapter they were trained on, "
                "in the dtype it was trained on."
            )
        self.check(modules, str(folder))
        return self.write(folder)

    def write(self, folder: Path) -> Path:
        """Write both files without looking at the adapter: for importers that just wrote it."""
        vectors = {name: vector.float() for name, vector in self.vectors.items()}
        config = {
            "format_version": FORMAT_VERSION,
            **asdict(self.record),
            "gates": gates_hash(vectors),
        }
        gates = folder / GATES_FILE
        before = gates.read_bytes() if gates.exists() else None
        write_tensors(gates, vectors, {"format": "pt"})
        try:
            write_json(folder / CONFIG_FILE, config)
        except BaseException:  # an interrupt too: the two files change together or not at all
            gates.unlink() if before is None else write_bytes(gates, before)
            raise
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> "Gates | None":
        """Read the gates of an expert folder; None where it has none.

        Raises ExpertFormatError where one of the two files is missing, damaged, or not written
        together with the other.
        """
        folder = Path(folder)
        gates_path, config_path = folder / GATES_FILE, folder / CONFIG_FILE
        if not gates_path.exists() and not config_path.exists():
            return None
        record, expected = _read_record(config_path)
        vectors, _ = read_tensors(gates_path)
        if gates_hash(vectors) != expected:
            raise ExpertFormatError(
                f"{gates_path}: is not the file {CONFIG_FILE} was written with (its hash differs). "
                "Copy both files again, or train the gates again."
            )
        return cls(vectors, record)

    def check(self, modules: Mapping[str, LoraModule], who: str) -> None:
        """Raise IncompatibleExpertError unless there is one gate of the right size per module."""
        missing, extra = (
            sorted(set(modules) - set(self.vectors)),
            sorted(set(self.vectors) - set(modules)),
        )
        if missing or extra:
            kind, names = ("no gate for", missing) if missing else ("a gate for unadapted", extra)
            raise IncompatibleExpertError(
                f"{who}: {kind} {names[0]}"
                + (f" and {len(names) - 1} more modules" if len(names) > 1 else "")
                + ". Train the gates again for this adapter."
            )
        for name, vector in self.vectors.items():
            wanted = [modules[name].in_features]
            if list(vector.shape) != wanted:
                raise IncompatibleExpertError(
                    f"{who}: the gate of {name} has shape {list(vector.shape)}, wanted {wanted}. "
                    "Train the gates again for this adapter."
                )


def gates_hash(vectors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names and fp32 values."""
    digest = hashlib.sha256()
    for name, vector in sorted(vectors.items()):
        digest.update(name.encode())
        digest.update(vector.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()


def _read_record(path: Path) -> tuple[GateRecord, str]:
    """Parse phatgoose_config.json into the record and the expected hash of the gates."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ExpertFormatError(f"{path.parent}: has {GATES_FILE} but no {path.name}.") from None
    except (OSError, ValueError) as error:
        raise ExpertFormatError(f"{path}: not readable as JSON ({error}). Copy it again.") from None
    if not isinstance(config, dict):
        raise ExpertFormatError(f"{path}: holds {type(config).__name__}, a JSON object is wanted.")
    version = config.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise ExpertFormatError(
            f"{path}: format_version is {version!r}, this release reads {FORMAT_VERSION}. "
            "Update phatgoose, or train the gates again."
        )
    try:
        expected = config.pop("gates")
        record = GateRecord(**{**config, "base": BaseIdentity(**config["base"])})
        if not isinstance(record.adapter, str):
            raise TypeError(f"adapter is {record.adapter!r}")
        return record, expected
    except (KeyError, TypeError) as error:
        raise ExpertFormatError(
            f"{path}: a field is missing or unknown ({error}). Copy it again, or update phatgoose."
        ) from None
