"""experts list, verify, merge, convert, import, push, pull."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from phatgoose.cli.fields import Command, argument, option
from phatgoose.cli.options import JsonOption, SameBaseOption, TrustOption

EXPERTS = (
    "experts: their folders, trees of such folders, or Hub ids (owner/name[/folder][@revision]); "
    "NAME=EXPERT names one"
)


@dataclass(frozen=True, kw_only=True)
class List(JsonOption):
    """List experts, and how they were made."""

    experts: Sequence[str] = argument(
        f"{EXPERTS}; without any, those in the package",
        default=(),
        nargs="*",
        metavar="EXPERT",
    )


@dataclass(frozen=True, kw_only=True)
class Verify(SameBaseOption, TrustOption, JsonOption):
    """Check experts, and say what is wrong with them."""

    experts: Sequence[str] = argument(EXPERTS, metavar="EXPERT")
    base: str | None = option(
        "base model to check names and sizes of modules against too", default=None
    )


@dataclass(frozen=True, kw_only=True)
class Merge(SameBaseOption, TrustOption, JsonOption):
    """Make one adapter out of several."""

    experts: Sequence[str] = argument(EXPERTS, metavar="EXPERT")
    out: Path = option("folder of the merged adapter")
    method: str = option(
        "how: average (of the products B A), or PEFT's linear, ties, dare_linear, dare_ties or "
        "magnitude_prune, the last four also with _svd behind",
        default="average",
    )
    rank: int | None = option(
        "rank of the merged adapter; without it, average takes the sum of the experts' ranks, and "
        "_svd methods the largest",
        default=None,
    )
    weights: Sequence[float] | None = option(
        "weights of the experts, a number for each; without it, all weigh the same", default=None
    )
    density: float | None = option(
        "share of the entries that methods with pruning keep; without it, 0.2", default=None
    )
    seed: int = option("seed of what the dare methods drop", default=0)
    base: str | None = option(
        "base model to check names and sizes of modules against, to name in the merged config, and "
        "to merge adapters on that depend on its weights (DoRA, say)",
        default=None,
    )


@dataclass(frozen=True, kw_only=True)
class Convert(TrustOption, JsonOption):
    """Make a plain LoRA folder of an adapter that is something else."""

    expert: str = argument("the adapter's folder or Hub id")
    out: Path = option("folder of the plain LoRA")
    base: str | None = option(
        "base model; without it, only LoRA by the names that its modules have is converted",
        default=None,
    )
    bin: bool = option(
        "read adapter_model.bin, a pickle, where there is no adapter_model.safetensors; torch's "
        "reader for weights alone opens it, which runs no code of it",
        default=False,
    )
    rank: int | None = option(
        "rank of what is no LoRA; without it, as many as the difference needs",
        default=None,
        least=1,
    )


@dataclass(frozen=True, kw_only=True)
class Import(JsonOption):
    """Turn the authors' best.pt into expert folders."""

    checkpoint: Path = argument("best.pt of P3_Phatgoose or FLAN_Phatgoose")
    base: str = option("base model that the checkpoint is of, google/t5-xl-lm-adapt for example")
    out: Path = option("folder to put the experts' folders in")


@dataclass(frozen=True, kw_only=True)
class Push(JsonOption):
    """Upload an expert to the Hub."""

    expert: Path = argument("the expert's folder")
    hub_id: str = argument("where to put it, as owner/name[/folder][@branch]")
    private: bool = option("make the repository private, if it is new", default=False)


@dataclass(frozen=True, kw_only=True)
class Pull(JsonOption):
    """Download an expert from the Hub."""

    hub_id: str = argument("the expert, as owner/name[/folder][@revision]")
    out: Path = option("folder to put it in")


COMMANDS = (
    Command("experts list", List, run="experts:list_experts"),
    Command("experts verify", Verify, run="experts:verify"),
    Command("experts merge", Merge, run="experts:merge"),
    Command("experts convert", Convert, run="experts:convert"),
    Command("experts import", Import, run="experts:import_released"),
    Command("experts push", Push, run="experts:push"),
    Command("experts pull", Pull, run="experts:pull"),
)
