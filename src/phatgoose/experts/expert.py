"""One expert: a LoRA adapter, and its gates where it has them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from phatgoose.errors import IncompatibleExpertError
from phatgoose.experts.base import BaseIdentity
from phatgoose.experts.gates import Gates
from phatgoose.experts.hub import locate
from phatgoose.experts.lora import LoraModule, adapter_hash, read_adapter
from phatgoose.experts.signatures import Signatures, load_signatures


@dataclass(frozen=True)
class Expert:
    """A trained adapter of one base, by name."""

    name: str
    modules: Mapping[str, LoraModule]  # by the module's name in the base
    gates: Gates | None
    base_name: str | None  # what the adapter's own config says it was trained on
    folder: Path | None = None
    signatures: Mapping[str, Signatures] = field(default_factory=dict)  # by kind

    @property
    def base(self) -> BaseIdentity | None:
        """The base its gates or signatures were made on; None without any."""
        if self.gates:
            return self.gates.record.base
        return next((signatures.base for signatures in self.signatures.values()), None)


def load_expert(path_or_hub_id: str | Path, *, name: str | None = None) -> Expert:
    """Load an expert from a folder or a Hub id ("owner/name" or "owner/name@revision").

    Its name is the folder's, or the Hub id's, unless given. An adapter without gates loads too;
    the router says whether it needs them.

    Raises:
        ExpertNotFoundError: no such folder, and the Hub does not give it.
        ExpertFormatError: a file is missing, damaged, or not what the format says.
        UnsupportedAdapterError: DoRA, modules_to_save, biases, pickles and the like.
        IncompatibleExpertError: the gates belong to another adapter.
    """
    folder = locate(path_or_hub_id)
    config, modules = read_adapter(folder)
    gates = Gates.load(folder)
    if gates is not None:
        gates.check(modules, str(folder))
        found = adapter_hash(modules)
        if found != gates.record.adapter:
            raise IncompatibleExpertError(
                f"{folder}: its gates were trained for adapter {gates.record.adapter[:12]}, the "
                f"adapter here is {found[:12]}. Train the gates again: phatgoose gate {folder}"
            )
    is_local = Path(path_or_hub_id).is_dir()
    default = folder.resolve().name if is_local else str(path_or_hub_id).partition("@")[0]
    return Expert(
        name=name or default,
        modules=modules,
        gates=gates,
        base_name=config.get("base_model_name_or_path"),
        folder=folder,
        signatures=load_signatures(folder, modules),
    )
