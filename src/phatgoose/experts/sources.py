"""Finds the experts that a user names."""

import os
from collections.abc import Sequence
from pathlib import Path

from phatgoose.default import smollm2, tiny
from phatgoose.experts.lora import CONFIG_FILE
from phatgoose.models.named import DEFAULT, TINY


def expert_sources(given: Sequence[str | Path] | None, base: str | None = None) -> list[str | Path]:
    """List expert folders and Hub ids. A folder of expert folders stands for all of them.

    None stands for those in the package that are of this base; SmolLM2's, if there are none.
    """
    if given is None:
        return [*(tiny if (base or DEFAULT) == TINY else smollm2).expert_folders()]
    sources: list[str | Path] = []
    for source in given:
        inside: list[Path] = []
        # os.path answers no where Path raises: names too long, or with a null character.
        if os.path.isdir(source) and not (Path(source) / CONFIG_FILE).exists():
            inside = sorted(path.parent for path in Path(source).glob(f"[!.]*/{CONFIG_FILE}"))
        sources += inside or [source]
    return sources
