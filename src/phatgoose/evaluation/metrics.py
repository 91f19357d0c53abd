"""Metrics of one answer against its target, each between 0 and 1."""

import functools
import re
import string
from collections import Counter
from collections.abc import Callable
from typing import Any

from phatgoose.errors import ConfigError

Metric = Callable[[str, str], float]  # of a prediction and its target


def accuracy(prediction: str, target: str) -> float:
    """Give 1 if the chosen answer is the target, else 0."""
    return float(prediction == target)


def exact_match(prediction: str, target: str) -> float:
    """Give 1 if both are equal after stripping, else 0."""
    return float(prediction.strip() == target.strip())


def squad_f1(prediction: str, target: str) -> float:
    """Give the F1 of the words in common. Like SQuAD, it ignores case, punctuation and articles."""
    found, wanted = _squad_words(prediction), _squad_words(target)
    if not found or not wanted:
        return float(found == wanted)
    common = (Counter(found) & Counter(wanted)).total()
    return 2 * common / (len(found) + len(wanted))


def rouge_l(prediction: str, target: str) -> float:
    """Give the ROUGE-L F-measure, without stemming.

    Raises ConfigError where the rouge-score package is missing.
    """
    return float(_rouge().score(target, prediction)["rougeL"].fmeasure)


METRICS: dict[str, Metric] = {
    "accuracy": accuracy,
    "exact_match": exact_match,
    "squad_f1": squad_f1,
    "rouge_l": rouge_l,
}


def metric_by_name(name: str) -> Metric:
    """Find a metric. Raises ConfigError for an unknown name."""
    if name not in METRICS:
        known = ", ".join(sorted(METRICS))
        raise ConfigError(f"metric: none is called {name!r}. Choose from: {known}.")
    return METRICS[name]


def _squad_words(text: str) -> list[str]:
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


@functools.cache
def _rouge() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise ConfigError(
            "rouge_l: needs the rouge-score package: pip install 'phatgoose[eval]'"
        ) from None
    return RougeScorer(["rougeL"])
