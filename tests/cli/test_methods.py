"""One way to name what answers: routers and all other methods, by generate as by eval."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import phatgoose
from phatgoose import ExpertPool
from phatgoose.default import tiny
from phatgoose.evaluation import generate_text, is_router, method_names
from phatgoose.experts import adapter_hash
from phatgoose.experts.kinds import KINDS
from phatgoose.models import load_base
from phatgoose.routers import evidence, mixed, router_names, zscore
from tests.cli.conftest import EXAMPLES
from tests.models import save_expert

CPU = ("--device", "cpu")
ON_TASKS = ("own", "best_individual", "oracle")
PROMPTS = ["goose to", "a hat: ", "rank 3, or layer 7?"]
NEW = 8  # tokens of an answer


@pytest.fixture
def pool(world, run):
    """The options for the tiny base and three experts, with every kind of signature."""
    model = AutoModelForCausalLM.from_pretrained(world.base)
    save_expert(world.three, model, seed=2, targets=["q_proj", "up_proj"])
    folders = [world.one, world.two, world.three]
    for place, folder in enumerate(folders):
        task = world.tasks / folder.name
        task.mkdir(parents=True)
        rows = EXAMPLES[2 * place : 2 * place + 2]
        (task / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = ("--base", world.base)
    done = run("experts", "derive", *folders, *base, "--tasks", world.tasks, *CPU)
    assert done.code == 0, done.err
    return (*base, "--experts", *folders, *CPU)


def undo_derive(folder):
    for path in folder.glob("phatgoose_*.safetensors"):
        if path.name != "phatgoose_gates.safetensors":
            path.unlink()


def test_generate_answers_as_eval_does(run, world, pool, monkeypatch):
    monkeypatch.setattr("phatgoose.evaluation.run.draw", lambda *_: None)
    monkeypatch.setattr("phatgoose.evaluation.eval_tasks.BOUND_STEP", NEW)
    asked = world.root / "heldout" / "asked"
    asked.mkdir(parents=True)
    rows = [{"inputs": prompt, "targets": "x"} for prompt in PROMPTS]
    (asked / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = [name for name in method_names() if name not in ON_TASKS]
    names += ["single:two", "arrow+evidence+adapter_evidence"]
    few, mixture = world.tasks / "one" / "train.jsonl", ("--weights", "one=0.5,three=1.25")
    more = ("--train-tasks", world.tasks, "--multitask", world.three, "--examples", few)
    out = ("--out", world.out)
    scored = run(
        "eval", *pool, *more, *mixture, "--tasks", asked, *out, "--methods", ",".join(names)
    )
    assert scored.code == 0, scored.err
    results = json.loads((world.out / "results.json").read_text())
    assert results["failed"] == results["left_out"] == {}
    assert results["tasks"]["asked"]["n"] == len(PROMPTS)
    found = {}
    for name in names:
        folder = world.out / "answers" / name.replace("single:", "single-")
        lines = "".join(path.read_text() for path in folder.glob("*.jsonl")).splitlines()
        by_line = {row["line"]: row["prediction"] for row in map(json.loads, lines)}
        how = mixture if name == "weights" else ("--router", name)
        done = run("generate", *PROMPTS, *pool, *more, *how, "--json", "--max-new-tokens", NEW)
        assert done.code == 0, done.err
        found[name] = [row["answer"] for row in json.loads(done.out)]
        assert found[name] == [by_line[line] for line in range(len(PROMPTS))], name
    assert len({tuple(answers) for answers in found.values()}) > len(names) / 2


@pytest.fixture(scope="module")
def packaged():
    """The package's base, loaded once."""
    return load_base(tiny.BASE, device="cpu")


@pytest.mark.parametrize("name", [*filter(is_router, router_names()), "phatgoose+evidence"])
def test_every_router_on_experts_of_the_package(run, packaged, monkeypatch, name):
    folders = [tiny.EXPERTS / name for name in ("snips", "subjectivity", "proc_pluralise")]
    text = torch.randint(2, 8000, (4, 32), generator=torch.Generator().manual_seed(0))
    for module in (evidence, mixed, zscore):  # the base would write it, for seconds
        monkeypatch.setattr(module, "written_by", lambda model: text)
    monkeypatch.setattr("phatgoose.cli.inference.load", lambda *_, **__: packaged)
    prompt = "Command: play some jazz. What should the assistant do?"
    options = ("--base", "tiny", "--experts", *folders, *CPU, "--router", name)
    done = run("generate", prompt, *options, "--max-new-tokens", 2)
    assert (done.code, done.lines) == (0, []), done.err
    assert done.out.endswith("\n") and len(done.out.splitlines()) == 1


