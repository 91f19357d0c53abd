"""The pool in the package: a small base model and its experts, so that a first run needs no hub."""

from pathlib import Path

FOLDER = Path(__file__).parent
BASE = FOLDER / "base"
EXPERTS = FOLDER / "experts"
DEMO = FOLDER / "demo.jsonl"  # one prompt of several skills, with its reference answer

CHAT_TEMPLATE = FOLDER / "chat.jinja"  # a line a message: the base was not trained to chat


def expert_folders() -> list[Path]:
    """The folders of the experts in the package, by name."""
    return sorted(path for path in EXPERTS.iterdir() if path.is_dir())
