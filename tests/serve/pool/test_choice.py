"""What a request may ask for, and how that is kept apart in vLLM's prefix cache."""

import pytest

from phatgoose.errors import ConfigError
from phatgoose.serve.pool.choice import Request

NAMES = ["a", "b", "c"]
POOL = {"fingerprint": "f", "experts": [{"name": name} for name in NAMES]}
ROOM = {"mixture": 2, "scale": "softmax", "capacity": 4}


@pytest.mark.parametrize(
    ("text", "routed"),
    [
        ("{}", ["a", "b", "c"]),
        ('{"allow": null, "deny": null, "base": null, "routing": null}', ["a", "b", "c"]),
        ('{"allow": ["c", "a"]}', ["a", "c"]),
        ('{"deny": ["b"]}', ["a", "c"]),
        ('{"allow": ["a", "b"], "deny": ["b"], "routing": "shares"}', ["a"]),
        ('{"base": true}', []),
        ('{"weights": {"c": 0.5, "a": 2}}', ["a", "c"]),
        ('{"weights": {"c": 0}, "scale": 0}', ["c"]),
        ('{"deny": ["b"], "scale": 0.5, "top_k": "all", "temperature": 2}', ["a", "c"]),
    ],
)
def test_read(text, routed):
    choice = Request.read(text)
    assert choice.routed(NAMES) == routed
    assert Request.read(choice.text()) == choice


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
        ('{"weights": {}}', "weights are empty"),
        ('{"weights": [1]}', "weights must be experts' names"),
        ('{"weights": {"a": -1}}', "the weight of a must be at least 0"),
        ('{"weights": {"a": NaN}}', "at least 0 and finite"),
        ('{"weights": {"a": 1e400}}', "at least 0 and finite"),
        ('{"weights": {"a": "1"}}', "must be a number, got '1'"),
        ('{"weights": {"a": 1}, "allow": ["a"]}', "allow has no meaning beside them"),
        ('{"weights": {"a": 1}, "temperature": 2}', "temperature has no meaning beside them"),
        ('{"base": true, "scale": 2}', "scale has no meaning beside it"),
        ('{"top_k": 0}', "top_k must be a whole number"),
        ('{"scale": []}', "scale must be a number"),
    ],
)
def test_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        Request.read(text)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"allow": ["a", "d"]}, "d: no expert of this name"),
        ({"deny": ["d"]}, "d: no expert of this name"),
        ({"deny": NAMES}, "leaves no expert"),
        ({"weights": {"a": 1, "d": 1}}, "d: no expert of this name"),
    ],
)
def test_experts_that_are_not_there(choice, message):
    with pytest.raises(ConfigError, match=message):
        Request.read(choice).routed(NAMES)


@pytest.mark.parametrize(
    ("asked", "room", "message"),
    [
        ({"weights": {"a": 1}}, {"mixture": 0}, "takes no weights, scale, top_k or temperature"),
        ({"scale": 0.5}, {"mixture": 0}, "phatgoose serve --max-mixture"),
        ({"weights": dict.fromkeys(NAMES, 1.0)}, {}, "weights asks for 3 experts, .* room for 2"),
        ({"top_k": 3}, {}, "top_k asks for 3 experts"),
        ({"top_k": "all"}, {}, "top_k asks for 4 experts"),
        ({"temperature": 2.0}, {"scale": "unit"}, "temperature changes nothing"),
    ],
)
def test_what_a_server_has_no_room_for(asked, room, message):
    with pytest.raises(ConfigError, match=message):
        Request.read(asked).check_room({**ROOM, **room})


@pytest.mark.parametrize(
    "asked", [{}, {"deny": ["a"]}, {"weights": {"a": 1, "b": 2}}, {"top_k": 2, "scale": 3}]
)
def test_what_a_server_has_room_for(asked):
    Request.read(asked).check_room(ROOM)
    if not set(asked) - {"deny"}:
        Request.read(asked).check_room({**ROOM, "mixture": 0})


def test_the_salt_is_of_what_computes_a_prompt():
    def salt(pool=POOL, own="", **choice):
        return Request.read(choice).salt(pool, own)

    assert salt() == salt(routing="tokens") == salt(allow=NAMES)
    assert salt(deny=["a"]) == salt(allow=["c", "b"])
    assert len({salt(), salt(base=True), salt(deny=["a"]), salt(own="x")}) == 4
    assert salt(pool={**POOL, "fingerprint": "g"}) != salt()
    own = [
        {"weights": {"a": 0.5}},
        {"weights": {"a": 0.25}},
        {"weights": {"a": 0.5, "b": 0.0}},
        {"weights": {"a": 0.5}, "scale": 2.0},
        {"allow": ["a"]},
        {"allow": ["a"], "scale": 2.0},
        {"top_k": 1},
        {"top_k": "all"},
        {"temperature": 1.5},
        {"scale": 0},
        {},
    ]
    assert len({salt(**each) for each in own}) == len(own)
    assert salt(weights={"a": 1, "b": 2}) == salt(weights={"b": 2.0, "a": 1.0})
