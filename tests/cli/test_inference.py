"""demo, generate, trace: on the pool of the package, and on a tiny one."""

import json
import os
import subprocess
import sys

import pytest

from phatgoose.cli.main import _warning_line
from phatgoose.default import tiny as packaged
from phatgoose.evaluation import generate_text
from phatgoose.experts.bases import BaseWarning
from phatgoose.models import load_base

PROMPTS = ["Is it a question or a statement: where is the goose?", "Reverse the words: one two"]
NAMES = [folder.name for folder in packaged.expert_folders()]
CPU = ("--device", "cpu")
PACKAGED = ("--base", "tiny", *CPU)


@pytest.fixture
def tiny(world):
    """The options for the tiny base and its two experts."""
    return ("--base", world.base, "--experts", world.one, world.two, *CPU)


def test_a_batch_answers_as_each_prompt_alone(run):
    together = run("generate", *PROMPTS, *PACKAGED, "--max-new-tokens", 12, "--json")
    assert together.code == 0
    rows = json.loads(together.out)
    assert [row["prompt"] for row in rows] == PROMPTS
    for row in rows:
        alone = run("generate", row["prompt"], *PACKAGED, "--max-new-tokens", 12)
        assert alone.code == 0
        assert alone.out == row["answer"] + "\n"


def test_generate_on_a_tiny_pool(run, tiny):
    plain = run("generate", "goose ", "a longer prompt ", *tiny, "--max-new-tokens", 8)
    rows = json.loads(
        run("generate", "goose ", "a longer prompt ", *tiny, "--max-new-tokens", 8, "--json").out
    )
    assert plain.out == "".join(row["answer"] + "\n" for row in rows)


def test_one_expert_with_the_published_settings_is_its_adapter(run, world):
    base = ("generate", "goose", "--base", world.base, "--experts", world.one, *CPU)
    asked = run(*base, "--max-new-tokens", 8)
    assert asked.code == 0
    assert asked.out == run(*base, "--max-new-tokens", 8, "--router", "single:one").out


def test_the_base_that_the_experts_name(run, world):
    """It is found, told, and gives what --base gives."""
    options = ("goose", *CPU, "--max-new-tokens", 8)
    given = run("generate", *options, "--base", world.base, "--experts", world.one)
    for name in ("one", "two"):
        config = world.root / name / "adapter_config.json"
        said = {**json.loads(config.read_text()), "base_model_name_or_path": str(world.base)}
        config.write_text(json.dumps(said))
    found = run("generate", *options, "--experts", world.one)
    assert (found.code, found.out) == (0, given.out)
    assert f"the base is {world.base}, which the experts name" in found.err


def test_experts_that_name_no_base_or_several(refuses, world):
    for name, base in (("one", None), ("two", "owner/other")):
        config = world.root / name / "adapter_config.json"
        said = {**json.loads(config.read_text()), "base_model_name_or_path": base}
        config.write_text(json.dumps(said))
        if base is None:
            refuses("generate", "goose", *CPU, "--experts", world.one, says=["Pass --base"])
    config = world.one / "adapter_config.json"
    config.write_text(json.dumps({**said, "base_model_name_or_path": "owner/base"}))
    says = ["owner/base", "owner/other", "pass --base"]
    refuses("generate", "goose", *CPU, "--experts", world.one, world.two, says=says)


def test_another_bases_name_is_one_line_and_can_be_settled(run, world):
    config = world.one / "adapter_config.json"
    said = {**json.loads(config.read_text()), "base_model_name_or_path": "mistralai/Mistral-7B"}
    config.write_text(json.dumps(said))
    world.ungated("one")
    options = ("--experts", world.one, world.two, *CPU, "--max-new-tokens", 4, "--router", "arrow")
    for name in ("two",):
        other = world.root / name / "adapter_config.json"
        other.write_text(json.dumps({**said, "base_model_name_or_path": "meta-llama/Llama-3"}))
        world.ungated(name)
    merge = ("experts", "merge", world.one, world.two, "--out")
    with pytest.warns(BaseWarning) as heard:
        assert run(*merge, world.merged).code == 0
    (warning,) = heard
    line = _warning_line(warning.message, warning.category, "file", 1)
    assert line.startswith("phatgoose: two: made on the base meta-llama/Llama-3")
    assert "mistralai/Mistral-7B" in line and line.count("\n") == 1
    assert "file:1" in _warning_line("other", UserWarning, "file", 1)
    settled = run(*merge, world.again, "--same-base")
    assert settled.code == 0 and "made on the base" not in settled.err
    assert run("generate", "goose", *options, "--base", world.base, "--same-base").code == 0


