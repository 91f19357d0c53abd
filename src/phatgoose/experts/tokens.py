"""Tells tokenizers apart by what their ids mean."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class AddedTokens:
    """The tokens that somebody added to a vocabulary, and a hash of the vocabulary without them."""

    without: str
    tokens: Mapping[str, int]

    @classmethod
    def from_json(cls, value: Any) -> "AddedTokens":
        """Read what a file says. Raises ValueError where that is none."""
        if not isinstance(value, dict) or sorted(value) != ["tokens", "without"]:
            raise ValueError("base.added is no object with tokens, without")
        tokens = value["tokens"]
        if not isinstance(value["without"], str) or not isinstance(tokens, dict):
            raise ValueError("base.added has no hash and tokens")
        if any(type(number) is not int or number < 0 for number in tokens.values()):
            raise ValueError("base.added.tokens are not ids by token")
        return cls(**value)


def identify_tokens(tokenizer: Any) -> tuple[str, AddedTokens | None]:
    """A hash of the vocabulary, and its added tokens, if it has any."""
    whole: dict[str, int] = tokenizer.get_vocab()
    plain = _without_added(tokenizer, whole)
    added = {token: number for token, number in whole.items() if plain.get(token) != number}
    return tokens_hash(whole), AddedTokens(tokens_hash(plain), added) if added else None


def difference(
    one: tuple[str, AddedTokens | None], other: tuple[str, AddedTokens | None]
) -> str | None:
    """Why some id means two things in two tokenizers, in words, or None.

    Tokens that only one of them has are no difference. Of a tokenizer without added tokens its hash
    is that of the vocabulary that others may have added to.
    """
    if one[0] == other[0]:
        return None
    plain = [added.without if added else whole for whole, added in (one, other)]
    if plain[0] != plain[1]:
        return "the tokenizers differ"
    tokens, others = (dict(added.tokens) if added else {} for _, added in (one, other))
    ids = {number: token for token, number in others.items()}
    for token, number in sorted(tokens.items(), key=lambda pair: pair[1]):
        theirs = others.get(token, number)
        if theirs != number:
            return f"the tokenizers differ: {token!r} is {number} in one and {theirs} in the other"
        if ids.get(number, token) != token:
            both = f"{token!r} in one and {ids[number]!r} in the other"
            return f"the tokenizers differ: id {number} is {both}"
    return None


def tokens_hash(vocabulary: Mapping[str, int]) -> str:
    """SHA-256 over the tokens and their ids."""
    return hashlib.sha256(json.dumps(vocabulary, sort_keys=True).encode()).hexdigest()


def _without_added(tokenizer: Any, whole: Mapping[str, int]) -> Mapping[str, int]:
    """The vocabulary that the tokenizer was trained with."""
    inner: Any = getattr(tokenizer, "backend_tokenizer", None)
    if inner is not None and hasattr(inner, "get_vocab"):
        plain: dict[str, int] = inner.get_vocab(with_added_tokens=False)
        return plain
    added = tokenizer.get_added_vocab() if hasattr(tokenizer, "get_added_vocab") else {}
    return {token: number for token, number in whole.items() if token not in added}
