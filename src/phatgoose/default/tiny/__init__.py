"""A base of 14 M parameters and experts of it, for tests, and where there is no network."""

from pathlib import Path

FOLDER = Path(__file__).parent
BASE = FOLDER / "base"
EXPERTS = FOLDER / "experts"
DEMO = FOLDER / "demo.jsonl"  # one prompt of several skills, with its reference answer


def expert_folders() -> list[Path]:
    """The folders of its experts, by name."""
    return sorted(path for path in EXPERTS.iterdir() if path.is_dir())
