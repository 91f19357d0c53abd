"""experts train, experts gate, experts derive: many experts at once."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from phatgoose.cli.fields import Command, argument, option
from phatgoose.cli.options import (
    AdaptersBaseOption,
    ChatOption,
    GatingOptions,
    JsonOption,
    LoadOptions,
    TrainingOptions,
)
from phatgoose.errors import ConfigError
from phatgoose.train.settings import AdapterTraining, SignatureMeasuring


@dataclass(frozen=True, kw_only=True)
class Together(ChatOption):
    """The experts' tasks, and how many experts share a pass over the base."""

    tasks: Sequence[str] = option(
        "tasks: folders that hold train.jsonl, or folders of such folders", metavar="TASK"
    )
    together: int | None = option(
        "experts that share each pass over the base; fewer need less memory; without it, all",
        default=None,
        least=1,
        metavar="N",
    )


@dataclass(frozen=True, kw_only=True)
class TrainMany(Together, TrainingOptions):
    """Train an expert for each task, many at once."""

    out: Path = option("folder to put the experts' folders in")
    seed_each: bool = option(
        "give each expert a seed of its own, as strangers would have, made of --seed and its name",
        default=AdapterTraining.seed_each,
    )
    devices: Sequence[str] | None = option(
        "devices to train on at once, a share of the experts on each: cuda:0 cuda:1, or all for "
        "every GPU; without it, one device, that of --device",
        default=None,
        metavar="DEVICE",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.devices and self.device:
            raise ConfigError("--devices stands in place of --device. Give one of them.")

    def adapter_training(self) -> AdapterTraining:
        return replace(super().adapter_training(), seed_each=self.seed_each)


@dataclass(frozen=True, kw_only=True)
class GateMany(Together, GatingOptions):
    """Train gates for many adapters of one base at once."""

    adapters: Sequence[str] = argument(
        "adapters' folders (PEFT LoRAs), named like their tasks, or folders of such folders",
        metavar="FOLDER",
    )


@dataclass(frozen=True, kw_only=True)
class Derive(ChatOption, AdaptersBaseOption, LoadOptions, JsonOption):
    """Measure what routers without gates need of experts, on some of their data."""

    adapters: Sequence[str] = argument(
        "experts' folders, named like their tasks, or folders of such folders", metavar="FOLDER"
    )
    tasks: Sequence[str] | None = option(
        "tasks: folders that hold train.jsonl, or folders of such folders; without it, only what "
        "takes no data is derived",
        default=None,
        metavar="TASK",
    )
    examples: int = option(
        "examples of each task to measure on", default=SignatureMeasuring.examples, least=1
    )
    max_length: int = option(
        "length that an example may have, in tokens; a longer one loses its beginning",
        default=1024,
        least=2,
    )
    batch_size: int = option(
        "examples in a forward pass", default=SignatureMeasuring.batch_size, least=1
    )
    seed: int = option("seed of which examples are drawn", default=SignatureMeasuring.seed)


COMMANDS = (
    Command("experts train", TrainMany, run="collection:train"),
    Command("experts gate", GateMany, run="collection:gate"),
    Command("experts derive", Derive, run="collection:derive"),
)
