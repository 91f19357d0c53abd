"""Every command in the README and the docs is one that there is."""

import re
import shlex
from collections.abc import Iterator

import pytest

from phatgoose.cli.main import parse
from tests.docs.blocks import PROJECT, Block, blocks

# Not ours, and not looked into.
OTHERS = {"curl", "docker", "eval", "git", "lm_eval", "uv"}


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
    parse(words)


def _check_extras(words: list[str]) -> None:
    _, table = (PROJECT / "pyproject.toml").read_text().split("[project.optional-dependencies]\n")
    extras = re.findall(r"^(\w+) = \[", table.partition("\n[")[0], flags=re.M)
    for word in words:
        found = re.fullmatch(r"(?:phatgoose|\.)\[([\w,]+)\]", word)
        if found:
            assert set(found.group(1).split(",")) <= set(extras)


def test_there_are_such_blocks() -> None:
    assert len(SHELL) > 10
