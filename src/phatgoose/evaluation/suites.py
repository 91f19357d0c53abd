"""Reads published held-out suites from the Hub by name, with the `datasets` package.

The sets are those of arXiv:2402.05859, section 4, as its code lists them: `t0ho`, T0's 11 held-out
sets, each with all of its original prompt templates, from bigscience/P3; `bbh`, 22 sets of
BIG-bench Hard, and `bbl`, 17 of BIG-bench Lite, from tasksource/bigbench and lukaemon/bbh, each
prompt followed by a line "Answer:".

Our examples have one right answer. Where a set has several, the first is the target, and other
right choices are left out of the choices.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from phatgoose.errors import ConfigError, TaskFormatError, first_line
from phatgoose.tasks import Example, parse_row

P3, BIG_BENCH, BBH = "bigscience/P3", "tasksource/bigbench", "lukaemon/bbh"
Named = tuple[str, list[Example], str]  # name, examples, metric


@dataclass(frozen=True)
class _Set:
    """One data set of a suite."""

    dataset: str
    config: str  # for P3 a pattern of whole config names, one per template
    metric: str = "accuracy"
    choices: tuple[str, ...] | None = None  # where the data names none


def _p3(config: str) -> _Set:
    return _Set(P3, f"{config}_score_eval")


def _big(config: str, metric: str = "accuracy") -> _Set:
    return _Set(BIG_BENCH, config, metric)


SUITES: Mapping[str, Mapping[str, _Set]] = {
    "t0ho": {
        "rte": _p3("super_glue_rte_.*"),
        "cb": _p3("super_glue_cb_.*"),
        "anli_r1": _p3("anli_.*_r1"),
        "anli_r2": _p3("anli_.*_r2"),
        "anli_r3": _p3("anli_.*_r3"),
        "hellaswag": _p3("hellaswag_.*"),
        "copa": _p3("super_glue_copa_.*"),
        "story_cloze": _p3("story_cloze_2016_.*"),
        "wic": _p3("super_glue_wic_.*"),
        "winogrande": _p3("winogrande_winogrande_xl_.*"),
        "wsc": _p3(r"super_glue_wsc\.fixed_.*"),
    },
    "bbh": {
        "boolean_expressions": _Set(BBH, "boolean_expressions", choices=("True", "False")),
        "causal_judgment": _big("causal_judgment"),
        "date_understanding": _big("date_understanding"),
        "disambiguation_qa": _big("disambiguation_qa"),
        "formal_fallacies": _big("formal_fallacies_syllogisms_negation"),
        "geometric_shapes": _big("geometric_shapes"),
        "hyperbaton": _big("hyperbaton"),
        "logical_deduction": _big("logical_deduction"),
        "movie_recommendation": _big("movie_recommendation"),
        "multistep_arithmetic_two": _Set(BBH, "multistep_arithmetic_two", "exact_match"),
        "navigate": _big("navigate"),
        "object_counting": _big("object_counting", "exact_match"),
        "penguins_in_a_table": _big("penguins_in_a_table"),
        "reasoning_about_colored_objects": _big("reasoning_about_colored_objects"),
        "ruin_names": _big("ruin_names"),
        "salient_translation_error_detection": _big("salient_translation_error_detection"),
        "snarks": _big("snarks"),
        "sports_understanding": _big("sports_understanding"),
        "temporal_sequences": _big("temporal_sequences"),
        "tracking_shuffled_objects": _big("tracking_shuffled_objects"),
        "web_of_lies": _Set(BBH, "web_of_lies", choices=("Yes", "No")),
        "word_sorting": _big("word_sorting", "exact_match"),
    },
    "bbl": {
        "bbq_lite_json": _big("bbq_lite_json"),
        "conceptual_combinations": _big("conceptual_combinations"),
        "conlang_translation": _big("conlang_translation", "rouge_l"),
        "formal_fallacies": _big("formal_fallacies_syllogisms_negation"),
        "hindu_knowledge": _big("hindu_knowledge"),
        "known_unknowns": _big("known_unknowns"),
        "linguistics_puzzles": _big("linguistics_puzzles", "exact_match"),
        "logic_grid_puzzle": _big("logic_grid_puzzle"),
        "logical_deduction": _big("logical_deduction"),
        "novel_concepts": _big("novel_concepts"),
        "operators": _big("operators", "exact_match"),
        "play_dialog_same_or_different": _big("play_dialog_same_or_different"),
        "repeat_copy_logic": _big("repeat_copy_logic", "exact_match"),
        "strange_stories": _big("strange_stories"),
        "strategyqa": _big("strategyqa"),
        "vitaminc_fact_verification": _big("vitaminc_fact_verification"),
        "winowhy": _big("winowhy"),
    },
}
SPLITS = {P3: "validation", BIG_BENCH: "train+validation", BBH: "test"}


def load_suite(name: str) -> Iterator[Named]:
    """Load the tasks of a suite: their names, SUITE_SET, their examples and their metric.

    A set that P3 does not hold comes without examples. Raises TaskFormatError where the Hub does
    not answer or a row is not as expected, ConfigError for an unknown suite or without the datasets
    package.
    """
    if name not in SUITES:
        raise ConfigError(f"tasks: no suite is called {name!r}. Choose from: {', '.join(SUITES)}.")
    templates: list[str] = []
    if any(which.dataset == P3 for which in SUITES[name].values()):
        templates = _ask_hub(P3, lambda datasets: datasets.get_dataset_config_names(P3))
    for key, which in SUITES[name].items():
        configs = [which.config]
        if which.dataset == P3:
            configs = [config for config in templates if re.fullmatch(which.config, config)]
        examples = [e for config in configs for e in _read(which, config)]
        yield f"{name}_{key}", examples, which.metric


def _read(which: _Set, config: str) -> list[Example]:
    split = SPLITS[which.dataset]
    rows = _ask_hub(
        f"{which.dataset}, {config}",
        lambda datasets: datasets.load_dataset(which.dataset, config, split=split),
    )
    where = f"{which.dataset}, {config}, {split}"
    try:
        if which.dataset == P3:
            return _from_scored(list(rows), where)
        read = _from_big_bench if which.dataset == BIG_BENCH else _from_bbh
        return [read(row, which, f"{where}, row {n}") for n, row in enumerate(rows)]
    except (KeyError, IndexError, TypeError) as error:
        raise TaskFormatError(
            f"{where}: a row is not as expected ({type(error).__name__} {error})."
        ) from None


def _ask_hub(what: str, ask: Callable[[Any], Any]) -> Any:
    try:
        import datasets
    except ImportError:
        raise ConfigError(
            f"{what}: needs the datasets package: pip install 'phatgoose[eval]'"
        ) from None
    try:
        return ask(datasets)
    except Exception as error:  # datasets raises many kinds
        raise TaskFormatError(
            f"{what}: the Hub gave no data set ({first_line(error)}). Published suites need a "
            "network, or a filled cache; folders of task files need neither."
        ) from None


def _from_scored(rows: Sequence[Mapping[str, Any]], where: str) -> list[Example]:
    """Read P3's "score_eval" form: a row per choice. Those of one example share the first index."""
    groups: dict[int, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["idx"][0], []).append(row)
    examples = []
    for number, group in groups.items():
        prompt = group[0]["inputs_pretokenized"].strip()
        choices = [row["targets_pretokenized"].strip() for row in group]
        right = [c for c, row in zip(choices, group, strict=True) if row["is_correct"]]
        examples.append(_example(prompt, right, choices, f"{where}, example {number}"))
    return examples


def _from_big_bench(row: Mapping[str, Any], which: _Set, where: str) -> Example:
    choices, right = row["multiple_choice_targets"], list(row["targets"])
    if which.metric == "accuracy":
        scores = row["multiple_choice_scores"]
        right = [c for c, score in zip(choices, scores, strict=True) if score == max(scores)]
    return _example(
        row["inputs"].rstrip() + "\nAnswer:",
        right,
        list(choices) if which.metric == "accuracy" else None,
        where,
    )


def _from_bbh(row: Mapping[str, Any], which: _Set, where: str) -> Example:
    choices = list(which.choices) if which.choices else None
    return _example(row["input"].rstrip() + "\nAnswer:", [row["target"]], choices, where)


def _example(prompt: str, right: Sequence[str], choices: list[str] | None, where: str) -> Example:
    """Make an example. The first right answer is the target, and no second one is a choice."""
    if not right:
        raise TaskFormatError(f"{where}: no answer is marked as right.")
    if choices is not None:
        wrong = set(choices) - set(right)
        choices = [c for c in dict.fromkeys(choices) if c == right[0] or c in wrong]
    row = {"inputs": prompt, "targets": right[0], "choices": choices}
    return parse_row(row, where)[0]
