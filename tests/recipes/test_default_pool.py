"""What of the default pool's recipe needs no GPU: its data, its jobs, and the choice."""

import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
INDEX = [{"name": "ink", "source": "github:o/ink", "commit": "abc", "licence": "CC0 1.0"}]


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))


def results(folder, scores):
    folder.mkdir(parents=True)
    cells = {"ink": {method: {"score": score} for method, score in scores.items()}}
    (folder / "results.json").write_text(json.dumps({"results": cells}))


def made(tmp_path, sizes, scores):
    """An OUT folder with trained and validated variants, of so many bytes and scores."""
    for variant, size in sizes.items():
        folder = tmp_path / variant / "experts" / "ink"
        folder.mkdir(parents=True)
        (folder / "adapter_model.safetensors").write_bytes(b"x" * size)
        (folder / "phatgoose_arrow.safetensors").write_bytes(b"x" * 10_000)
        (folder / "README.md").write_text("# ink\n")
        of_base = {"base": 20.0} if variant == "rank16" else {}
        results(tmp_path / variant / "validation", {**of_base, "own": scores[variant]})
    (tmp_path / "data" / "train").mkdir(parents=True)
    (tmp_path / "data" / "train" / "INDEX.json").write_text(json.dumps(INDEX))
    return Namespace(out=tmp_path, variants=list(sizes), largest=80e-6)


def test_the_smallest_that_keeps_the_gain_is_chosen(tmp_path):
    from default_pool import choose

    sizes = {"rank16": 90, "rank2": 20, "rank8-attention": 30, "strangers": 5}
    scores = {"rank16": 80.0, "rank2": 76.0, "rank8-attention": 77.5, "strangers": 99.0}
    assert choose(made(tmp_path, sizes, scores)) == "rank8-attention"
    choice = json.loads((tmp_path / "choice.json").read_text())
    assert choice["variants"]["rank2"]["kept"] == pytest.approx(56 / 60)
    assert choice["variants"]["rank8-attention"]["bytes"] == 30 + len("# ink\n")
    shipped = tmp_path / "chosen" / "ink"
    assert sorted(p.name for p in shipped.iterdir()) == ["README.md", "adapter_model.safetensors"]
    assert "| licence of the data | CC0 1.0 |" in (shipped / "README.md").read_text()


def test_the_best_that_fits_is_chosen_where_none_keeps_enough(tmp_path):
    from default_pool import choose

    sizes = {"rank16": 90, "rank2": 20, "rank8-attention": 30}
    scores = {"rank16": 80.0, "rank2": 60.0, "rank8-attention": 70.0}
    assert choose(made(tmp_path, sizes, scores)) == "rank8-attention"


def test_where_none_fits_it_says_so(tmp_path):
    from default_pool import choose

    with pytest.raises(SystemExit, match="no variant fits"):
        choose(made(tmp_path, {"rank16": 90}, {"rank16": 80.0}))


def test_data_is_a_seeded_part_of_what_is_there(tmp_path):
    from default_pool import prepare

    for split in ("train", "validation", "test"):
        path = tmp_path / "all" / "tasks" / "ink" / f"{split}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f'{{"n": {n}}}\n' for n in range(9)))
    for name in ("bbh_snarks", "blimp"):
        path = tmp_path / "all" / "heldout" / name / "test.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text("{}\n")
    (tmp_path / "all" / "INDEX.json").write_text(json.dumps(INDEX))
    args = Namespace(data=tmp_path / "all", out=tmp_path / "out", tasks=["ink"], examples=4)
    prepare(args)
    train = tmp_path / "out" / "data" / "train" / "tasks" / "ink" / "train.jsonl"
    lines = train.read_text().splitlines()
    assert len(lines) == 4
    assert lines == sorted(lines)
    validation = tmp_path / "out" / "data" / "validation" / "tasks" / "ink" / "test.jsonl"
    assert len(validation.read_text().splitlines()) == 9
    assert [p.name for p in (tmp_path / "out/data/heldout/heldout").iterdir()] == ["blimp"]
    before = train.stat().st_mtime_ns
    prepare(args)
    assert train.stat().st_mtime_ns == before


def test_jobs_are_done_once_and_failures_are_told(tmp_path, capsys):
    from default_pool import Job, run

    args, say = Namespace(out=tmp_path, jobs=2), [sys.executable, "-c"]
    good = Job("good", [*say, "print('x')"], tmp_path / "good.txt")
    bad = Job("bad", [*say, "raise SystemExit('no such thing')"], tmp_path / "bad.txt")
    slow = Job("slow", [*say, "import time; time.sleep(60)"], tmp_path / "slow.txt")
    with pytest.raises(SystemExit, match="no such thing"):
        run(args, [good, bad], None)
    assert good.done() and not bad.done()
    good.makes.write_text("kept")
    run(args, [good], None)
    assert good.makes.read_text() == "kept"
    import time

    with pytest.raises(SystemExit, match="the same command goes on"):
        run(args, [slow], time.monotonic() + 2)
    assert not slow.done()
