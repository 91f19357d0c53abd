"""completion."""

import argparse
from collections.abc import Iterator
from pathlib import Path

from phatgoose.cli.arguments.about import Completion
from phatgoose.cli.main import build_parser
from phatgoose.errors import ConfigError


def completion(asked: Completion) -> None:
    """A shell's script, made from the options themselves."""
    try:
        import shtab
    except ImportError:
        raise ConfigError(
            "completion: needs the shtab package. pip install 'phatgoose[completion]'"
        ) from None
    parser = build_parser()
    for action in _actions(parser):
        if action.type is Path:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    print(shtab.complete(parser, asked.shell))


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """The options of all commands."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from _actions(below)
