"""What of the study needs no GPU: its page from the committed results, its jobs, its methods."""

import importlib
import json
import shutil
import sys
from pathlib import Path

import pytest

from phatgoose import ExpertPool
from phatgoose.default import tiny
from phatgoose.evaluation import Inputs, make_methods

ROOT = Path(__file__).parents[2]
STUDY = ROOT / "recipes" / "study"


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(STUDY))


def test_the_page_is_made_of_the_committed_results(tmp_path):
    from write import write

    shutil.copytree(ROOT / "docs" / "study", tmp_path / "study")
    write(tmp_path / "nothing", tmp_path)
    found = (tmp_path / "study.md").read_text(encoding="utf-8")
    assert found == (ROOT / "docs" / "study.md").read_text(encoding="utf-8")
    for picture in (tmp_path / "study").glob("*.png"):
        assert picture.stat().st_size > 10_000


def test_new_results_are_kept_without_the_answers(tmp_path):
    from write import collect

    results = {"answers": ["answers/base/part-000.jsonl"], "average": {"base": None}}
    folder = tmp_path / "out" / "large" / "choose"
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(results))
    found = collect(tmp_path / "out", tmp_path / "docs")
    assert found == {("large", "choose"): {"average": {"base": None}}}
    assert collect(tmp_path / "gone", tmp_path / "docs") == found


def test_no_results_at_all(tmp_path):
    from write import write

    with pytest.raises(SystemExit, match="holds no results"):
        write(tmp_path, tmp_path)


def test_jobs_run_on_their_devices(tmp_path):
    from jobs import run_all

    say = "import os; print(os.environ['CUDA_VISIBLE_DEVICES'])"
    commands = [(f"job-{number}", [sys.executable, "-c", say]) for number in range(3)]
    run_all(commands, logs=tmp_path, each=1, on=["4", "5"])
    said = sorted((tmp_path / f"job-{number}.log").read_text().strip() for number in range(3))
    assert set(said) == {"4", "5"}


def test_a_job_that_fails_says_why(tmp_path):
    from jobs import run_all

    failing = [sys.executable, "-c", "raise ValueError('no such thing')"]
    with pytest.raises(SystemExit, match=r"bad failed \(1\)[\s\S]*no such thing"):
        run_all([("bad", failing)], logs=tmp_path, each=1, on=[""])


def test_every_method_and_variant_can_be_made():
    from settings import METHODS, sub_pools, variants

    pool = ExpertPool.load(tiny.expert_folders())
    known = [name for name in METHODS if name not in ("retrieval", "multitask")]
    methods, left_out = make_methods(known, Inputs(pool))
    assert [method.name for method in methods] == known and not left_out
    names = [method.name for method in (*variants(pool), *sub_pools(pool))]
    assert len(set(names)) == len(names)
    sizes = {len(method.pool) for method in sub_pools(pool)}
    assert sizes == {5, 2}


@pytest.mark.parametrize(("processes", "rows"), [(1, 64), (2, 64), (4, 32), (8, 16)])
def test_the_larger_base_is_pretrained_by_any_number_of_processes(monkeypatch, processes, rows):
    """A step's 128 rows are shared out, as few at a time as that leaves for each."""
    monkeypatch.syspath_prepend(str(STUDY.parent))
    pretrain, build = importlib.import_module("pretrain"), importlib.import_module("build")
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    words = ["pretrain.py", "text", "out", "--tokenizer", "x", "--steps", "1", *build.LARGE_BASE]
    monkeypatch.setattr(sys, "argv", words)
    given = pretrain.arguments()
    assert (given.batch, given.micro_batch) == (128, rows)
