"""Published suites, against rows in the Hub's own forms."""

from typing import Any

import datasets
import pytest

from phatgoose.errors import TaskFormatError
from phatgoose.evaluation.suites import SUITES, load_suite

P3_CONFIGS = [
    "super_glue_rte_GPT_3_style_score_eval",
    "super_glue_rte_GPT_3_style",
    "super_glue_rte_must_be_true_score_eval",
    "anli_GPT_3_style_r1_score_eval",
    "anli_GPT_3_style_r2_score_eval",
    "anli_GPT_3_style_r3_score_eval",
    *(f"{name}_x_score_eval" for name in ("super_glue_cb", "hellaswag", "super_glue_copa")),
    *(f"{name}_x_score_eval" for name in ("super_glue_wic", "winogrande_winogrande_xl")),
    "winogrande_winogrande_debiased_x_score_eval",
    "super_glue_wsc.fixed_x_score_eval",
]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, str]]:
    """What was asked of the Hub; it answers in the form of each data set."""
    asked = []

    def load_dataset(name: str, config: str, split: str) -> list[dict[str, Any]]:
        asked.append((name, config, split))
        if name == "bigscience/P3":
            return [
                {
                    "idx": [example, choice],
                    "inputs_pretokenized": f" {config} {example}? ",
                    "targets_pretokenized": f"\n{text}",
                    "is_correct": choice == example,
                }
                for example in range(2)
                for choice, text in enumerate(("yes", "no", "maybe"))
            ]
        if name == "lukaemon/bbh":
            target = {"boolean_expressions": "True", "web_of_lies": "No"}.get(config, "7")
            return [{"input": "q", "target": target}]
        return [
            {
                "inputs": "Q: which? ",
                "targets": ["b", "c"],
                "multiple_choice_targets": ["a", "b", "c", "b"],
                "multiple_choice_scores": [0, 1, 1, 1],
            }
        ]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda name: P3_CONFIGS)
    return asked


def test_the_suites_have_the_papers_sizes() -> None:
    assert {name: len(sets) for name, sets in SUITES.items()} == {"t0ho": 11, "bbh": 22, "bbl": 17}


def test_t0_held_out_takes_all_templates(hub: list[tuple[str, str, str]]) -> None:
    tasks = {name: (examples, metric) for name, examples, metric in load_suite("t0ho")}
    examples, metric = tasks["t0ho_rte"]
    assert metric == "accuracy" and len(examples) == 4  # two templates of two examples
    assert examples[0].prompt == "super_glue_rte_GPT_3_style_score_eval 0?\n"
    assert examples[0].choices == ("yes", "no", "maybe")
    assert [example.target for example in examples] == ["yes", "no"] * 2
    assert len(tasks) == 11
    assert tasks["t0ho_story_cloze"][0] == []  # P3 does not hold it
    assert {split for _, _, split in hub} == {"validation"}
    asked = [config for _, config, _ in hub]
    assert len(asked) == len(set(asked)) == 11
    assert "winogrande_winogrande_debiased_x_score_eval" not in asked


@pytest.mark.parametrize("name", ["bbh", "bbl"])
def test_big_bench(hub: list[tuple[str, str, str]], name: str) -> None:
    tasks = {task: (examples, metric) for task, examples, metric in load_suite(name)}
    assert len(tasks) == len(SUITES[name])
    (example,), _ = tasks[f"{name}_logical_deduction"]
    assert example.prompt == "Q: which?\nAnswer:\n"
    assert (example.target, example.choices) == ("b", ("a", "b"))  # c is right too: no choice
    if name == "bbh":
        (example,), metric = tasks["bbh_boolean_expressions"]
        assert (example.target, example.choices, metric) == ("True", ("True", "False"), "accuracy")
        (example,), metric = tasks["bbh_object_counting"]
        assert (example.choices, metric) == (None, "exact_match")


def test_without_a_network_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach the Hub\nand so on")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(TaskFormatError, match=r"lukaemon/bbh.*Couldn't reach.*need a network"):
        list(load_suite("bbh"))


def test_a_row_of_another_form_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: [{"question": "x"}])
    with pytest.raises(TaskFormatError, match="boolean_expressions, test.*not as expected"):
        list(load_suite("bbh"))
