"""analyze."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from phatgoose.cli.fields import Command, option
from phatgoose.cli.options import ChatOption, RoutedOptions


@dataclass(frozen=True, kw_only=True)
class Analyze(ChatOption, RoutedOptions):
    """Draw where the tokens of tasks go, and whether they find their expert."""

    tasks: Sequence[str] = option(
        "tasks: folders that hold test.jsonl, or folders of such folders", metavar="TASK"
    )
    limit: int = option("examples of each task", default=50, least=1)
    seed: int = option("seed of which examples are taken", default=0)
    oracle: Sequence[str] = option(
        "the right expert of a task: TASK=EXPERT. For tasks without an expert of their name, also "
        "an evaluation's results.json, which has the best single ones, or one EXPERT for all",
        default=(),
        metavar="ORACLE",
    )
    out: Path = option(
        "folder for the pictures and analysis.json", default=Path("phatgoose-analysis")
    )


COMMANDS = (Command("analyze", Analyze, run="analysis:analyze"),)
