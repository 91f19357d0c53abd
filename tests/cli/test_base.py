"""base fetch: where the default base comes from, in one line."""

import json

from phatgoose.models import SMOLLM2, Base, named


def found(*_):
    return Base(SMOLLM2, "/cache/base", "abc", "the Hub's weights, commit abc")


def test_it_says_where_the_base_comes_from(run, monkeypatch):
    monkeypatch.setattr(named, "smollm2_on_disk", found)
    assert run("base", "fetch").out == f"{SMOLLM2}: the Hub's weights, commit abc\n"
    assert json.loads(run("base", "fetch", "--json").out)["source"] == "/cache/base"


def test_a_source_that_does_not_give_it_is_named(run, monkeypatch):
    def gone(*, offline):
        raise OSError("no route")

    monkeypatch.setattr(named, "_from_hub", gone)
    result = run("base", "fetch", "--source", "hub")
    assert result.code == 1
    assert "the Hub does not give it (no route)" in result.err
