"""What cannot be seen is written as an escape, in every error too."""

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phatgoose.errors import LONGEST, ConfigError, PhatgooseError
from phatgoose.text import LINES, is_hidden, visible


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("q_proj", "q_proj"),
        ("\x1b]0;owned\x07", r"\x1b]0;owned\x07"),
        ("a\nCRITICAL b\r", r"a\nCRITICAL b\r"),
        ("\u202egnp.exe\u2066", r"\u202egnp.exe\u2066"),
        ("\ud800", r"\ud800"),
        ("\u2028\ufeff\x85\x9b", r"\u2028\ufeff\x85\x9b"),
        ("naïve\u00a0日本 😀", "naïve\u00a0日本 😀"),
    ],
)
def test_visible(text, shown):
    assert visible(text) == shown


def test_lines_keep_what_an_answer_needs():
    family = "\U0001f469\u200d\U0001f467"
    assert visible(f"a\n\tb {family}\x1b[2K\r", LINES) == f"a\n\tb {family}\\x1b[2K\\r"


@given(st.text(st.characters()))
def test_nothing_hidden_is_left_and_twice_is_once(text):
    shown = visible(text)
    assert not any(map(is_hidden, shown))
    assert visible(shown) == shown
    shown.encode()


def test_every_error_is_one_visible_line_of_bounded_length():
    error = ConfigError("x\x1b[2K\n" * LONGEST + "Give another.")
    assert "\x1b" not in str(error) and "\n" not in str(error)
    assert len(str(error)) <= LONGEST and str(error).endswith("Give another.")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert PhatgooseError("a", 1).args == ("a", 1)
