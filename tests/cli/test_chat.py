"""Conversations as data and as prompts, by every command that reads either."""

import json

import pytest
from transformers import AutoTokenizer

from phatgoose.experts import load_expert
from phatgoose.tasks import Conversation, load_examples

CPU = ("--device", "cpu")
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
WORDS = ("goose", "hat", "rank", "token")


def chat(word, **more):
    turns = [("user", f"reverse {word}"), ("assistant", word[::-1])]
    return {"messages": [{"role": role, "content": text} for role, text in turns], **more}


CHATS = [chat(word) for word in WORDS]
TEXTS = [{"prompt": f"reverse {word}", "completion": word[::-1]} for word in WORDS]


@pytest.fixture
def chatty(world):
    """The world, whose base has a chat template, and whose tasks are conversations."""
    set_template(world, TEMPLATE)
    world.write_data(*CHATS)
    for split in ("train", "test"):
        (world.tasks / "one").mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(row) + "\n" for row in CHATS)
        (world.tasks / "one" / f"{split}.jsonl").write_text(lines)
    return world


def set_template(world, template):
    tokenizer = AutoTokenizer.from_pretrained(world.base)
    tokenizer.chat_template = template
    (world.base / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(world.base)


def gated(run, world, *rows, chat=False):
    """The gates that these rows give."""
    world.write_data(*rows)
    options = ("--base", world.base, "--data", world.data, "--gate-steps", 3, *CPU)
    result = run("gate", world.one, *options, *["--chat"] * chat)
    assert result.code == 0, result.err
    return load_expert(world.one).gates


def same(one, other):
    return all(one.vectors[name].equal(other.vectors[name]) for name in one.vectors)


def test_gates_of_conversations_are_those_of_their_texts(run, chatty):
    tokenizer = AutoTokenizer.from_pretrained(chatty.base)
    examples = load_examples(chatty.data)
    assert all(isinstance(example, Conversation) for example in examples)
    by_chat = gated(run, chatty, *CHATS)
    assert by_chat.examples == 12
    assert same(by_chat, gated(run, chatty, *TEXTS, chat=True))
    assert not same(by_chat, gated(run, chatty, *TEXTS))
    assert examples[0].texts(tokenizer) == ("user: reverse goose\nassistant: ", "esoog\n")


def test_all_forms_in_one_file(run, chatty):
    alpaca = {"instruction": "reverse", "input": "goose", "output": "esoog"}
    lists = {"prompt": CHATS[0]["messages"][:1], "completion": CHATS[0]["messages"][1:]}
    gates = gated(run, chatty, CHATS[0], TEXTS[1], alpaca, lists, {"text": "goose"})
    assert gates.examples == 15


def test_a_base_without_a_template(run, chatty, refuses):
    set_template(chatty, None)
    options = ("--base", chatty.base, "--data", chatty.data, *CPU)
    chatty.ungated("one")
    says = ["'reverse goose", "has no chat template", "prompt and completion"]
    refuses("gate", chatty.one, *options, says=says)
    refuses("train", *options, "--out", chatty.new, says=says)
    pool = ("--base", chatty.base, "--experts", chatty.one, chatty.two, *CPU)
    short = ("--max-new-tokens", 4)
    refuses(
        "generate", "goose", *pool, "--router", "arrow", "--chat", *short, says=["no chat template"]
    )


def test_an_answer_without_a_token(run, chatty, refuses):
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    set_template(chatty, template)
    chatty.write_data(chat("goose"), chat(""))
    chatty.ungated("one")
    options = ("--base", chatty.base, "--data", chatty.data, *CPU)
    refuses("gate", chatty.one, *options, says=[chatty.data, "'reverse '", "no token to learn"])


def test_examples_that_are_cut_are_counted(run, chatty):
    argv = ("gate", chatty.one, "--base", chatty.base, "--data", chatty.data, "--gate-steps", 1)
    result = run(*argv, *CPU, "--max-length", 36)
    assert result.code == 0
    (line,) = result.lines
    assert line == (
        f"phatgoose: {chatty.data}: 2 of 4 examples have more than 36 tokens and are cut to so many"
    )
    assert run(*argv, *CPU).lines == []


def test_train_and_the_commands_for_many(run, chatty):
    short = ("--base", chatty.base, "--gate-steps", 2, *CPU)
    argv = ("train", *short, "--data", chatty.data, "--out", chatty.new, "--steps", 2)
    assert run(*argv).code == 0
    chatty.ungated("one")
    many = run("experts", "gate", chatty.one, "--tasks", chatty.tasks, *short)
    assert many.code == 0, many.err
    assert load_expert(chatty.one).gates.examples == 8
    derived = run("experts", "derive", chatty.one, "--tasks", chatty.tasks, *short[:2], *CPU)
    assert derived.code == 0, derived.err
    assert load_expert(chatty.one).signatures["prompt_mean"].examples == 4


def test_generate_and_trace(run, chatty):
    pool = ("--base", chatty.base, "--experts", chatty.one, chatty.two, *CPU)
    short = (*pool, "--max-new-tokens", 8)
    asked = run("generate", "reverse goose", *short, "--chat")
    assert asked.code == 0, asked.err
    written = "user: reverse goose\nassistant: "
    assert asked.out == run("generate", written, *short, "--raw").out
    traced = run("trace", "reverse goose", *short, "--chat", "--out", chatty.out, "--json")
    assert json.loads(traced.out)["answer"] + "\n" == asked.out
    both = run("generate", "reverse goose", *short, "--chat", "--raw")
    assert both.code == 1 and "Leave one out" in both.lines[0]


def test_eval_and_analyze(run, chatty):
    """The same scores as of texts that are made chats, but not from their answers."""
    pool = ("--base", chatty.base, "--experts", chatty.one, chatty.two, *CPU)
    choices = ["esoog", "tah", "knar", "nekot"]
    rows = [chat(word, choices=choices) for word in WORDS]
    test = chatty.tasks / "one" / "test.jsonl"

    def scores(*rows, chat=False):
        test.write_text("".join(json.dumps(row) + "\n" for row in rows))
        argv = (
            "eval",
            *pool,
            "--tasks",
            chatty.tasks,
            "--out",
            chatty.out,
            "--methods",
            "base,own",
        )
        result = run(*argv, "--json", *["--chat"] * chat)
        assert result.code == 0, result.err
        return json.loads(result.out)

    found = scores(*rows)
    texts = [{**row, "choices": choices} for row in TEXTS]
    assert scores(*texts, chat=True)["tasks"] == found["tasks"]
    assert scores(*texts)["tasks"]["one"]["hash"] != found["tasks"]["one"]["hash"]
    generated = scores(*CHATS)
    assert generated["tasks"]["one"]["metric"] == "exact_match"
    set_template(chatty, TEMPLATE.replace(": ", "? "))
    assert not set(scores(*CHATS)["answers"]) & set(generated["answers"])
    drawn = run("analyze", *pool, "--tasks", chatty.tasks, "--out", chatty.drawn, "--json")
    assert drawn.code == 0, drawn.err
    assert json.loads(drawn.out)["tasks"]["one"]["examples"] == 4


def test_eval_leaves_out_what_no_metric_knows(run, chatty):
    calling = chat("goose")
    calling["messages"][1]["tool_calls"] = [{"function": {"name": "reverse", "arguments": {}}}]
    (chatty.tasks / "one" / "test.jsonl").write_text(json.dumps(calling) + "\n")
    pool = ("--base", chatty.base, "--experts", chatty.one, *CPU)
    argv = ("eval", *pool, "--tasks", chatty.tasks, "--out", chatty.out, "--methods", "base")
    result = run(*argv)
    assert result.code == 1
    assert "an answer calls tools, which no metric knows: 'reverse goose" in result.lines[-1]
