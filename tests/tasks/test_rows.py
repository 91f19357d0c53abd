"""Every form of a row, and what is said of rows of none."""

from typing import Any

import pytest

from phatgoose.errors import TaskFormatError
from phatgoose.tasks import Conversation, Example, parse_row

USER = {"role": "user", "content": "w1"}
ANSWER = {"role": "assistant", "content": "w2"}
CHAT = [USER, ANSWER]


def one(row: Any, **settings: Any) -> Example:
    (example,) = parse_row(row, "file, line 1", **settings)
    return example


def test_messages_are_an_example_for_each_answer() -> None:
    system = {"role": "system", "content": "s"}
    last = {"role": "assistant", "content": "w4"}
    messages = [system, USER, ANSWER, {"role": "user", "content": "w3"}, last]
    first, second = parse_row({"messages": messages}, "x")
    assert isinstance(first, Conversation) and isinstance(second, Conversation)
    assert (first.turns, first.answer) == ((system, USER), ANSWER)
    assert (second.turns, second.answer) == (tuple(messages[:4]), last)
    assert (second.prompt, second.target) == ("s\nw1\nw2\nw3", "w4")


def test_turns_that_answer_nobody_are_only_read() -> None:
    hello = {"role": "assistant", "content": "hello"}
    unweighted = {**ANSWER, "weight": 0}
    found = parse_row({"messages": [hello, *CHAT, hello, USER, unweighted, *CHAT]}, "x")
    assert [example.target for example in found] == ["w2", "w2"]
    turns = found[1].turns  # type: ignore[attr-defined]
    assert turns == (hello, *CHAT, hello, USER, ANSWER, USER)


def test_sharegpt() -> None:
    turns = [{"from": "human", "value": "w1"}, {"from": "gpt", "value": "w2"}]
    assert one({"id": 3, "conversations": turns}) == one({"messages": CHAT})


def test_prompt_and_completion_as_messages() -> None:
    earlier = [USER, {"role": "assistant", "content": "before"}, USER]
    example = one({"prompt": earlier, "completion": [ANSWER]})
    assert isinstance(example, Conversation)
    assert (example.turns, example.answer) == (tuple(earlier), ANSWER)


def test_tools_and_their_calls() -> None:
    """OpenAI's rows have arguments as JSON, data sets None where a row lacks a field."""
    call = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    tools = [{"type": "function", "function": {"name": "f"}}]
    calling = {"role": "assistant", "content": None, "tool_calls": [call]}
    result = {"role": "tool", "content": "3", "tool_calls": None, "name": None}
    row = {"messages": [USER, calling, result, ANSWER], "tools": tools}
    asked, answered = parse_row(row, "x")
    assert isinstance(asked, Conversation) and isinstance(answered, Conversation)
    assert asked.answer is not None and asked.answer["content"] == ""
    assert asked.answer["tool_calls"][0]["function"]["arguments"] == {"x": 1}
    assert answered.turns[2] == {"role": "tool", "content": "3"}
    assert asked.tools == answered.tools == tuple(tools)
    as_text = {**row, "tools": '[{"type": "function", "function": {"name": "f"}}]'}
    assert parse_row(as_text, "x") == [asked, answered]
    bare = {"name": "f", "arguments": {"x": 1}}
    assert one({"messages": [USER, {**calling, "tool_calls": [bare]}]}).answer == {  # type: ignore[attr-defined]
        "role": "assistant",
        "content": "",
        "tool_calls": [bare],
    }


def test_parts_of_a_content_are_one_text() -> None:
    parts = [{"type": "text", "text": "w"}, {"type": "text", "text": "1"}]
    assert one({"messages": [{**USER, "content": parts}, ANSWER]}) == one({"messages": CHAT})


def test_alpaca() -> None:
    row = {"instruction": "Add.", "input": "1, 2", "output": "3"}
    assert one(row) == Example(
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:\n",
        "3",
    )
    alone = Example(
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nAdd.\n\n### Response:\n",
        "3",
    )
    for without in ({"instruction": "Add.", "output": "3"}, {**row, "input": ""}):
        assert one(without) == alone
    # The data set has the whole prompt beside it, and a mixed one every field in every row.
    assert one({**row, "input": None, "text": "Below is ...", "messages": None}) == alone


