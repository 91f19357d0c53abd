import re
from collections.abc import Callable

import pytest
from torch import nn
from transformers import PreTrainedTokenizerFast

import phatgoose
from phatgoose.analysis import render_text, token_table
from phatgoose.nn import Trace

ANSI = re.compile(r"\x1b\[[0-9;]*m")


def test_plain_has_every_token_with_its_expert(
    hand_made: Trace, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    text = render_text(hand_made, byte_tokenizer, width=80, color=False, labels=["one", "two"])
    assert "\x1b" not in text
    rows = [[cell.strip() for cell in line.split("|")] for line in text.splitlines()]
    for row in (["x", "red", "62.5%"], ["␣a", "green", "62.5%"], ["↵", "blue", "50.0%"]):
        assert row in rows
    assert "1. one" in text and "2. two" in text
    assert re.search(r"1 +red +33\.3%", text)
    assert re.search(r"– +no expert +12\.5%", text)


def test_colour_is_the_leading_experts(
    hand_made: Trace, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    text = render_text(hand_made, byte_tokenizer, width=80, color=True, labels=["one", "two"])
    colour = re.search(r"(\x1b\[48;[0-9;]*m) +1 ", text)
    assert colour and f"{colour[1]}x\x1b[0m" in text
    assert "x a\n" in ANSI.sub("", text)


def test_colour_follows_the_terminal_unless_named(
    hand_made: Trace, byte_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b" in render_text(hand_made, byte_tokenizer)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in render_text(hand_made, byte_tokenizer)


def test_tokens_can_be_left_out(hand_made: Trace, byte_tokenizer: PreTrainedTokenizerFast) -> None:
    text = render_text(hand_made, byte_tokenizer, color=False, tokens=False)
    assert "green" in text and "␣a" not in text


@pytest.mark.parametrize("color", [False, True])
def test_nothing_in_a_prompt_commands_the_terminal(
    color: bool,
    routed: Callable[..., nn.Module],
    byte_tokenizer: PreTrainedTokenizerFast,
) -> None:
    model = routed("llama", ["a\x1b[2J", "b"])
    with phatgoose.record(model) as trace:
        model(**byte_tokenizer("x\x1b[2J\u202ey\r", return_tensors="pt"))
    text = render_text(trace, byte_tokenizer, width=10, color=color)
    assert not set(ANSI.sub("", text)) & set("\x1b\r\u202e")
    shown = ANSI.sub("", text).replace("\n", "")
    assert all(token.text in shown for token in token_table(trace, byte_tokenizer))


def test_an_encoder_decoder_has_both_texts(
    routed: Callable[..., nn.Module], byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = routed("t5", ["a", "b", "c"])
    inputs = byte_tokenizer(["a cat", "two dogs"], padding=True, return_tensors="pt")
    with phatgoose.record(model) as trace:
        model.generate(**inputs, max_new_tokens=4, num_beams=2, do_sample=False)
    text = render_text(trace, byte_tokenizer, width=80, color=False, labels=["cat", "dogs"])
    assert set(trace.tokens) == {"encoder", "decoder", "cross"}
    titles = re.findall(r"^\d\. (.*)$", text, re.MULTILINE)
    assert (
        titles
        == ["cat (encoder)", "dogs (encoder)", *["cat (decoder)"] * 2] + ["dogs (decoder)"] * 2
    )