def test_what_a_prompt_cannot_be_answered_by(refuses, pool):
    given = ("generate", "x", *pool, "--max-new-tokens", 2, "--router")
    for name in ON_TASKS:
        refuses(*given, name, says=[name, "phatgoose eval", "single:NAME"])
    refuses(*given, "retrieval", says=["retrieval", "--train-tasks"])
    refuses(*given, "multitask", says=["multitask", "--multitask FOLDER"])
    refuses(*given, "lorahub", says=["lorahub", "--examples FILE"])
    refuses(*given, "weights", says=["weights", "--weights a=0.7,b=0.3"])
    says = ["--weights: fix the mixture", "--router arrow"]
    refuses(*given, "arrow", "--weights", "one=1", says=says)
    for weights, words in (
        ("one=-1", "the weight of one must be at least 0"),
        ("one=nan", "must be at least 0 and finite"),
        ("one=1e99", "must be at least 0 and finite"),
        ("one=1,four=1", "four: no expert of this name"),
    ):
        refuses(*given[:-1], "--weights", weights, says=[words])
    refuses(*given, "single:four", says=["four", "one, two, three"])
    refuses(*given, "all", says=["'all'", "single:NAME"])
    refuses(*given, "zscore", says=["zscore modifies another router"])
    refuses(*given, "arrow+compass", says=["compass", "zscore"])
    says = ["merged", "does not route tokens", "--top-k, --scale", "choose a router"]
    refuses(*given, "merged", "--top-k", 1, "--scale", "unit", says=says)


@pytest.mark.parametrize("name", ["base", "single:one", "retrieval"])
@pytest.mark.parametrize("command", [["trace", "x"], ["demo"], ["analyze", "--tasks", "tasks"]])
def test_only_routing_is_shown(refuses, world, pool, monkeypatch, command, name):
    rows = json.dumps({"inputs": "a", "targets": "b"})
    (world.tasks / "one" / "test.jsonl").write_text(rows)
    monkeypatch.chdir(world.root)
    says = [name, "does not route tokens", "phatgoose_mixed"]
    refuses(*command, *pool, "--router", name, says=says)


def test_settings_are_the_router_s_own_unless_given(run, world, pool, monkeypatch):
    rows = json.dumps({"inputs": "a goose", "targets": "geese"})
    (world.tasks / "one" / "test.jsonl").write_text(rows)
    noted = []

    def save(*_, settings, **__):
        noted.append([settings[name] for name in ("top_k", "temperature", "scale", "null_score")])
        return [world.out] * 3

    monkeypatch.setattr("phatgoose.analysis.save_analyses", save)

    def settings(*more):
        done = run("analyze", *pool, "--tasks", world.tasks / "one", *more)
        assert done.code == 0, done.err
        return noted[-1]

    assert settings() == [2, 1, "softmax", None]
    assert settings("--router", "arrow") == [3, 1, "softmax", None]
    assert settings("--router", "seqr+zscore") == [1, 1, "unit", None]
    assert settings("--router", "seqr", "--top-k", "all") == ["all", 1, "unit", None]
    given = ("--router", "arrow", "--top-k", 2, "--scale", "unit", "--null-score", 0)
    assert settings(*given, "--temperature", 0.5) == [2, 0.5, "unit", 0]


class TestMixed:
    @pytest.fixture
    def mixed(self, world, pool):
        """Two experts without gates, one of them without signatures too."""
        world.ungated("two")
        world.ungated("three")
        undo_derive(world.two)
        return pool

    def test_generate_and_trace_say_what_was_derived(self, run, world, mixed):
        given = (*mixed, "--max-new-tokens", 2, "--router")
        for router in ("phatgoose_mixed", "phatgoose_mixed+adapter_evidence"):
            for command in ("generate", "trace"):
                out = ("--out", world.out) if command == "trace" else ()
                done = run(command, "goose", *given, router, *out)
                assert done.code == 0, done.err
                (line,) = done.lines
                assert line.startswith(f"phatgoose: {router}: without gates")
                assert line.endswith("two (arrow), three (average_activation)")
        assert run("generate", "goose", *given, "arrow").lines == []

    def test_eval_names_them(self, run, world, mixed, monkeypatch):
        monkeypatch.setattr("phatgoose.evaluation.run.draw", lambda *_: None)
        (world.tasks / "one" / "test.jsonl").write_text('{"inputs": "a", "targets": "b"}')
        argv = ("--tasks", world.tasks / "one", "--out", world.out)
        methods = ("--methods", "base,phatgoose_mixed,phatgoose_mixed+adapter_evidence,arrow")
        done = run("eval", *mixed, *argv, *methods)
        assert done.code == 0, done.err
        found = json.loads((world.out / "results.json").read_text())["methods"]
        wanted = {"two": "arrow", "three": "average_activation"}
        named = {name: method.get("derived") for name, method in found.items()}
        assert named == {
            "base": None,
            "phatgoose_mixed": wanted,
            "phatgoose_mixed+adapter_evidence": wanted,
            "arrow": None,
        }
        assert "- two: arrow\n- three: average_activation\n" in done.out

    def test_phatgoose_tells_the_ways_without_training(self, refuses, world, mixed):
        says = ["two", "phatgoose gate", world.two, "adapter_evidence", "arrow", "phatgoose_mixed"]
        refuses("generate", "goose", *mixed, says=says)


