from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

import phatgoose
from phatgoose.analysis import label_sequences, token_table
from phatgoose.errors import ConfigError
from phatgoose.nn import TokenTable, Trace


def trace_of(ids: list[int], sequence: list[int] | None = None) -> Trace:
    rows = sequence or [0] * len(ids)
    position = [rows[:i].count(row) for i, row in enumerate(rows)]
    table = TokenTable(torch.tensor(ids), torch.tensor(rows), torch.tensor(position))
    return Trace(names=["a"], top_k=1, tokens={"decoder": table})


def texts(tokenizer: PreTrainedTokenizerFast, pieces: list[str]) -> list[str]:
    trace = trace_of(tokenizer.convert_tokens_to_ids(pieces))
    return [token.text for token in token_table(trace, tokenizer)]


def test_byte_level_pieces(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    euro = byte_tokenizer.tokenize("€")
    assert texts(byte_tokenizer, ["x", "Ġa", "Ġ", "Ċ", "ĉ", *euro, "</s>"]) == [
        *("x", "␣a", "␣", "↵", "⇥", r"\xe2", r"\x82", r"\xac", "</s>"),
    ]


def test_sentencepiece_keeps_the_space_of_the_first_word(
    sentence_tokenizer: PreTrainedTokenizerFast,
) -> None:
    pieces = ["▁the", "film", "▁", "<0x0A>", "<0xE2>", "<0x1B>", "<unk>"]
    wanted = ["␣the", "film", "␣", "↵", r"\xe2", r"\x1b", "<unk>"]
    assert texts(sentence_tokenizer, pieces) == wanted


def test_embeddings_and_ids_without_a_name(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = token_table(trace_of([-1, 9999]), byte_tokenizer)
    assert [token.text for token in tokens] == ["<embedding>", "<9999>"]


def test_generation_gives_each_sequence_in_order(
    routed: Callable[..., nn.Module], byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = routed("llama", ["a", "b"])
    inputs = byte_tokenizer(["a cat", "no"], padding=True, return_tensors="pt")
    with phatgoose.record(model) as trace:
        output = model.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None)
    for number, prompt in enumerate(("a␣cat", "no")):
        mine = [token for token in token_table(trace, byte_tokenizer) if token.sequence == number]
        assert [token.position for token in mine] == list(range(len(mine)))
        assert "".join(token.text for token in mine).startswith(prompt)
        new = token_table(trace_of(output[number, -4:-1].tolist()), byte_tokenizer)
        assert [token.text for token in mine[-3:]] == [token.text for token in new]


def test_labels_are_the_beginning_or_the_callers(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    ids = byte_tokenizer("one\n two", return_tensors=None).input_ids
    trace = trace_of([*ids, 1], [0] * len(ids) + [1])
    assert label_sequences(trace, byte_tokenizer)["decoder"] == ["one two", "sequence 2"]
    named = label_sequences(trace, byte_tokenizer, ["x", "\x1b[31mred"])["decoder"]
    assert named == ["x", r"\x1b[31mred"]
    long = trace_of(byte_tokenizer("word " * 50).input_ids)
    assert len(label_sequences(long, byte_tokenizer)["decoder"][0]) == 36


def test_labels_are_shared_out_among_beams(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    trace = trace_of([5, 6, 7, 8], [0, 1, 2, 3])
    assert label_sequences(trace, byte_tokenizer, ["x", "y"])["decoder"] == ["x", "x", "y", "y"]
    for labels in ([], ["x", "y", "z"]):
        with pytest.raises(ConfigError, match="has 4 sequences"):
            label_sequences(trace, byte_tokenizer, labels)
