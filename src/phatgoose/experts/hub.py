"""Folders and Hub ids: where an expert's files are, and how they get to the Hub and back."""

import os
import re
import shutil
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phatgoose.errors import ExpertNotFoundError, UnsupportedAdapterError, first_line
from phatgoose.experts import lora
from phatgoose.experts.kinds import KINDS
from phatgoose.experts.signatures import load_signatures
from phatgoose.files import new_folder
from phatgoose.text import visible

ADAPTER_FILES = (lora.CONFIG_FILE, lora.WEIGHTS_FILE, "README.md")
ARRIVING = ".arriving"  # where a download goes first
_SPECIAL = set("*?[]\\:=@")  # of patterns, of Windows' paths, and of our own spelling
_COMMIT = re.compile(r"[0-9a-f]{40}")
_REVISION = re.compile(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)*", re.ASCII)


def signature_files() -> list[str]:
    """What belongs to one adapter, and is useless beside another."""
    return [file for kind in KINDS.values() for file in kind.files]


def files() -> list[str]:
    """All that an expert may have."""
    return [*ADAPTER_FILES, *signature_files()]


def is_repository(text: str) -> bool:
    """Whether the Hub could call an owner ("owner") or a repository ("owner/name") so."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return not text.endswith("\n")  # which huggingface_hub 1.3 lets pass


@dataclass(frozen=True)
class HubId:
    """A folder of a repository on the Hub: "owner/name", "owner/name/sub/folder", "...@revision".

    Whether there is such a folder on this disk plays no part: a Hub id is never a path.
    """

    repository: str
    folder: str = ""  # in the repository; "" is its top
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> "HubId | None":
        """The id that a text is by the Hub's own rules, or None."""
        path, at, revision = text.partition("@")
        owner, _, rest = path.partition("/")
        name, slash, folder = rest.partition("/")
        if not name or not is_repository(f"{owner}/{name}"):
            return None
        if slash and not all(map(_is_folder_name, folder.split("/"))):
            return None
        if at and (not _REVISION.fullmatch(revision) or ".." in revision):
            return None
        return cls(f"{owner}/{name}", folder, revision or None)

    def inside(self, names: Iterable[str]) -> list[str]:
        """Names of files in its folder, as patterns for the Hub's client."""
        return [f"{self.folder}/{name}" if self.folder else name for name in names]


def _is_folder_name(name: str) -> bool:
    """Whether a part of an id may be a folder's name: nothing that leads elsewhere, no pattern.

    "=" stands behind an expert's own name (NAME=PATH), so a folder with one has to be pulled first.
    """
    dotted = name.startswith(".") or name.endswith(".")
    return bool(name) and not dotted and name == visible(name.strip()) and not _SPECIAL & set(name)


def is_hub_id(text: str) -> bool:
    """Whether a text is "owner/name[/sub/folder][@revision]", by the Hub's own rules."""
    return HubId.parse(text) is not None


def locate(path_or_hub_id: str | Path, *, local_dir: Path | None = None) -> Path:
    """The local folder of an expert, downloaded first if it is a Hub id.

    Only the files of an expert are downloaded, never a pickle. Raises ExpertNotFoundError, and
    UnsupportedAdapterError where the Hub has nothing but a pickle.
    """
    text = str(path_or_hub_id)
    if os.path.isdir(text):  # Path.is_dir raises on names that are too long
        return Path(text)
    is_file = os.path.exists(text)
    if is_file or not is_hub_id(text):
        raise ExpertNotFoundError(
            f"{text}: not a folder{' but a file' if is_file else ''}, and not a Hub id "
            "(owner/name). Give the folder that holds adapter_config.json."
        )
    return download(text, local_dir=local_dir)


def download_pickle(hub_id: str) -> Path:
    """The local folder of an adapter on the Hub, with adapter_model.bin if it has one.

    Only for a caller who was told to, and who opens it by torch's reader for weights alone. Raises
    ExpertNotFoundError.
    """
    asked = _parsed(hub_id)
    try:
        return _snapshot(asked, asked.inside([*files(), lora.PICKLE])) / asked.folder
    except _failures() as error:
        raise ExpertNotFoundError(
            f"{hub_id}: the Hub did not give it ({first_line(error)}). Check the name and the "
            "network, or set HF_TOKEN for a private repository."
        ) from None


def download(hub_id: str, *, local_dir: Path | None = None) -> Path:
    """The local folder of an expert on the Hub, whatever folders there are of that name.

    Raises what `locate` raises.
    """
    asked = _parsed(hub_id)
    try:
        folder = _snapshot(asked, asked.inside(files()), local_dir=local_dir) / asked.folder
    except _failures() as error:
        raise ExpertNotFoundError(
            f"{hub_id}: no such folder here, and the Hub did not give it ({first_line(error)}). "
            "Check the name and the network, or set HF_TOKEN for a private repository."
        ) from None
    _check_whole(hub_id, asked, folder)
    return folder


