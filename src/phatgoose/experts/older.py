"""Reading signatures as releases before format 2 of them wrote them.

Gates were two files: the vectors, and phatgoose_config.json with the record. The other kinds were
one, with nothing that tells whether its vectors are those that were written, so they are not read.
"""

from pathlib import Path
from typing import Any

from phatgoose.errors import ExpertFormatError
from phatgoose.experts.kinds import GATES, Kind
from phatgoose.reading import read_json

FORMAT_VERSION = 1


def older_record(path: Path, kind: Kind) -> dict[str, Any]:
    """The record that belongs to the vectors in `path`, with the fields of format 2.

    Raises ExpertFormatError where it is missing or damaged, KeyError where a field is, ValueError
    for other kinds than gates.
    """
    if kind.name == GATES:
        return _gates_record(path.parent / kind.older[0], path.name)
    raise ValueError("a release before 0.2 wrote it, without a hash of its vectors")


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
