"""Metrics at values worked out by hand."""

import sys

import pytest

from phatgoose.errors import ConfigError
from phatgoose.evaluation.metrics import (
    METRICS,
    _rouge,
    accuracy,
    exact_match,
    metric_by_name,
    rouge_l,
    squad_f1,
)


def test_exact_match_ignores_outer_spaces_only() -> None:
    assert exact_match(" 12\n", "12") == 1
    assert exact_match("Twelve", "twelve") == 0
    assert exact_match("", "") == 1
    assert accuracy("a", "a") == 1
    assert accuracy("a", "b") == 0


@pytest.mark.parametrize(
    ("prediction", "target", "score"),
    [
        ("The Eiffel Tower.", "eiffel tower", 1.0),  # case, articles and punctuation
        ("in the tower", "a tower of London", 0.4),  # 1 word shared by 2 and 3
        ("red red blue", "red", 0.5),  # the second red counts against it
        ("cat", "dog", 0.0),
        ("", "dog", 0.0),
        ("the", "an", 1.0),  # nothing is left of either
    ],
)
def test_squad_f1(prediction: str, target: str, score: float) -> None:
    assert squad_f1(prediction, target) == pytest.approx(score)


def test_rouge_l() -> None:
    pytest.importorskip("rouge_score")
    # The longest common subsequence is "the cat on mat": 4 of 5 words, 4 of 6 words.
    score = rouge_l("the cat lay on mat", "the cat sat on the mat")
    assert score == pytest.approx(2 * (4 / 5) * (4 / 6) / (4 / 5 + 4 / 6))
    assert rouge_l("", "a word") == 0
    assert rouge_l("running", "run") == 0  # no stemming


def test_rouge_names_the_extra_if_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    _rouge.cache_clear()
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(ConfigError, match=r"phatgoose\[eval\]"):
        rouge_l("a", "b")


def test_metrics_by_name() -> None:
    assert set(METRICS) == {"accuracy", "exact_match", "squad_f1", "rouge_l"}
    with pytest.raises(ConfigError, match="squad_f1"):
        metric_by_name("bleu")
