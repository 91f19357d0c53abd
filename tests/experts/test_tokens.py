"""Tokenizers: what one owner added is no difference, an id that means two things is."""

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from phatgoose.experts.base import BaseIdentity
from phatgoose.experts.tokens import AddedTokens, difference, identify_tokens, tokens_hash


def tokenizer(*added, words=8, **special):
    inner = Tokenizer(models.WordLevel({f"w{i}": i for i in range(words)}, unk_token="w0"))
    made = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="w0", **special)
    for token in added:
        made.add_special_tokens({"pad_token": token}) if token == "[PAD]" else made.add_tokens(
            token
        )
    return made


@pytest.mark.parametrize(
    ("one", "other", "said"),
    [
        (tokenizer(), tokenizer(), None),
        (tokenizer(), tokenizer("[PAD]"), None),
        (tokenizer("[PAD]"), tokenizer("[PAD]", "<tool>"), None),
        (tokenizer(), tokenizer(bos_token="w1", eos_token="w2"), None),
        (tokenizer("[PAD]"), tokenizer("<pad>"), "id 8 is '[PAD]' in one and '<pad>' in the other"),
        (tokenizer("a", "b"), tokenizer("b", "a"), "'a' is 8 in one and 9 in the other"),
        (tokenizer(), tokenizer(words=9), "the tokenizers differ"),
        (tokenizer("x"), tokenizer("x", words=9), "the tokenizers differ"),
        (tokenizer("w8"), tokenizer(words=9), None),  # the same id for the same token
    ],
)
def test_what_two_tokenizers_differ_in(one, other, said):
    found = difference(identify_tokens(one), identify_tokens(other))
    assert (found is None) == (said is None)
    assert said is None or said in found
    assert (difference(identify_tokens(other), identify_tokens(one)) is None) == (said is None)


def test_a_tokenizer_without_added_tokens_is_written_as_before():
    whole, added = identify_tokens(tokenizer(bos_token="w1"))
    assert added is None and whole == tokens_hash({f"w{i}": i for i in range(8)})
    identity = BaseIdentity(None, None, "shape", whole, added)
    assert set(identity.to_json()) == {"name", "revision", "shape", "tokenizer"}
    assert BaseIdentity.from_json(identity.to_json()) == identity


def test_records_of_before_still_count():
    """They have a hash of the whole vocabulary and nothing of what was added to it."""
    padded = tokenizer("[PAD]")
    whole, added = identify_tokens(padded)
    assert added == AddedTokens(identify_tokens(tokenizer())[0], {"[PAD]": 8})
    assert difference((whole, None), (whole, added)) is None  # the same, padding and all
    assert difference(identify_tokens(tokenizer()), (whole, added)) is None
    assert difference((whole, None), identify_tokens(tokenizer())) == "the tokenizers differ"


def test_json_round_trip():
    identity = BaseIdentity("a", None, "s", *identify_tokens(tokenizer("[PAD]", "<tool>")))
    assert BaseIdentity.from_json(identity.to_json()) == identity


@pytest.mark.parametrize(
    "added",
    [
        None,
        [],
        {},
        {"without": "x"},
        {"without": 1, "tokens": {}},
        {"without": "x", "tokens": []},
        {"without": "x", "tokens": {"a": -1}},
        {"without": "x", "tokens": {"a": True}},
        {"without": "x", "tokens": {"a": "1"}},
        {"without": "x", "tokens": {}, "more": 1},
    ],
)
def test_what_is_no_record_of_added_tokens(added):
    record = BaseIdentity("a", None, "s", "t").to_json()
    with pytest.raises(ValueError, match=r"base\.added"):
        BaseIdentity.from_json({**record, "added": added})
