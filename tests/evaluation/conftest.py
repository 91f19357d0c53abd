"""Tiny models, a tokenizer with one token per character, and examples of several lengths."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

import phatgoose
from phatgoose.tasks import Example
from tests.models import PAD, VOCABULARY, make_model, mixed_targets, save_experts

CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789 \n.,:?!-'"
EOS = 1


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<end>", *CHARACTERS])}
    assert len(vocabulary) <= VOCABULARY and vocabulary["<pad>"] == PAD
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    plain.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    plain.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", eos_token="<end>", model_max_length=64
    )


@pytest.fixture
def make_routed(tmp_path: Path) -> Callable[..., nn.Module]:
    """make_routed("llama", routed=True): a model with three experts of its own, or plain."""

    def make(family: str, routed: bool = True, **settings: Any) -> nn.Module:
        model = make_model(family)
        if routed:
            folders = save_experts(tmp_path / family, model, mixed_targets(family, 3))
            phatgoose.route(model, phatgoose.ExpertPool.load(folders), **settings)
        return model

    return make


@pytest.fixture
def choice_examples() -> list[Example]:
    """Prompts of 1 to 40 tokens, and one too long for the model, with 2 to 5 choices each."""
    source = random.Random(0)
    examples = []
    for length in (1, 2, 40, 17, 17, 3, 90):
        choices = tuple(text(source, source.randint(1, 12)) for _ in range(source.randint(2, 5)))
        examples.append(Example(text(source, length), choices[0], choices))
    return examples


@pytest.fixture
def text_examples() -> list[Example]:
    source = random.Random(1)
    return [Example(text(source, length), text(source, 5)) for length in (1, 9, 30, 9, 90, 2)]


def text(source: random.Random, length: int) -> str:
    return "".join(source.choice(CHARACTERS) for _ in range(length))
