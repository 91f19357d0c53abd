"""Reading signatures as releases before format 2 of them wrote them.

Gates were two files: the vectors, and phatgoose_config.json with the record. The other kinds were
one, with a record of fewer fields in the header and no hash.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phatgoose.errors import ExpertFormatError
from phatgoose.experts.kinds import GATES, Kind
from phatgoose.reading import parse_json, read_json

FORMAT_VERSION = 1


def older_record(path: Path, kind: Kind, metadata: Mapping[str, str]) -> dict[str, Any]:
    """The record that belongs to the vectors in `path`, with the fields of format 2.

    Raises ExpertFormatError where it is missing or damaged, KeyError, TypeError or ValueError where
    a field is.
    """
    if kind.name == GATES:
        return _gates_record(path.parent / kind.older[0], path.name)
    if metadata["format_version"] != str(FORMAT_VERSION):
        raise ValueError(f"format_version {metadata['format_version']}")
    return {
        "kind": metadata["kind"],
        "base": parse_json(metadata["base"]),
        "adapter": metadata["adapter"],
        "examples": int(metadata["examples"]),
        "tokens": int(metadata["tokens"]),
    }


def _gates_record(path: Path, vectors: str) -> dict[str, Any]:
    """phatgoose_config.json: its "gates" is what format 2 calls "vectors", the hash of these."""
    try:
        record = read_json(path)
    except FileNotFoundError:
        raise ExpertFormatError(
            f"{path.parent}: {vectors} has no record in its header, as releases before 0.2 wrote "
            f"it, and the {path.name} that they wrote beside it is missing. Copy both again."
        ) from None
    if not isinstance(record, dict):
        raise ExpertFormatError(f"{path}: holds {type(record).__name__}, a JSON object is wanted.")
    version = record.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise ExpertFormatError(
            f"{path}: format_version is {version!r}, this release reads {FORMAT_VERSION}. "
            "Update phatgoose, or train the gates again."
        )
    expected = record.pop("gates")
    return {**record, "kind": GATES, "vectors": expected}
