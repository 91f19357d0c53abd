"""env, completion: about this installation."""

from dataclasses import dataclass
from typing import Literal

from phatgoose.cli.fields import Command, Options, argument
from phatgoose.cli.options import JsonOption


@dataclass(frozen=True, kw_only=True)
class Env(JsonOption):
    """Tell versions, devices, backends and paths, for a bug report."""


@dataclass(frozen=True, kw_only=True)
class Completion(Options):
    """Print a script that lets your shell complete this command.

    For bash: eval "$(phatgoose completion bash)"
    """

    shell: Literal["bash", "zsh", "tcsh"] = argument("your shell")


COMMANDS = (
    Command("env", Env, run="about:env"),
    Command("completion", Completion, run="completion:completion"),
)
