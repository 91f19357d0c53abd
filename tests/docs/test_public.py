"""Every public name is in the API reference."""

import re
from importlib import import_module

import pytest

from tests.docs.blocks import PROJECT

PUBLIC = ("analysis", "evaluation", "experts", "pool", "routers", "train")
PAGES = "\n".join(path.read_text("utf-8") for path in sorted((PROJECT / "docs/api").glob("*.md")))


@pytest.mark.parametrize("package", PUBLIC)
def test_the_reference_has_what_a_package_exports(package):
    (options,) = re.findall(rf"^::: phatgoose\.{package}\n +options: (.*)$", PAGES, re.MULTILINE)
    members = re.search(r"members: \[(.*?)\]", options)
    if members is not None:  # else the reference has all of them
        exported = set(import_module(f"phatgoose.{package}").__all__)
        assert exported == set(members.group(1).split(", "))


def test_what_the_top_exports_comes_from_these():
    from phatgoose import _WHERE

    assert set(_WHERE.values()) <= {*PUBLIC, "types"}
    exported = {
        name for package in PUBLIC for name in import_module(f"phatgoose.{package}").__all__
    }
    assert {name for name, module in _WHERE.items() if module != "types"} <= exported
