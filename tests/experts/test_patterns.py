"""Patterns of a config: what PEFT's `re` says, without ever taking its time."""

import re
import time
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from phatgoose.experts.patterns import PatternError, Patterns

PARTS = (
    r"q a . \. (a|q) (?:a|b) * + ? *? +? {1,2} {2} {,2} {0} \d \w [0-9] [^a] [a-q] [\d.] ^ $ | "
    "layers 1 ( (a ) ] - { } [ \\"
).split()
NAMES = ["q", "a.q", "layers.1.q", "aa.b1.qq", "x.layers.11.a", "a.", "q1", "1.1", "layersx1.q"]


def as_peft(patterns, name):
    key = get_pattern_key(patterns, name)
    fits = [i for i, pattern in enumerate(patterns) if pattern == key]
    # PEFT gives the name itself where nothing fits.
    return fits[0] if fits and re.match(rf"(.*\.)?({key})$", name) else None


@given(st.lists(st.lists(st.sampled_from(PARTS), max_size=6).map("".join), max_size=3, unique=True))
@settings(max_examples=500, deadline=None)
def test_says_what_peft_says(texts):
    try:
        patterns = Patterns(texts)
    except PatternError:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of "[[" and the like
        for name in NAMES:
            assert patterns.first(name) == as_peft(texts, name), name


@pytest.mark.parametrize(
    ("text", "fits", "not_"),
    [
        ("q_proj", "layers.0.q_proj", "layers.0.kq_proj"),
        (r"layers\.0\.self_attn\.q_proj", "model.layers.0.self_attn.q_proj", "layers.10.q_proj"),
        (r"^model\.layers\.0\.up", "model.layers.0.up", "x.model.layers.0.up"),
        (
            r".*\.layers\.(0|1|2[0-3])\..*(q|v)_proj$",
            "m.layers.22.a.v_proj",
            "m.layers.24.a.v_proj",
        ),
        (r"layers\.\d+\.mlp\.experts\.\d{1,3}\.up", "layers.3.mlp.experts.127.up", "layers.x.up"),
        (r"(?:[a-z]+\.)+q", "ab.cd.q", "ab.c1.k"),
    ],
)
def test_patterns_found_in_practice(text, fits, not_):
    patterns = Patterns(["nothing", text])
    assert patterns.first(fits) == 1 and patterns.first(not_) is None
    assert as_peft(["nothing", text], fits) == 1 and as_peft(["nothing", text], not_) is None


@pytest.mark.parametrize(
    "text",
    [
        "(?=a)",
        "(?!a)b",
        "(?<=a)b",
        r"(a)\1",
        "(?i)a",
        "(?P<x>a)",
        "a++",
        "a*+",
        "a**",
        "*a",
        "(a",
        "a)",
        r"\bq",
        r"\Aq",
        "[a",
        "[z-a]",
        "a{2,1}",
        "a{99999}",
        "q^",
        "(a$|b)c",
        "(" * 1000,
        "\\",
    ],
)
def test_what_is_not_understood_is_refused(text):
    with pytest.raises(PatternError, match="Write names in full"):
        Patterns([text])


@pytest.mark.parametrize(
    "texts",
    [
        ["(?:[a-z_.0-9]+)+!"],
        ["(a|a)*" * 50 + "b"],
        ["(a*)*" * 50 + "b"],
        [".*a" * 300] * 100,
        ["(((a{1000}){1000}){1000})"],
        ["(?:){9999}" * 90],
        ["[a-z]*" * 20_000],
        [f"z{i}.*q{i}" for i in range(3000)],
        [f"{i}(a|b)*a" + "(a|b)" * 20 for i in range(100)],  # whose automaton doubles 20 times
    ],
)
def test_no_pattern_takes_long(texts):
    start = time.process_time()
    try:
        patterns = Patterns(texts)
        for i in range(1000):
            patterns.first(f"model.layers.{i}.self_attn.q_proj{'a' * 50}b{i:b}".replace("0", "a"))
    except PatternError:
        pass
    assert time.process_time() - start < 20  # a tenth of it on an idle core; `re` takes years


def test_a_model_in_full_costs_little():
    names = [f"model.layers.{i}.self_attn.{m}_proj" for i in range(120) for m in "qkvo"]
    patterns = Patterns(map(re.escape, names))
    start = time.process_time()
    assert [patterns.first(name) for name in names] == list(range(len(names)))
    assert time.process_time() - start < 5
