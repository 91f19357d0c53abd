"""One expert: a LoRA adapter, and its signatures."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType, MappingProxyType

from phatgoose.errors import ConfigError
from phatgoose.experts.base import BaseIdentity
from phatgoose.experts.delta import Delta
from phatgoose.experts.hub import locate
from phatgoose.experts.kinds import GATES
from phatgoose.experts.lora import read_adapter
from phatgoose.experts.signatures import Gates, Signatures, load_signatures
from phatgoose.experts.sources import default_name, split_name
from phatgoose.text import visible


@dataclass(frozen=True, init=False)
class Expert:
    """A trained adapter of one base, by name."""

    name: str
    modules: Mapping[str, Delta]  # by the module's name in the base
    base_name: str | None  # what the adapter's own config says it was trained on
    folder: Path | None
    signatures: Mapping[str, Signatures]  # by kind; gates are one

    def __init__(
        self,
        name: str,
        modules: Mapping[str, Delta],
        gates: Gates | EllipsisType | None = ...,
        base_name: str | None = None,
        folder: Path | None = None,
        signatures: Mapping[str, Signatures] = MappingProxyType({}),
    ) -> None:
        """`gates`, where given, stand in for those among `signatures`; None takes these away."""
        if not isinstance(gates, EllipsisType):
            others = {kind: found for kind, found in signatures.items() if kind != GATES}
            signatures = others if gates is None else {GATES: gates, **others}
        object.__setattr__(self, "name", name)  # as a frozen dataclass's own __init__ does
        object.__setattr__(self, "modules", modules)
        object.__setattr__(self, "base_name", base_name)
        object.__setattr__(self, "folder", folder)
        object.__setattr__(self, "signatures", signatures)

    @property
    def gates(self) -> Gates | None:
        found = self.signatures.get(GATES)
        assert found is None or isinstance(found, Gates)
        return found

    @property
    def base(self) -> BaseIdentity | None:
        """The base that its signatures were made on, or None if it has none."""
        return next((signatures.base for signatures in self.signatures.values()), None)


def load_expert(path_or_hub_id: str | Path, *, name: str | None = None) -> Expert:
    """Load an expert from a folder or a Hub id (`owner/name[/sub/folder][@revision]`).

    Its name is the folder's or the Hub id's, unless you give one, also as "NAME=PATH". A folder
    called checkpoint-N has the name of the run that it is in. An adapter without gates loads, too;
    the router says whether it needs them.

    Raises:
        ExpertNotFoundError: no such folder, and the Hub does not give it.
        ExpertFormatError: a file is missing, damaged, or not what the format says.
        UnsupportedAdapterError: a kind of adapter that is not computed, or a pickle.
        IncompatibleExpertError: a signature belongs to another adapter, or to another base than
            the others.
        ConfigError: its name has characters that cannot be seen.
    """
    given, place = split_name(path_or_hub_id)
    folder = locate(place)
    name = name or given or default_name(place)
    if visible(name) != name:
        raise ConfigError(
            f"{name}: the expert's name has characters that cannot be seen. Rename its folder, or "
            "name it: NAME=PATH."
        )
    config, modules = read_adapter(folder)
    return Expert(
        name=name,
        modules=modules,
        base_name=config.get("base_model_name_or_path"),
        folder=folder,
        signatures=load_signatures(folder, modules),
    )
