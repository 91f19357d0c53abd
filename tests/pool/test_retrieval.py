"""One expert per query, by the nearest stored prompt."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import phatgoose
from phatgoose.default import tiny
from phatgoose.errors import ConfigError
from phatgoose.models import load_base
from phatgoose.pool import retrieval
from phatgoose.pool.retrieval import build_index
from phatgoose.tasks import Example

EXAMPLES = {
    "fruit": [Example(f"I eat {x} for breakfast.\n", "") for x in ("plums", "figs", "a pear")],
    "travel": [Example(f"The train to {x} is late again.\n", "") for x in ("Rome", "Bonn")],
}
QUERIES = ["I eat apples for breakfast.\n", "The train to Oslo is late again.\n"]


@pytest.fixture(scope="module")
def base() -> tuple[Any, Any]:
    return load_base(tiny.BASE, device="cpu")


def test_it_is_the_nearest_by_cosine_of_centred_mean_embeddings(base: tuple[Any, Any]) -> None:
    model, tokenizer = base
    index = build_index(EXAMPLES, model, tokenizer)
    assert index.choose(QUERIES, model, tokenizer) == ["fruit", "travel"]
    table = model.get_input_embeddings().weight.detach()

    def mean(text: str) -> torch.Tensor:
        return table[tokenizer(text)["input_ids"]].mean(0)

    stored = torch.stack([mean(e.prompt) for rows in EXAMPLES.values() for e in rows])
    wanted = F.normalize(stored - stored.mean(0), dim=-1)
    torch.testing.assert_close(index.embeddings, wanted)
    assert index.owners.tolist() == [0, 0, 0, 1, 1]
    # The same whatever else is asked, and while the model routes.
    phatgoose.route(model, phatgoose.ExpertPool.load(tiny.expert_folders()[:2]))
    assert [index.choose([q], model, tokenizer)[0] for q in QUERIES] == ["fruit", "travel"]
    phatgoose.unroute(model)


def test_it_is_kept_and_read_again(
    base: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build_index(EXAMPLES, *base, cache=tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(retrieval, "embed", None)
        again = build_index(EXAMPLES, *base, cache=tmp_path)
    assert again.key == first.key and torch.equal(again.embeddings, first.embeddings)
    assert again.choose(QUERIES, *base) == ["fruit", "travel"]
    path.write_bytes(whole[:-7])  # damaged: made anew
    assert torch.equal(build_index(EXAMPLES, *base, cache=tmp_path).centre, first.centre)
    assert len(path.read_bytes()) == len(whole)
    build_index(EXAMPLES, *base, stored=1, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_few_are_stored_by_the_seed(base: tuple[Any, Any]) -> None:
    one = build_index(EXAMPLES, *base, stored=1)
    assert one.owners.tolist() == [0, 1]
    keys = {build_index(EXAMPLES, *base, stored=1, seed=seed).key for seed in range(8)}
    assert one.key in keys and 1 < len(keys) <= 6


def test_a_sentence_encoder_by_name(base: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    class SentenceTransformer:
        def __init__(self, name: str) -> None:
            if name != "letters":
                raise OSError("no such model")

        def encode(self, texts: list[str], convert_to_numpy: bool) -> np.ndarray:
            return np.array([[t.count("a"), t.count("t"), 1] for t in texts], dtype=float)

    module = ModuleType("sentence_transformers")
    monkeypatch.setitem(sys.modules, "sentence_transformers", module)
    module.SentenceTransformer = SentenceTransformer  # type: ignore[attr-defined]
    index = build_index(EXAMPLES, *base, encoder="letters")
    assert index.embeddings.shape == (5, 3)
    assert index.choose(QUERIES, *base) == ["fruit", "travel"]
    with pytest.raises(ConfigError, match="no sentence-transformers model.*nothing"):
        build_index(EXAMPLES, *base, encoder="nothing")
    retrieval._sentence_transformer.cache_clear()
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ConfigError, match=r"phatgoose\[eval\]"):
        build_index(EXAMPLES, *base, encoder="letters")


def test_an_expert_without_examples_is_named(base: tuple[Any, Any]) -> None:
    with pytest.raises(ConfigError, match="empty"):
        build_index({**EXAMPLES, "empty": []}, *base)
    with pytest.raises(ConfigError, match="no expert"):
        build_index({}, *base)
