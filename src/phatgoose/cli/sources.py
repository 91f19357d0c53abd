"""Where the experts and examples named on the command line are."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from phatgoose import default
from phatgoose.errors import ConfigError
from phatgoose.experts.lora import CONFIG_FILE


def expert_sources(given: Sequence[str] | None) -> list[str | Path]:
    """Expert folders and Hub ids; a folder of expert folders stands for all of them.

    None stands for the experts in the package.
    """
    if given is None:
        return [*default.expert_folders()]
    sources: list[str | Path] = []
    for source in given:
        inside = sorted(path.parent for path in Path(source).glob(f"*/{CONFIG_FILE}"))
        if inside and not (Path(source) / CONFIG_FILE).exists():
            sources += inside
        else:
            sources.append(source)
    return sources


def by_name(folders: Iterable[Path]) -> dict[str, Path]:
    """Folders by their names; ConfigError where two have the same."""
    named: dict[str, Path] = {}
    for folder in folders:
        name = folder.resolve().name
        if name in named:
            raise ConfigError(f"{folder}: has the name of {named[name]}. Rename one of them.")
        named[name] = folder
    return named
