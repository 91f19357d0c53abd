"""Each guide's script runs as a user runs it, and prints what the guide promises."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
PROMISED = {
    "contributor.py": ["adapter trained, loss ", "routed answer: "],
    "collector.py": ["routed:             inks, eruptions", "proc_pluralise only: inks, eruptions"],
    "researcher.py": ["| proc_pluralise | exact_match | 6 |", "most tokens went to "],
}


def test_every_example_is_known():
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(PROMISED)


@pytest.mark.parametrize("name", PROMISED)
def test_an_example_runs(name, tmp_path):
    done = subprocess.run(
        [sys.executable, EXAMPLES / name],
        cwd=tmp_path,
        env={**os.environ, "TQDM_DISABLE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for promise in PROMISED[name]:
        assert promise in done.stdout
    assert not list(tmp_path.iterdir()), "an example leaves nothing behind"
