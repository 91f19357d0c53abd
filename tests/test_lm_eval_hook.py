"""What torch calls whenever it is imported."""

import subprocess
import sys

import pytest
from lm_eval.api.registry import model_registry

from phatgoose.lm_eval_hook import MODEL, NAME, register


def test_nothing_happens_without_lm_eval() -> None:
    script = (
        "import sys, torch; "
        "print([m for m in sys.modules if m.split('.')[0] in ('lm_eval', 'phatgoose')])"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    names = set(eval(out.stdout))
    light = {"phatgoose", "phatgoose.errors", "phatgoose.lazy", "phatgoose.text"}
    assert names == {*light, "phatgoose.lm_eval_hook"}


def test_registers_by_name_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_registry, "_objs", {})
    register()
    assert dict(model_registry.items())[NAME] == MODEL
    register()  # a second time changes nothing


def test_lm_evals_own_models_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_registry, "_objs", {})
    monkeypatch.delitem(sys.modules, "lm_eval.models", raising=False)
    register()
    assert {"hf", "vllm", NAME} <= set(model_registry)


def test_another_lm_eval_breaks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_registry, "_objs", {})
    monkeypatch.setitem(sys.modules, "lm_eval.api.registry", None)  # as if it were not there
    register()
    assert NAME not in model_registry