def test_checkpoints_of_two_runs(run, world):
    """As trainers leave them: each has the name of its run, or the one that it is given."""
    for name in ("one", "two"):
        (world.root / "runs" / name).mkdir(parents=True)
        (world.root / name).rename(world.root / "runs" / name / "checkpoint-500")
    one, two = (world.root / "runs" / name / "checkpoint-500" for name in ("one", "two"))
    options = ("generate", "goose", "--base", world.base, *CPU, "--max-new-tokens", 8)
    both = run(*options, "--experts", one, two)
    assert both.code == 0
    for experts in ([f"law={one}", f"code={two}"], [world.root / "runs"]):
        assert run(*options, "--experts", *experts).out == both.out
    asked = run(*options, "--experts", f"law={one}", two, "--router", "single:law")
    assert asked.out == run(*options, "--experts", one, two, "--router", "single:one").out


def test_raw_prompts_get_no_newline(run, world, tiny):
    raw = run("generate", "goose\n", *tiny, "--max-new-tokens", 8, "--raw")
    assert raw.out == run("generate", "goose", *tiny, "--max-new-tokens", 8).out


def test_a_null_score_out_of_reach_is_the_bare_base(run, world, tiny):
    model, tokenizer = load_base(world.base, device="cpu")
    (answer,) = generate_text(model, tokenizer, ["goose\n"], max_new_tokens=8)
    options = ("--max-new-tokens", 8, "--null-score", 1e6, "--top-k", 1)
    assert run("generate", "goose", *tiny, *options).out == answer + "\n"


def test_trace_on_the_pool_of_the_package(run, tmp_path):
    argv = ("trace", PROMPTS[0], *PACKAGED, "--max-new-tokens", 6, "--out", tmp_path / "out")
    text = run(*argv)
    assert text.code == 0
    answer, _ = text.out.split("\n\n", maxsplit=1)
    html, png = tmp_path / "out" / "trace.html", tmp_path / "out" / "trace.png"
    assert f"Pictures: {png}, {html}" in text.out
    assert any(name in text.out for name in NAMES)
    assert png.read_bytes().startswith(b"\x89PNG")
    page = html.read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert all(name in page for name in NAMES)
    assert run("generate", PROMPTS[0], *PACKAGED, "--max-new-tokens", 6).out == answer + "\n"


def test_trace_on_a_tiny_pool(run, world, tiny):
    argv = ("trace", "goose", *tiny, "--max-new-tokens", 4, "--out", world.pictures, "--json")
    result = run(*argv)
    assert result.code == 0
    found = json.loads(result.out)
    assert found["answer"] + "\n" == run("generate", "goose", *tiny, "--max-new-tokens", 4).out
    assert found["files"] == [str(world.pictures / f"trace.{kind}") for kind in ("png", "html")]
    assert {path.name for path in world.pictures.iterdir()} == {"trace.png", "trace.html"}


def test_a_module_run_puts_results_on_stdout_and_errors_on_stderr(world, tiny):
    def python(*argv):
        command = [sys.executable, "-m", "phatgoose.cli", *map(str, argv)]
        one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, capture_output=True, text=True, env=one_thread)

    done = python("generate", "goose", *tiny, "--max-new-tokens", 4, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)[0]["prompt"] == "goose"
    failed = python("experts", "list", world.nothing)
    assert (failed.returncode, failed.stdout) == (1, "")
    assert "Traceback" not in failed.stderr
    assert failed.stderr.startswith(f"phatgoose: {world.nothing}: not a folder")


class TestDemo:
    @pytest.fixture
    def rows(self):
        return [json.loads(line) for line in packaged.DEMO.read_text("utf-8").splitlines()]

    def test_text(self, run, monkeypatch, rows):
        monkeypatch.setattr("phatgoose.cli.inference._pictures", lambda *_: ["a.png", "a.html"])
        result = run("demo", *PACKAGED)
        assert result.code == 0
        assert "Pictures: a.png, a.html" in result.out
        for row in rows:
            for line in row["inputs"].splitlines():
                assert f"  | {line}" in result.out
        assert f"of {len(rows)}." in result.out

    def test_json_and_pictures(self, run, tmp_path, rows):
        result = run("demo", *PACKAGED, "--json", "--out", tmp_path / "out")
        assert result.code == 0
        found = json.loads(result.out)
        assert sorted(map(str, (tmp_path / "out").iterdir())) == sorted(found["files"])
        assert [name.rpartition("/")[2] for name in found["files"]] == [
            "routing.png",
            "routing.html",
        ]
        assert [answer["inputs"] for answer in found["answers"]] == [r["inputs"] for r in rows]
        for answer in found["answers"]:
            assert set(answer["experts"]) <= set(NAMES)
            assert {"base", "routed", "evidence", "targets", "task"} <= set(answer)
        base, routed, evidence = (
            sum(answer[way] == answer["targets"] for answer in found["answers"])
            for way in ("base", "routed", "evidence")
        )
        # With the oldest and the newest libraries too.
        assert (base, routed, evidence) == (0, 3, 5)