def test_texts_as_chats() -> None:
    def turns(row: dict[str, Any]) -> tuple[Any, Any]:
        example = one(row, chat=True)
        assert isinstance(example, Conversation)
        return example.turns, example.answer

    wanted = (USER,), ANSWER
    assert turns({"inputs": "w1", "targets": "w2"}) == wanted
    assert turns({"prompt": "w1", "completion": "w2"}) == wanted
    assert turns({"instruction": "w1", "input": "", "output": "w2"}) == wanted
    both = {"instruction": "w1", "input": "w5", "output": "w2"}
    assert turns(both) == (({"role": "user", "content": "w1\nw5"},), ANSWER)
    assert turns({"messages": CHAT}) == wanted
    with pytest.raises(TaskFormatError, match="text without a prompt.*Leave out --chat"):
        one({"text": "w1"}, chat=True)


def test_choices_of_a_conversation() -> None:
    assert one({"messages": CHAT, "choices": ["w2", "w3"]}).choices == ("w2", "w3")
    with pytest.raises(TaskFormatError, match="the answer is 'w2', which is not in choices"):
        one({"messages": CHAT, "choices": ["w3"]})
    with pytest.raises(TaskFormatError, match="has choices, and 2 answers in messages"):
        parse_row({"messages": CHAT * 2, "choices": ["w2"]}, "x")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": "w1"}, "messages is a str; a list of messages is wanted"),
        ({"messages": []}, "messages is an empty list"),
        ({"messages": ["w1"]}, "has a str as message 1"),
        ({"messages": [USER]}, "holds no assistant's turn after a user's"),
        ({"messages": [ANSWER]}, "holds no assistant's turn after a user's"),
        ({"messages": [USER, {**ANSWER, "weight": 0}]}, "holds no assistant's turn"),
        ({"messages": [{"content": "w1"}, ANSWER]}, "has no role in message 1"),
        ({"messages": [{"role": "user"}, ANSWER]}, "has no content in message 1, of role user"),
        ({"messages": [USER, {"role": "assistant"}]}, "no content in message 2, of role assistant"),
        ({"messages": [{**USER, "content": 3}, ANSWER]}, "a int as the content of message 1"),
        (
            {"messages": [{**USER, "content": [{"type": "image", "url": "x"}]}, ANSWER]},
            "a part of type image in message 1; only text is read",
        ),
        ({"messages": [USER, {**ANSWER, "tool_calls": "f"}]}, "tool_calls in message 2"),
        ({"messages": [USER, {**ANSWER, "tool_calls": [{}]}]}, "without a function's name"),
        (
            {"messages": [USER, {**ANSWER, "tool_calls": [{"name": "f", "arguments": "{"}]}]},
            "whose arguments are not JSON",
        ),
        ({"messages": CHAT, "tools": "{"}, "has tools that are not JSON"),
        ({"messages": CHAT, "tools": {"name": "f"}}, "has a dict as tools, a list is wanted"),
        ({"messages": CHAT, "chat_template_kwargs": 3}, "chat_template_kwargs that are no object"),
        ({"prompt": CHAT, "completion": "w2"}, "prompt is a list and completion is a str"),
        ({"prompt": [USER], "completion": [USER]}, "completion holds no assistant's turn"),
        ({"prompt": CHAT, "completion": [ANSWER]}, "completion holds no assistant's turn"),
        ({"instruction": "a", "output": 1}, "output is a int"),
        ({"instruction": "a", "input": 1, "output": "b"}, "input is a int"),
        ({"messages": None}, "has the fields messages; wanted inputs and targets, or prompt"),
    ],
)
def test_a_row_of_no_form(row: dict[str, Any], words: str) -> None:
    with pytest.raises(TaskFormatError) as raised:
        parse_row(row, "file, line 1")
    message = str(raised.value)
    assert message.startswith("file, line 1: ") and words in message and "\n" not in message
