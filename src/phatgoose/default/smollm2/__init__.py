"""Experts of SmolLM2-135M-Instruct, made by `recipes/default_pool.py`."""

from pathlib import Path

FOLDER = Path(__file__).parent
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"  # `phatgoose.models` finds it
EXPERTS = FOLDER / "experts"
DEMO = FOLDER / "demo.jsonl"  # the first test example of twelve of the tasks, with its reference


def expert_folders() -> list[Path]:
    """The folders of its experts, by name."""
    return sorted(path for path in EXPERTS.iterdir() if path.is_dir())
