"""2,000 inputs of `make fuzz`, and proof that it can fail."""

from collections import Counter

import pytest

from phatgoose.experts import signatures
from tests.fuzz.fuzz import VERDICTS, judge, table
from tests.fuzz.world import READERS, World

pytestmark = pytest.mark.filterwarnings("ignore")  # libraries warn of what is wrong with inputs
INPUTS, PARTS = 2000, 4  # parts run beside each other


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("part", range(PARTS))
def test_no_reader_crashes_hangs_or_accepts_what_is_wrong(part, world):
    found = [(n, *judge(world, n, 0, 20.0)) for n in range(part, INPUTS, PARTS)]
    bad = [case for case in found if case[2] not in ("accepted", "refused")]
    assert not bad, "\n".join(f"--only {case[0]}: {case[1:]}" for case in bad)
    assert {case[1] for case in found} == {reader.name for reader in READERS}
    accepted = sum(case[2] == "accepted" for case in found)
    assert 0.05 < accepted / len(found) < 0.6  # both are tried


def verdicts(world, count=300):
    return {verdict for n in range(count) for _, verdict, _ in [judge(world, n, 1, 5.0)]}


def test_a_reader_that_ignores_hashes_is_found_out(world, monkeypatch):
    class Any(str):
        def __ne__(self, other):
            return False

    monkeypatch.setattr(signatures, "vectors_hash", lambda vectors: Any())
    assert "wrong" in verdicts(world)


def test_a_reader_that_takes_any_value_is_found_out(world, monkeypatch):
    monkeypatch.setattr("phatgoose.experts.lora.check_values", lambda modules, who: None)
    assert "wrong" in verdicts(world)


def test_a_reader_that_leaks_an_error_is_found_out(world, monkeypatch):
    def leak(text):
        raise KeyError(text)

    monkeypatch.setattr("phatgoose.reading.parse_json", leak)
    assert "crashed" in verdicts(world, 50)


def test_a_reader_that_does_not_end_is_found_out(world, monkeypatch):
    def never(text):
        while True:
            pass

    monkeypatch.setattr("phatgoose.reading.parse_json", never)
    assert "hung" in {judge(world, n, 1, 0.2)[1] for n in range(8)}


def test_the_table_has_every_verdict():
    text = table({"a": Counter(accepted=2, hung=1), "b": Counter(refused=3)})
    assert all(verdict in text for verdict in VERDICTS)
    assert text.splitlines()[-1].split() == ["all", "2", "3", "0", "0", "1"]
