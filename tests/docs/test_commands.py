"""Every command in the README and the docs is one that there is."""

import re
import shlex
from collections.abc import Iterator
from importlib.metadata import metadata

import pytest

from phatgoose.cli.main import build_parser
from tests.docs.blocks import PROJECT, Block, blocks

# Not ours, and not looked into.
OTHERS = {"curl", "docker", "git", "lm_eval", "uv"}


def commands(block: Block) -> Iterator[list[str]]:
    """The words of each command: without comments, over broken lines, after variables."""
    for line in block.code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"\w+=.*", words[0]):
            words = words[1:]
        if words:
            yield words


SHELL = blocks("sh")


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_its_commands_exist(block: Block) -> None:
    for program, *words in commands(block):
        if program == "phatgoose":
            _check_ours(words)
        elif program == "make":
            targets = re.findall(r"^([\w-]+):", (PROJECT / "Makefile").read_text(), flags=re.M)
            assert {word for word in words if "=" not in word} <= set(targets)
        elif program in ("python", "torchrun", "accelerate"):
            scripts = [word for word in words if word.endswith(".py")]
            assert scripts and all((PROJECT / script).exists() for script in scripts), words
        elif program == "pip":
            _check_extras(words)
        else:
            assert program in OTHERS, f"{program}: what is it? Say so in OTHERS."


def _check_ours(words: list[str]) -> None:
    parsed, more = build_parser().parse_known_args(words)
    assert hasattr(parsed, "more") or not more, f"unknown: {more}"


def _check_extras(words: list[str]) -> None:
    extras = metadata("phatgoose").get_all("Provides-Extra", [])
    for word in words:
        found = re.fullmatch(r"(?:phatgoose|\.)\[([\w,]+)\]", word)
        if found:
            assert set(found.group(1).split(",")) <= set(extras)


def test_there_are_such_blocks() -> None:
    assert len(SHELL) > 10
