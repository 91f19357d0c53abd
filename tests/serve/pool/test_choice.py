"""What a request may ask for, and how that is kept apart in vLLM's prefix cache."""

import pytest

from phatgoose.errors import ConfigError
from phatgoose.serve.pool.choice import Choice

NAMES = ["a", "b", "c"]
POOL = {"fingerprint": "f", "experts": [{"name": name} for name in NAMES]}


@pytest.mark.parametrize(
    ("text", "routed"),
    [
        ("{}", ["a", "b", "c"]),
        ('{"allow": null, "deny": null, "base": null, "routing": null}', ["a", "b", "c"]),
        ('{"allow": ["c", "a"]}', ["a", "c"]),
        ('{"deny": ["b"]}', ["a", "c"]),
        ('{"allow": ["a", "b"], "deny": ["b"], "routing": "shares"}', ["a"]),
        ('{"base": true}', []),
    ],
)
def test_read(text, routed):
    choice = Choice.read(text)
    assert choice.routed(NAMES) == routed
    assert Choice.read(choice.text()) == choice


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "no JSON"),
        ("[" * 200_000, "no JSON"),
        ('{"allow":' * 5000, "no JSON"),
        ("[]", "JSON object, got list"),
        (3, "JSON object, got int"),
        ('{"alow": []}', "no setting 'alow'"),
        ('{"allow": "a"}', "allow must be a list"),
        ('{"deny": [1]}', "deny must be a list"),
        ('{"allow": []}', '"allow" is empty'),
        ('{"base": 1}', "base must be true or false"),
        ('{"base": true, "deny": ["a"]}', "name none beside it"),
        ('{"routing": "all"}', "routing must be one of"),
    ],
)
def test_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        Choice.read(text)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"allow": ["a", "d"]}, "d: no expert of this name"),
        ({"deny": ["d"]}, "d: no expert of this name"),
        ({"deny": NAMES}, "leaves no expert"),
    ],
)
def test_experts_that_are_not_there(choice, message):
    with pytest.raises(ConfigError, match=message):
        Choice.read(choice).routed(NAMES)


def test_the_salt_is_of_what_computes_a_prompt():
    def salt(pool=POOL, own="", **choice):
        return Choice.read(choice).salt(pool, own)

    assert salt() == salt(routing="tokens") == salt(allow=NAMES)
    assert salt(deny=["a"]) == salt(allow=["c", "b"])
    assert len({salt(), salt(base=True), salt(deny=["a"]), salt(own="x")}) == 4
    assert salt(pool={**POOL, "fingerprint": "g"}) != salt()
