"""Vectors of an expert that cost no gate training, in files beside its adapter."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from phatgoose.errors import ExpertFormatError, IncompatibleExpertError
from phatgoose.experts.base import BaseIdentity
from phatgoose.experts.lora import LoraModule, adapter_hash, read_adapter
from phatgoose.experts.tensors import read_tensors
from phatgoose.files import write_tensors

# What each kind holds, and whether it depends on the adapter: one vector for each of its modules.
KINDS = {
    "average_activation": True,  # mean input of each adapted module, the expert applied
    "prompt_mean": False,  # mean input of the base's first linear module over prompts
    "arrow": True,  # top right singular vector of the adapter
}
FORMAT_VERSION = "1"


@dataclass(frozen=True)
class Signatures:
    """fp32 vectors [in_features] of one kind, by the module's name in the base."""

    kind: str  # one of KINDS
    vectors: Mapping[str, Float[Tensor, " I"]]
    base: BaseIdentity
    adapter: str  # content hash of the adapter
    examples: int = 0  # they were measured on
    tokens: int = 0

    def save(self, adapter_dir: str | Path) -> Path:
        """Write phatgoose_KIND.safetensors beside the adapter, atomically; return its path.

        Raises IncompatibleExpertError where the folder holds another adapter, ExpertFormatError
        where it holds none.
        """
        folder = Path(adapter_dir)
        _, modules = read_adapter(folder)
        path = folder / file_name(self.kind)
        self.check(modules, str(path))
        return self.write(folder)

    def write(self, folder: Path) -> Path:
        """Write the file without looking at the adapter; return its path."""
        path = folder / file_name(self.kind)
        about = {
            "format_version": FORMAT_VERSION,
            "kind": self.kind,
            "base": json.dumps(asdict(self.base), sort_keys=True),
            "adapter": self.adapter,
            "examples": str(self.examples),
            "tokens": str(self.tokens),
        }
        vectors = {name: vector.float() for name, vector in self.vectors.items()}
        write_tensors(path, vectors, {"format": "pt", **about})
        return path

    @classmethod
    def load(cls, path: Path) -> "Signatures":
        """Read one file. Raises ExpertFormatError where it is damaged or of another format."""
        vectors, about = read_tensors(path)
        try:
            if about["format_version"] != FORMAT_VERSION or about["kind"] not in KINDS:
                raise ValueError(f"format {about['format_version']}, kind {about['kind']!r}")
            return cls(
                kind=about["kind"],
                vectors={name: vector.float() for name, vector in vectors.items()},
                base=BaseIdentity(**json.loads(about["base"])),
                adapter=about["adapter"],
                examples=int(about["examples"]),
                tokens=int(about["tokens"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ExpertFormatError(
                f"{path}: its header is not one this release reads ({error}). Make it again: "
                f"phatgoose experts derive {path.parent}"
            ) from None

    def check(self, modules: Mapping[str, LoraModule], who: str) -> None:
        """Raise IncompatibleExpertError unless these belong to the adapter `modules`."""
        found = adapter_hash(modules)
        if found != self.adapter:
            raise IncompatibleExpertError(
                f"{who}: was made for adapter {self.adapter[:12]}, the adapter here is "
                f"{found[:12]}. Make it again: phatgoose experts derive"
            )
        if not KINDS[self.kind]:
            return
        for name, lora in modules.items():
            vector = self.vectors.get(name)
            if vector is None or list(vector.shape) != [lora.in_features]:
                shape = "nothing" if vector is None else f"shape {list(vector.shape)}"
                raise IncompatibleExpertError(
                    f"{who}: has {shape} for {name}, wanted [{lora.in_features}]. Make it again: "
                    "phatgoose experts derive"
                )


def file_name(kind: str) -> str:
    return f"phatgoose_{kind}.safetensors"


def load_signatures(folder: Path, modules: Mapping[str, LoraModule]) -> dict[str, Signatures]:
    """All kinds there are beside an adapter, checked against it."""
    found = {}
    for kind in KINDS:
        path = folder / file_name(kind)
        if path.exists():
            found[kind] = Signatures.load(path)
            found[kind].check(modules, str(path))
    return found
