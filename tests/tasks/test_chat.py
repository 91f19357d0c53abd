"""Conversations by chat templates: those of known models, in their shape, and odd ones."""

from collections.abc import Sequence
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from phatgoose.errors import ConfigError
from phatgoose.tasks import encode_example, encode_prompt, one_turn, parse_row
from tests.cli.conftest import make_tokenizer

# ChatML, as Qwen2.5 and SmolLM2 have it.
CHATML = (
    "{% for m in messages %}[{{ m.role }}.{{ m.content }}]\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant.{% endif %}"
)
# Phi-3's ends a conversation that is not to go on.
ENDED = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% else %}!{% endif %}"
)
# Qwen3's begins an answer that is asked for with an empty thought, a given one not.
THINKING = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: "
    "{% if enable_thinking is defined and not enable_thinking %}? {% endif %}{% endif %}"
)
# The system's turn stands with the last of a user, which is another one once an answer is there.
MOVING = (
    "{% for m in messages %}{% if loop.last %}{{ m.role }}, {% endif %}{{ m.content }}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant{% endif %}"
)
STRICT = (
    "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}" + CHATML
)
TRIMMED = CHATML.replace("m.content", "m.content | trim")


def tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    found = make_tokenizer()
    found.chat_template = template
    return found


def texts(template: str | None, messages: Sequence[Any], **row: Any) -> tuple[str, str]:
    *_, example = parse_row({"messages": list(messages), **row}, "x")
    return example.texts(tokenizer(template))  # type: ignore[attr-defined, no-any-return]


HELLO = ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"})


@pytest.mark.parametrize(
    ("template", "prompt", "target"),
    [
        (CHATML, "[user.hi]\n[assistant.", "yo]\n"),
        (ENDED, "user: hi\nassistant: ", "yo\n!"),
        (THINKING, "user: hi\nassistant: ", "yo\n"),
        (TRIMMED, "[user.hi]\n[assistant.", "yo]\n"),
    ],
)
def test_the_answer_is_what_comes_after_the_prompt(template: str, prompt: str, target: str) -> None:
    assert texts(template, HELLO) == (prompt, target)


def test_an_answer_begins_where_it_parts_from_the_prompt() -> None:
    settings = {"chat_template_kwargs": {"enable_thinking": False}}
    assert texts(THINKING, HELLO, **settings) == ("user: hi\nassistant: ", "yo\n")
    (example,) = parse_row({"messages": list(HELLO), **settings}, "x")
    assert example.asked(tokenizer(THINKING)).endswith("assistant: ? ")  # type: ignore[attr-defined]


def test_earlier_turns_are_the_prompt() -> None:
    prompt, target = texts(CHATML, [*HELLO, *HELLO])
    assert prompt == "[user.hi]\n[assistant.yo]\n[user.hi]\n[assistant."
    assert target == "yo]\n"


def test_an_empty_answer_still_ends() -> None:
    empty = {"role": "assistant", "content": ""}
    assert texts(CHATML, [HELLO[0], empty]) == ("[user.hi]\n[assistant.", "]\n")


def test_what_the_template_does_not_take() -> None:
    with pytest.raises(ConfigError, match="'hi.*the turns before an answer in another way"):
        texts(MOVING, HELLO)
    system = {"role": "system", "content": "be kind"}
    with pytest.raises(ConfigError, match="'be kind.*refuses the conversation .user first"):
        texts(STRICT, [system, *HELLO])
    with pytest.raises(ConfigError, match="'hi.*has no chat template. Give it one"):
        texts(None, HELLO)


def test_the_template_writes_all_special_tokens() -> None:
    """No second end-of-sequence, and no beginning of its own."""
    words = tokenizer(CHATML)
    (example,) = parse_row({"messages": list(HELLO)}, "x")
    encoded = encode_example(words, example, max_length=99)
    assert encoded.target == words("yo]\n", add_special_tokens=False)["input_ids"]
    assert words.eos_token_id not in encoded.prompt + encoded.target


def test_ids_are_cut_as_those_of_texts() -> None:
    words = tokenizer(ENDED)
    example = one_turn("what is that?", "a goose")
    whole = encode_example(words, example, max_length=999)
    short = encode_example(words, example, max_length=len(whole.target) + 3)
    assert short.target == whole.target and short.prompt == whole.prompt[-3:]
    tiny = encode_example(words, example, max_length=4)
    assert (tiny.prompt, tiny.target) == ([], whole.target[:4])
    asked = encode_prompt(words, example, max_length=999)
    assert asked == whole.prompt
    assert encode_prompt(words, example, max_length=6) == asked[-5:]  # one is the answer's


def test_another_answer() -> None:
    words, example = tokenizer(ENDED), one_turn("is it?", "yes", ("yes", "no"))
    for choice in ("yes", "no"):
        encoded = encode_example(words, example, choice, max_length=99)
        assert words.decode(encoded.target) == f"{choice}\n!"
