"""Nothing that a stranger named or an expert answers commands the terminal."""

import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phatgoose.cli.screen import Screen
from phatgoose.experts.lora import CONFIG_FILE
from phatgoose.text import LINES, is_hidden

NASTY = "\x1b]0;owned\x07\u202egnp\x9b2K"


def shown(text):
    stream = io.StringIO()
    assert Screen(stream).write(text) == len(text)
    return stream.getvalue()


@given(st.text(st.characters()))
def test_what_is_written_is_visible_and_json_stays_json(text):
    written = shown(text)
    assert not any(is_hidden(c) and c not in LINES for c in written)
    for plain in (True, False):
        assert json.loads(shown(json.dumps([text], ensure_ascii=plain))) == [text]


def test_our_colours_pass():
    line = "\x1b[48;5;153;38;5;16mtoken\x1b[0m \x1b[38;5;9mbar\x1b[0m\n"
    assert shown(line) == line
    assert shown("\x1b[8mhidden\x1b[0m") == "\\u001b[8mhidden\x1b[0m"


@pytest.fixture
def nasty(world):
    """An expert in a folder of such a name, one whose config has it, and such an answer's base."""
    folder = world.one.rename(world.root / f"x{NASTY}")
    path = world.two / CONFIG_FILE
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "base_model_name_or_path": f"x/{NASTY}\nfake: line"}))
    return folder, world.two


@pytest.mark.parametrize("command", [["list"], ["verify"], ["verify", "--json"]])
def test_names_of_strangers(command, nasty, run):
    for expert in nasty:
        result = run("experts", command[0], expert, *command[1:])
        assert result.code in (1, 3)
        assert not any(is_hidden(c) for c in (result.out + result.err).replace("\n", ""))
        assert not any(line.startswith("fake") for line in (result.out + result.err).splitlines())


def test_answers(world, run, monkeypatch):
    def answer(*_, **__):
        return [f"two\nlines {NASTY}"]

    monkeypatch.setattr("phatgoose.cli.inference.answer_prompts", answer)
    asked = ("generate", "hello", "--base", world.base, "--experts", world.one)
    written = run(*asked).out
    assert written.startswith("two\nlines \\u001b]0;owned\\u0007")
    assert not any(is_hidden(c) for c in written.replace("\n", ""))
    (row,) = json.loads(run(*asked, "--json").out)
    assert row["answer"] == f"two\nlines {NASTY}"
