"""Folders and Hub ids: where an expert's files are, and how they get to the Hub and back."""

import os
import re
import shutil
from contextlib import suppress
from pathlib import Path

from phatgoose.errors import ExpertNotFoundError, first_line
from phatgoose.experts import lora
from phatgoose.experts.kinds import KINDS
from phatgoose.experts.signatures import load_signatures
from phatgoose.files import new_folder

ADAPTER_FILES = (lora.CONFIG_FILE, lora.WEIGHTS_FILE, "README.md")
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


def is_hub_id(text: str) -> bool:
    """Whether a text is "owner/name" or "owner/name@revision", by the Hub's own rules.

    Whether there is such a folder plays no part: a Hub id is never a path.
    """
    repository, at, revision = text.partition("@")
    if "/" not in repository or not is_repository(repository):
        return False
    return not at or bool(_REVISION.fullmatch(revision) and ".." not in revision)


def locate(path_or_hub_id: str | Path, *, local_dir: Path | None = None) -> Path:
    """The local folder of an expert, downloaded first if it is a Hub id ("owner/name[@revision]").

    Only the files of an expert are downloaded, never a pickle. Raises ExpertNotFoundError.
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


def download(hub_id: str, *, local_dir: Path | None = None) -> Path:
    """The local folder of an expert on the Hub, whatever folders there are of that name.

    Raises ExpertNotFoundError.
    """
    from huggingface_hub import snapshot_download

    if not is_hub_id(hub_id):
        raise ExpertNotFoundError(f"{hub_id}: not a Hub id (owner/name or owner/name@revision).")

    repository, _, revision = hub_id.partition("@")
    try:
        return Path(
            snapshot_download(
                repository,
                revision=revision or None,
                allow_patterns=files(),
                local_dir=local_dir,
            )
        )
    except _failures() as error:
        raise ExpertNotFoundError(
            f"{hub_id}: no such folder here, and the Hub did not give it ({first_line(error)}). "
            "Check the name and the network, or set HF_TOKEN for a private repository."
        ) from None


def pull(hub_id: str, folder: Path) -> Path:
    """Download an expert into a folder, whole or not at all; return it.

    An expert that is there is replaced, and other files beside it stay. Raises ExpertNotFoundError,
    and what reading the expert raises: then nothing is changed.
    """
    with new_folder(folder, replace=True) as partial:
        if folder.is_dir():
            shutil.copytree(
                folder, partial, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*files())
            )
        download(hub_id, local_dir=partial)
        shutil.rmtree(partial / ".cache" / "huggingface", ignore_errors=True)  # the client's notes
        with suppress(OSError):
            (partial / ".cache").rmdir()
        load_signatures(partial, lora.read_adapter(partial)[1])
    return folder


def push(folder: Path, hub_id: str, *, private: bool = False) -> str:
    """Upload an expert's files to the Hub, creating the repository; return its address."""
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        address = api.create_repo(hub_id, private=private, exist_ok=True)
        api.upload_folder(
            folder_path=folder,
            repo_id=hub_id,
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
