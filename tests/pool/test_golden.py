"""The tiny pool computes what it did at commit f1f3807.

On the machine and with the versions that recorded the numbers, all of them are equal bit for bit.
Elsewhere a processor may round otherwise. Choices may then differ in one place of 200 (in bfloat16
one of 10), where two scores are nearly equal, and logits as much as such a choice moves them.
"""

import json

import pytest

from tests.pool import golden
from tests.tolerances import relative_error


@pytest.fixture(scope="module")
def pool():
    return golden.Golden()


@pytest.fixture(scope="module")
def recorded():
    return golden.read()


CASES = [
    *(f"{name}, {backend}" for name in golden.ROUTERS for backend in golden.BACKENDS),
    *("assign and restrict", "bfloat16", "gradients", "merge"),
]


@pytest.mark.parametrize("case", CASES)
def test_numbers(case, pool, recorded):
    facts, tensors = recorded
    found = pool.cases()[case]()
    assert {f"{case}: {name}" for name in found} == {
        name for name in tensors if name.startswith(f"{case}: ")
    }
    if facts["machine"] == golden.machine():
        wrong = [n for n, v in found.items() if golden.hashed(v) != facts[f"{case}: {n}"]]
        assert not wrong
        return
    for name, values in found.items():
        compare(name, golden.kept(name, values), tensors[f"{case}: {name}"], case)


def compare(name, found, wanted, case):
    """With a tolerance, for a machine that rounds otherwise."""
    half = case == "bfloat16"
    choices, weights, near, logits = (0.1, 0.2, 0.03, 0.2) if half else (0.005, 0.02, 1e-3, 0.02)
    if name.endswith("experts"):
        assert (found != wanted).float().mean() <= choices
    elif name.endswith("weights"):
        assert ((found - wanted).abs() > near).float().mean() <= weights
    elif name.endswith("tokens"):
        assert found.shape == wanted.shape
    else:
        assert relative_error(found, wanted) <= logits


def test_every_case_is_on_file(pool, recorded):
    _, tensors = recorded
    assert {name.partition(": ")[0] for name in tensors} == set(pool.cases()) == set(CASES)


def test_adapters_are_read_as_before(pool, recorded):
    assert pool.hashes() == json.loads(recorded[0]["adapters"])


def test_a_tolerance_tells_other_numbers_apart(recorded):
    """The loose comparison fails where the pool is routed otherwise."""
    _, tensors = recorded
    one, other = ("phatgoose, torch: many", "arrow, torch: many")
    for kind in ("logits", "weights"):
        with pytest.raises(AssertionError):
            compare(kind, tensors[f"{one} {kind}"], tensors[f"{other} {kind}"][..., :2], "arrow")
