"""The code blocks of the README and the docs, and what their text takes for given."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).parents[2]
PAGES = sorted([PROJECT / "README.md", PROJECT / "CONTRIBUTING.md", *PROJECT.glob("docs/**/*.md")])


@dataclass(frozen=True)
class Block:
    """One fenced block."""

    page: str
    line: int  # of its first line of code
    language: str
    code: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(language: str) -> list[Block]:
    """All blocks of a language, page by page."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in re.finditer(rf"^```{language}\n(.*?)^```$", text, flags=re.M | re.S):
            line = text.count("\n", 0, match.start()) + 2
            found.append(Block(str(page.relative_to(PROJECT)), line, language, match.group(1)))
    return found


class Given(dict[str, Any]):
    """A block's globals: what its text takes for given is made when the block asks for it."""

    def __init__(self, makers: Mapping[str, Callable[["Given"], Any]]) -> None:
        super().__init__(__name__="block")
        self.makers = makers

    def __missing__(self, name: str) -> Any:
        if name not in self.makers:
            raise KeyError(name)  # then Python looks among its builtins, and raises a NameError
        self[name] = self.makers[name](self)
        return self[name]
