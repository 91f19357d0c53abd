"""Folders named on the command line."""

from collections.abc import Iterable
from pathlib import Path

from phatgoose.errors import ConfigError, ExpertNotFoundError
from phatgoose.experts.sources import Source, default_name, expert_sources, split_name


def by_name(folders: Iterable[Path]) -> dict[str, Path]:
    """Folders by their names; ConfigError where two have the same."""
    return _distinct((folder.resolve().name, folder) for folder in folders)


def experts_by_name(given: Iterable[Source]) -> dict[str, Path]:
    """Folders of experts by the experts' names, to be written into.

    Raises ConfigError where two have the same name, ExpertNotFoundError for what is no folder.
    """
    return _distinct(map(_local, expert_sources([*given])))


def _local(source: Source) -> tuple[str, Path]:
    name, place = split_name(source)
    if not Path(place).is_dir():
        raise ExpertNotFoundError(
            f"{place}: not a folder. Gates are written beside adapters, so pull those of the Hub "
            "first: phatgoose experts pull"
        )
    return name or default_name(place), Path(place)


def _distinct(folders: Iterable[tuple[str, Path]]) -> dict[str, Path]:
    named: dict[str, Path] = {}
    for name, folder in folders:
        if name in named:
            raise ConfigError(f"{folder}: has the name of {named[name]}. Rename one of them.")
        named[name] = folder
    return named
