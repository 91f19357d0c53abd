"""gate, train."""

from dataclasses import dataclass
from pathlib import Path

from phatgoose.cli.fields import Command, argument, option
from phatgoose.cli.options import ChatOption, GatingOptions, TrainingOptions


@dataclass(frozen=True, kw_only=True)
class DataOption(ChatOption):
    """The examples of one expert."""

    data: str = option(
        "examples to train on: a .jsonl or .json file, a task folder, or a Hub data set; of the "
        "latter two, the train split"
    )


@dataclass(frozen=True, kw_only=True)
class Gate(DataOption, GatingOptions):
    """Train gates for an adapter that is already trained."""

    adapter: Path = argument("the adapter's folder (a PEFT LoRA); the gates are written into it")


@dataclass(frozen=True, kw_only=True)
class Train(DataOption, TrainingOptions):
    """Train an adapter, then its gates."""

    out: Path = option("folder of the new expert")


COMMANDS = (
    Command("gate", Gate, run="training:gate"),
    Command("train", Train, run="training:train"),
)