class TestGeneral:
    @pytest.fixture
    def general(self, world, pool):
        """The options for the experts less an adapter of general knowledge."""
        model = AutoModelForCausalLM.from_pretrained(world.base)
        save_expert(world.general, model, seed=7, targets=["q_proj", "down_proj"])
        return (*pool, "--general", world.general)

    def test_the_experts_answer_without_it(self, run, world, pool, general):
        before = world.files()
        argv = ("generate", *PROMPTS, "--max-new-tokens", NEW, "--router", "arrow", "--json")
        answers = [row["answer"] for row in json.loads(run(*argv, *general).out)]
        assert answers != [row["answer"] for row in json.loads(run(*argv, *pool).out)]
        assert world.files() == before
        model, tokenizer = load_base(world.base, device="cpu")
        experts = [phatgoose.load_expert(world.root / name) for name in ("one", "two", "three")]
        less = phatgoose.subtract_general(experts, phatgoose.load_expert(world.general))
        phatgoose.route(model, ExpertPool(less), "arrow")
        prompts = [prompt + "\n" for prompt in PROMPTS]
        assert answers == generate_text(model, tokenizer, prompts, max_new_tokens=NEW)

    def test_signatures_of_the_adapter_do_not_outlive_it(self, world, general):
        expert = phatgoose.load_expert(world.one)
        assert set(expert.signatures) == set(KINDS)
        (less,) = phatgoose.subtract_general([expert], phatgoose.load_expert(world.general))
        assert set(less.signatures) == {"prompt_mean"}
        less.signatures["prompt_mean"].check(less.modules, adapter_hash(less.modules), "one")

    def test_a_router_that_needs_gates_is_refused(self, refuses, general):
        says = ["one", "has no gates", "made of other adapters", "adapter_evidence"]
        refuses("generate", "goose", *general, says=says)
        refuses("trace", "goose", *general, says=says)
        says = ["one", "no average activation", "use a router that does not"]
        refuses("generate", "goose", *general, "--router", "average_activation", says=says)
        refuses("generate", "goose", *general, "--router", "phatgoose_mixed", says=["has no gates"])

    def test_a_general_adapter_that_is_an_expert_is_refused(self, refuses, world, pool):
        argv = ("generate", "goose", *pool, "--general", world.one, "--router", "arrow")
        refuses(*argv, says=["one", "two experts of this name"])

    def test_trace_and_analyze(self, run, world, general):
        (world.tasks / "one" / "test.jsonl").write_text('{"inputs": "a", "targets": "b"}')
        out = ("--router", "arrow", "--out", world.out)
        assert run("trace", "goose", *general, *out, "--max-new-tokens", 2).code == 0
        done = run("analyze", *general, *out, "--tasks", world.tasks / "one")
        assert done.code == 0, done.err
        numbers = json.loads((world.out / "analysis.json").read_text())
        assert numbers["settings"]["general"] == [str(world.general)]
        assert any("down_proj" in module["name"] for module in numbers["tasks"]["one"]["modules"])

    def test_eval(self, run, world, general, monkeypatch):
        monkeypatch.setattr("phatgoose.evaluation.run.draw", lambda *_: None)
        asked = world.root / "heldout" / "seen"
        asked.mkdir(parents=True)
        (asked / "test.jsonl").write_text('{"inputs": "a", "targets": "b"}')
        (world.two / "README.md").write_text("Trained on `seen`.")
        argv = ("--tasks", asked, "--out", world.out, "--methods", "base,arrow,phatgoose")
        done = run("eval", *general, *argv)
        assert done.code == 0, done.err
        found = json.loads((world.out / "results.json").read_text())
        assert found["settings"]["general"] == [str(world.general)]
        assert "made of other adapters" in found["failed"]["phatgoose"]
        assert list(found["tasks"]["seen"]["contaminated"]) == ["two"]  # their cards still count
        assert f"less what the general adapters {world.general} know" in done.out
