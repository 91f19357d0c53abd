"""Finds the experts that a user names, and the names that they get."""

import logging
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from phatgoose.default import smollm2, tiny
from phatgoose.errors import ConfigError
from phatgoose.experts import hub
from phatgoose.experts.lora import CONFIG_FILE
from phatgoose.models.named import DEFAULT, TINY
from phatgoose.text import visible

Source = str | Path  # a folder, a Hub id, or NAME= before either
MOST_FOLDERS = 100_000  # that a tree of experts may have
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")

log = logging.getLogger(__name__)


def split_name(source: Source) -> tuple[str | None, Source]:
    """The name in NAME=PATH, or None, and what it stands before.

    A folder that is there is a path, whatever its name has in it. Of several "=" the first counts
    that has a folder or a Hub id behind it.
    """
    text = str(source)
    if isinstance(source, Path) or "=" not in text or os.path.isdir(text):
        return None, source
    splits = [(text[: m.start()], text[m.end() :]) for m in re.finditer("=", text)]
    name, place = next((s for s in splits if os.path.isdir(s[1]) or hub.is_hub_id(s[1])), splits[0])
    if not name or not place or visible(name) != name:
        raise ConfigError(
            f"{text}: wanted is NAME=PATH, with a name whose characters can be seen, and a folder "
            "or Hub id."
        )
    return name, place


def default_name(place: Source) -> str:
    """What an expert is called that nobody named: a folder by its own name, a Hub id by itself.

    A link keeps its own name. A checkpoint-N folder takes the name of the run that it is in.
    """
    return folder_name(place) if os.path.isdir(place) else hub_name(str(place))


def folder_name(folder: Source) -> str:
    """The name of an expert in a folder on this disk."""
    return _named_folder(Path(os.path.abspath(folder))).name  # which follows no links


def hub_name(hub_id: str) -> str:
    """The name of an expert on the Hub, where its repository is never what is left out."""
    name = hub_id.partition("@")[0]
    run, _, last = name.rpartition("/")
    return run if "/" in run and _CHECKPOINT.fullmatch(last) else name


def expert_sources(
    given: Sequence[Source] | Mapping[str, Source] | None, base: str | None = None
) -> list[Source]:
    """List folders and Hub ids of experts. A tree of expert folders stands for all of them.

    What `load_expert` would call otherwise comes as NAME=PATH. None stands for the experts in the
    package that are of this base; SmolLM2's, if there are none. Adapters that are left out, since
    they lie inside another one, are named in the log.
    """
    if given is None:
        return [*(tiny if (base or DEFAULT) == TINY else smollm2).expert_folders()]
    if isinstance(given, Mapping):
        given = [f"{name}={place}" for name, place in given.items()]
    return [found for source in given for found in _expand(source)]


def _expand(source: Source) -> list[Source]:
    """One source, or all the experts in the tree that it is."""
    name, place = split_name(source)
    text = str(place)
    is_local = os.path.isdir(text)
    listing = (Path(text), "") if is_local else hub.configs(text)
    if listing is None:  # loading it will say why
        return [source]
    root, commit = listing
    if (root / CONFIG_FILE).is_file():
        inside = sorted(path.parent.relative_to(root) for path in root.glob(f"[!.]*/{CONFIG_FILE}"))
        _tell_left_out(text, inside)
        return [source]
    kept, left = _without_checkpoints(find_adapters(root))
    _tell_left_out(text, left)
    names = _tree_names(
        Path(os.path.abspath(text)).name if is_local else text.partition("@")[0], kept
    )
    spell = f"{root}/{{}}" if is_local else f"{text.partition('@')[0]}/{{}}@{commit}"
    return [_spelled(names[s], spell.format(s.as_posix()), prefix=name) for s in kept] or [source]


def _spelled(name: str, place: str, *, prefix: str | None) -> Source:
    if prefix is not None:
        return f"{prefix}/{name}={place}"
    if not os.path.isdir(place):
        return place  # a Hub id tells experts apart by itself
    return Path(place) if default_name(place) == name else f"{name}={place}"


def find_adapters(root: Path) -> list[Path]:
    """The folders below `root` that hold an adapter, relative to it, in the order of their names.

    Links are followed; hidden folders are not looked into. Raises ConfigError for a tree of more
    than `MOST_FOLDERS`.
    """
    found = []
    for count, folder in enumerate(_folders(root, frozenset())):
        if count >= MOST_FOLDERS:
            raise ConfigError(
                f"{root}: has more than {MOST_FOLDERS} folders in it. Name the folder of the "
                "experts itself."
            )
        if (folder / CONFIG_FILE).is_file():
            found.append(folder.relative_to(root))
    return found


def _folders(folder: Path, above: frozenset[tuple[int, int]]) -> Iterator[Path]:
    """A folder and all below it; a link to one that it lies in is not followed."""
    try:
        status, below = os.stat(folder), sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:  # nobody may look into it, so nothing in it can be loaded either
        return
    here = (status.st_dev, status.st_ino)
    if here in above:
        return
    yield folder
    for entry in below:
        if not entry.name.startswith(".") and entry.is_dir():
            yield from _folders(folder / entry.name, above | {here})


def _without_checkpoints(inside: Iterable[Path]) -> tuple[list[Path], list[Path]]:
    """The adapters of a tree without a run's checkpoints, where it has its last adapter too.

    A run that has only checkpoints is its last one.
    """
    inside = list(inside)
    runs: dict[Path, list[Path]] = defaultdict(list)
    for sub in inside:
        if _CHECKPOINT.fullmatch(sub.name):
            runs[sub.parent].append(sub)
    left = []
    for run, checkpoints in runs.items():
        last = max(checkpoints, key=lambda sub: int(sub.name.rpartition("-")[2]))
        left += [sub for sub in checkpoints if run in inside or sub != last]
    return [sub for sub in inside if sub not in left], left


def _tree_names(root: str, kept: Sequence[Path]) -> dict[Path, str]:
    """A folder's own name; its path in the tree, where another one in it has the same."""
    own = {sub: _named_folder(Path(root, sub)) for sub in kept}
    count = Counter(folder.name for folder in own.values())
    return {
        sub: folder.name if count[folder.name] == 1 else folder.relative_to(root).as_posix()
        for sub, folder in own.items()
    }


def _named_folder(folder: Path) -> Path:
    """The folder that an adapter is called by: that of the run, where it is a checkpoint of one."""
    is_checkpoint = _CHECKPOINT.fullmatch(folder.name) and folder.parent.name
    return folder.parent if is_checkpoint else folder


def _tell_left_out(where: str, left: Sequence[Path]) -> None:
    if left:
        names = ", ".join(sub.as_posix() for sub in left[:10])
        more = f" and {len(left) - 10} more" if len(left) > 10 else ""
        log.warning(
            "phatgoose: %s: left out are the adapters inside another one's folder, and earlier "
            "checkpoints: %s. Name their own folders if you want them.",
            visible(where),
            visible(names + more),
        )
