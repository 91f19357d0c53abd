"""docs/adapters.md says what is so: its rows are in the matrix, and what it refuses is refused."""

import json
import re
from pathlib import Path

import pytest

from phatgoose import load_expert
from phatgoose.errors import UnsupportedAdapterError
from tests.experts.found import HARMLESS, REFUSED
from tests.experts.matrix import VARIANTS, Family, make_adapter

PAGE = (Path(__file__).parents[2] / "docs" / "adapters.md").read_text()


def rows(heading):
    """The cells of the first table under a heading."""
    section = PAGE.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")][1:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def named(cell):
    """The matrix's rows that a cell names; their names may have commas."""
    found, rest = [], cell
    while rest:
        fitting = [name for name in VARIANTS if rest == name or rest.startswith(f"{name}, ")]
        assert fitting, f"no row of the matrix is called {rest!r}"
        found.append(max(fitting, key=len))
        rest = rest[len(found[-1]) :].removeprefix(", ")
    return found


def test_what_is_routed_is_in_the_matrix():
    table = rows("What is routed")
    assert len(table) == 11
    assert all(named(cells[-1]) for cells in table)


def test_what_is_found_is_among_the_changes():
    table = rows("Files as trainers leave them")
    changes = [name for cells in table for name in cells[-1].split(", ")]
    assert len(table) == 8 and set(changes) <= {*HARMLESS, *REFUSED}


@pytest.mark.parametrize("said", [cells[0].strip("`") for cells in rows("What is refused")])
def test_what_is_refused(said, tmp_path):
    folder = make_adapter(tmp_path / "e", Family("llama"), {"target_modules": ["q_proj"]})
    path = folder / "adapter_config.json"
    fields = json.loads(said)
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    (word,) = fields
    with pytest.raises(UnsupportedAdapterError, match=rf"{word}|lora_B\.bias") as caught:
        load_expert(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_the_tests_that_it_names_are_there():
    for path in re.findall(r"`(tests/[\w/]+\.py)`", PAGE):
        assert (Path(__file__).parents[2] / path).is_file()
