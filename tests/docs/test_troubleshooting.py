"""Every message on the page "What can go wrong" is one of the code's, and every class is there."""

import ast
import re
from functools import cache

import pytest

from phatgoose import errors
from tests.docs.blocks import PROJECT

PAGE = (PROJECT / "docs" / "troubleshooting.md").read_text()
ROWS = re.findall(r"^\| `([^`]+)` \| (.+) \|$", PAGE, flags=re.M)
CLASSES = {
    name
    for name, thing in vars(errors).items()
    if isinstance(thing, type) and issubclass(thing, Exception)
}
MESSAGES = [(message, way) for message, way in ROWS if message not in CLASSES]


@cache
def texts() -> list[str]:
    """Every text in the code, what an f-string fills in as "...", without docstrings."""
    found = []
    for path in sorted((PROJECT / "src").rglob("*.py")):
        tree = ast.parse(path.read_text())
        expressions = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
        for node in ast.walk(tree):
            if id(node) in expressions:
                continue
            if isinstance(node, ast.JoinedStr):
                parts = [p.value if isinstance(p, ast.Constant) else "..." for p in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


@pytest.mark.parametrize("message", [message for message, _ in MESSAGES])
def test_the_code_says_so(message: str) -> None:
    parts = [re.escape(part) for part in message.split("...")]
    pattern = re.compile(".*".join(parts), re.DOTALL)
    assert any(pattern.search(text) for text in texts()), message


def test_every_class_is_on_the_page_and_none_else() -> None:
    named = set(re.findall(r"^\| `(\w+Error)` \|", PAGE, flags=re.M))
    assert named == CLASSES - {"PhatgooseError"}


def test_every_message_has_a_way_out() -> None:
    assert len(MESSAGES) > 60 and all(way.endswith((".", ")", "`", "?")) for _, way in MESSAGES)


def test_a_message_that_is_not_there_is_found_out() -> None:
    with pytest.raises(AssertionError):
        test_the_code_says_so("the moon is made of ... cheese")
