"""Where the experts that a user names are."""

from collections.abc import Sequence
from pathlib import Path

from phatgoose import default
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