def configs(hub_id: str) -> tuple[Path, str] | None:
    """Where the configs of all adapters in a folder on the Hub are on this disk, and its commit.

    No weights are downloaded. None where the text is no Hub id, or the Hub does not give it.
    """
    asked = HubId.parse(hub_id)
    if asked is None:
        return None
    wanted = asked.inside([lora.CONFIG_FILE, f"*/{lora.CONFIG_FILE}"])
    try:
        if asked.revision and _COMMIT.fullmatch(asked.revision):  # which never changes
            with suppress(*_failures()):
                top = _snapshot(asked, wanted, local_files_only=True)
                if (top / asked.folder / lora.CONFIG_FILE).is_file():
                    return top / asked.folder, top.name
        top = _snapshot(asked, wanted)
    except _failures():
        return None
    return top / asked.folder, top.name


def _snapshot(
    asked: HubId, wanted: list[str], *, local_dir: Path | None = None, **more: Any
) -> Path:
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(
            asked.repository,
            revision=asked.revision,
            allow_patterns=wanted,
            local_dir=local_dir,
            **more,
        )
    )


def _parsed(hub_id: str) -> HubId:
    asked = HubId.parse(hub_id)
    if asked is None:
        raise ExpertNotFoundError(
            f"{hub_id}: not a Hub id (owner/name, owner/name/folder or either with @revision)."
        )
    return asked


def _check_whole(hub_id: str, asked: HubId, folder: Path) -> None:
    """Say what a folder on the Hub has, where that is not an adapter's config and weights."""
    if (folder / lora.CONFIG_FILE).is_file() and (folder / lora.WEIGHTS_FILE).is_file():
        return
    there = _listed(asked)
    if there is None and (folder / lora.CONFIG_FILE).is_file():
        raise ExpertNotFoundError(
            f"{hub_id}: what is here of it has {lora.CONFIG_FILE} and no {lora.WEIGHTS_FILE}, and "
            f"the Hub is not in reach. It may have {lora.PICKLE} alone, as adapters of 2023 do, "
            "which is never downloaded unless you ask for it, with a network: "
            f"phatgoose experts convert {hub_id} --out FOLDER --bin"
        )
    if there and lora.PICKLE in there and lora.WEIGHTS_FILE not in there:
        raise UnsupportedAdapterError(
            f"{hub_id}: has {lora.PICKLE} and no {lora.WEIGHTS_FILE}. That is a pickle, which can "
            "run code when opened, so it is never downloaded unless you ask for it: "
            f"phatgoose experts convert {hub_id} --out FOLDER --bin"
        )
    if there is not None and lora.CONFIG_FILE not in there:
        raise ExpertNotFoundError(
            f"{hub_id}: holds no {lora.CONFIG_FILE}, so it is no adapter. What it has: "
            f"{', '.join(sorted(there)[:10]) or 'nothing'}. Name a folder in it: "
            f"phatgoose experts list {hub_id} shows those with an adapter."
        )


def _listed(asked: HubId) -> set[str] | None:
    """The names of the files in a folder on the Hub; None where it cannot be asked."""
    from huggingface_hub import HfApi

    try:
        paths = HfApi().list_repo_files(asked.repository, revision=asked.revision)
    except _failures():
        return None
    within = f"{asked.folder}/" if asked.folder else ""
    return {p.removeprefix(within) for p in paths if p.startswith(within)}


def pull(hub_id: str, folder: Path) -> Path:
    """Download an expert into a folder, whole or not at all; return it.

    An expert that is there is replaced, and other files beside it stay. Raises what `locate`
    raises, and what reading the expert raises: then nothing is changed.
    """
    with new_folder(folder, replace=True) as partial:
        if folder.is_dir():
            shutil.copytree(
                folder, partial, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*files())
            )
        arriving = partial / ARRIVING  # with the client's notes, and in the folder it is in there
        found = download(hub_id, local_dir=arriving)
        for name in files():
            if (found / name).is_file():
                os.replace(found / name, partial / name)
        shutil.rmtree(arriving)
        load_signatures(partial, lora.read_adapter(partial)[1])
    return folder


def push(folder: Path, hub_id: str, *, private: bool = False) -> str:
    """Upload an expert's files to the Hub, creating the repository; return its address.

    A Hub id with a folder puts them there. Raises ExpertNotFoundError.
    """
    from huggingface_hub import HfApi

    api, asked = HfApi(), _parsed(hub_id)
    try:
        address = api.create_repo(asked.repository, private=private, exist_ok=True)
        api.upload_folder(
            folder_path=folder,
            repo_id=asked.repository,
            path_in_repo=asked.folder or None,
            revision=asked.revision,
            allow_patterns=files(),
            # Of an earlier push: they would belong to another adapter than the one pushed now.
            delete_patterns=signature_files(),
        )
    except _failures() as error:
        raise ExpertNotFoundError(
            f"{hub_id}: the Hub did not take the upload ({first_line(error)}). Check the name, the "
            "network and that you are logged in (hf auth login)."
        ) from None
    return str(address)


def _failures() -> tuple[type[Exception], ...]:
    """What the Hub client raises: ValueError for a malformed id, OSError, and HTTP errors."""
    from huggingface_hub.errors import HfHubHTTPError

    # A connection lost midway surfaces as an error of the HTTP library, which differs by release
    # and is a base of the client's own error.
    bases = (base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception))
    return (*bases, OSError, ValueError)
