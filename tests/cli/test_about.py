"""env and completion."""

import json
import subprocess
import sys

import pytest
import torch

import phatgoose
from phatgoose.default import tiny


def test_env_tells_what_a_bug_report_needs(run, monkeypatch):
    monkeypatch.setenv("PHATGOOSE_ADMIN_KEY", "secret1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    result = run("env", "--json")
    assert result.code == 0
    told = json.loads(result.out)
    assert told["versions"]["phatgoose"] == phatgoose.__version__
    assert told["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert set(told["devices"]) >= {"cpu", "chosen", "backend"}
    assert told["paths"]["base in the package"] == str(tiny.BASE)
    assert told["environment"]["OMP_NUM_THREADS"] == "1"
    assert told["environment"]["PHATGOOSE_ADMIN_KEY"] == "set, not shown"
    assert "secret1" not in result.out
    text = run("env").out
    assert f"  phatgoose: {phatgoose.__version__}\n" in text
    assert "secret1" not in text


def test_env_says_what_is_not_installed(run, monkeypatch):
    monkeypatch.setattr("phatgoose.cli.about.PACKAGES", ("torch", "no-such-package"))
    assert json.loads(run("env", "--json").out)["versions"]["no-such-package"] is None
    assert "no-such-package: not installed" in run("env").out


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion_knows_every_command(run, shell):
    pytest.importorskip("shtab")
    result = run("completion", shell)
    assert result.code == 0
    for word in ("generate", "experts", "merge", "max-new-tokens"):
        assert word in result.out


def test_bash_takes_the_completion(run):
    pytest.importorskip("shtab")
    script = run("completion", "bash").out
    ask = 'COMP_WORDS=(phatgoose gen); COMP_CWORD=1; _shtab_phatgoose; echo "${COMPREPLY[@]}"'
    done = subprocess.run(["bash", "-c", f"{script}\n{ask}"], capture_output=True, text=True)
    assert done.stdout.split() == ["generate"], done.stderr


def test_completion_without_its_package(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    result = run("completion", "bash")
    assert (result.code, result.out) == (1, "")
    assert "pip install 'phatgoose[completion]'" in result.err
