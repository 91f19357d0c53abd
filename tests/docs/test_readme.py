"""Pages outside the site: the README is short, and the links of all of them lead somewhere."""

import re

import pytest

from tests.docs.blocks import PROJECT

PAGES = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")


def links(page: str) -> list[str]:
    """What a page links to in this repository, pictures too."""
    found = re.findall(r"\]\(([^)\s]+)\)", (PROJECT / page).read_text("utf-8"))
    return [link for link in found if not re.match(r"\w+:", link)]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page):
    for link in links(page):
        path, _, anchor = link.partition("#")
        assert (PROJECT / path).is_file(), link
        if anchor:
            titles = re.findall(r"^#+ (.*)$", (PROJECT / path).read_text("utf-8"), flags=re.M)
            slugs = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in slugs, link


def test_the_readme_is_short_and_links_the_guides():
    assert len((PROJECT / "README.md").read_text("utf-8").splitlines()) <= 120
    assert {f"docs/guides/{who}.md" for who in ("contributor", "collector", "researcher")} <= {
        *links("README.md")
    }
