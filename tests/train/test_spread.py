"""Processes that train and do not end well; tests/cli/test_collection.py has those that do."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from phatgoose.errors import TrainingError
from phatgoose.train import train_experts_on
from phatgoose.train.collection import LOCK, WORK

ROOT = Path(__file__).parents[2]
WAITS = 60  # seconds that processes may take to start on a busy machine


def dies(device):
    os._exit(9)


def waits(device):
    """Tells who it is, and loads for ever."""
    (Path(os.environ["TOLD"]) / str(os.getpid())).touch()
    time.sleep(600)


def test_a_process_that_is_killed_is_told(tmp_path):
    with pytest.raises(TrainingError, match="ended by itself"):
        train_experts_on(["cpu", "cpu"], dies, ["a", "b"], tmp_path / "pool")
    assert not (tmp_path / "pool" / WORK / LOCK).exists()


def test_no_process_outlives_the_one_that_started_it(tmp_path):
    code = (
        "from phatgoose.train import train_experts_on; from tests.train.test_spread import waits; "
        f"train_experts_on(['cpu', 'cpu'], waits, ['a', 'b'], {str(tmp_path / 'pool')!r})"
    )
    told = tmp_path / "told"
    told.mkdir()
    paths = os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))
    parent = subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, "TOLD": str(told), "PYTHONPATH": paths}
    )
    try:
        wait(lambda: any(told.iterdir()))
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    children = [int(path.name) for path in told.iterdir()]
    wait(lambda: not any(map(lives, children)))


def wait(holds):
    end = time.monotonic() + WAITS
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.1)


def lives(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"
