"""Folders named on the command line."""

from collections.abc import Iterable
from pathlib import Path

from phatgoose.errors import ConfigError


def by_name(folders: Iterable[Path]) -> dict[str, Path]:
    """Folders by their names; ConfigError where two have the same."""
    named: dict[str, Path] = {}
    for folder in folders:
        name = folder.resolve().name
        if name in named:
            raise ConfigError(f"{folder}: has the name of {named[name]}. Rename one of them.")
        named[name] = folder
    return named
