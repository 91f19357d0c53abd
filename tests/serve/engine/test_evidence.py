"""Routers with evidence over the context answer inside vLLM as on transformers, in float32."""

import json
import shutil

import pytest
import torch

from phatgoose.default import tiny
from phatgoose.models import load_base
from phatgoose.routers import AdapterEvidenceRouter
from tests.serve.test_offline import BUDGET, assert_differ, assert_same

pytestmark = pytest.mark.slow

TOKENS = 16
LATE = "proc_pluralise"
NEAR_TIE = 1e-5  # scores with evidence are up to ten times as large as without, and so is rounding


@pytest.fixture(scope="module")
def world(reference):
    """Prompts, one longer than two chunks, and a function that gives the right answers."""
    model, tokenizer = load_base(tiny.BASE, device="cpu")
    rows = [json.loads(line)["inputs"] for line in tiny.DEMO.read_text().splitlines()]
    prompts = [tokenizer(text).input_ids for text in [*rows[:5], "\n".join(rows)]]
    assert max(map(len, prompts)) > 2 * BUDGET

    def right(router, experts):
        alone = router == "prompt_evidence" or isinstance(router, AdapterEvidenceRouter)
        settings = {} if alone else {"top_k": 2}
        return reference(model, experts, prompts, tokens=TOKENS, router=router, **settings)

    return prompts, right


def assert_right(found, wanted):
    """On all prompts but those where rounding may decide which expert is the last to be chosen."""
    clear = [place for place, answer in enumerate(wanted) if answer["gap"] >= NEAR_TIE]
    assert 2 * len(clear) > len(wanted)
    assert_same([[found[place] for place in clear]], [wanted[place] for place in clear])


def run(engine, router, experts, script, *, more=None, **llm):
    settings = {"experts": [str(path) for path in experts], "router": router, "capacity": 16}
    settings |= more or {}
    found = engine(
        tiny.BASE,
        settings,
        list(script.values()),
        runs="tests.serve.run_live",
        tokens=TOKENS,
        worker_cls="phatgoose.serve.worker.Worker",
        max_num_batched_tokens=BUDGET,
        **llm,
    )
    return dict(zip(script, found, strict=True))


def test_of_the_context_so_far(world, engine):
    """In chunks, on a warm prefix cache, alone, by requests that choose, and with a newcomer."""
    prompts, right = world
    experts = tiny.expert_folders()
    fewer = [path for path in experts if path.name != LATE]
    (late,) = set(experts) - set(fewer)
    everything = {"ask": [[prompt, None] for prompt in prompts]}
    chosen = {"ask": [[prompt, c] for prompt in prompts for c in (None, {"deny": ["snips"]})]}
    script = {
        "before": everything,
        "warm": everything,
        "alone": {"ask": [[prompts[-1], None]]},
        "chosen": chosen,
        "add": {"add": str(late)},
        "added": everything,
    }
    found = run(engine, "phatgoose+evidence", fewer, script, enforce_eager=True)
    before = right("phatgoose+evidence", fewer)
    assert_differ(before, right("phatgoose", fewer))
    assert_right(found["before"], before)
    assert_right(found["warm"], before)
    assert any(answer["cached"] for answer in found["warm"])
    assert_right([*found["before"][:-1], *found["alone"]], before)
    less = right("phatgoose+evidence", [path for path in fewer if path.name != "snips"])
    assert_right(found["chosen"][::2], before)
    assert_right(found["chosen"][1::2], less)
    assert found["add"] is None
    assert_right(found["added"], right("phatgoose+evidence", experts))


@pytest.mark.thorough
def test_of_the_whole_prompt(world, engine):
    """Compiled, in chunks: the first one is read knowing the last."""
    prompts, right = world
    experts = tiny.expert_folders()
    script = {
        "all": {"ask": [[prompt, None] for prompt in prompts]},
        "alone": {"ask": [[prompts[-1], None]]},
    }
    found = run(engine, "prompt_evidence", experts, script, enable_prefix_caching=False)
    wanted = right("prompt_evidence", experts)
    assert_differ(wanted, right("evidence", experts))
    assert_right(found["all"], wanted)
    assert_right([*found["all"][:-1], *found["alone"]], wanted)


@pytest.mark.thorough
def test_of_the_adapters(world, engine, tmp_path):
    """Experts without gates or anything else, beside a file of text; one comes later."""
    prompts, right = world
    experts = [tmp_path / path.name for path in tiny.expert_folders()]
    for path in experts:
        leave = shutil.ignore_patterns("phatgoose_*")
        shutil.copytree(tiny.EXPERTS / path.name, path, ignore=leave)
    fewer = [path for path in experts if path.name != LATE]
    text = tiny.DEMO.read_text()
    tokenizer = load_base(tiny.BASE, device="cpu")[1]
    ids = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])
    everything = {"ask": [[prompt, None] for prompt in prompts]}
    script = {"before": everything, "add": {"add": str(tmp_path / LATE)}, "added": everything}
    more = {"background": str(tiny.DEMO)}
    found = run(engine, "adapter_evidence", fewer, script, more=more)
    assert found["add"] is None
    for said, pool in (("before", fewer), ("added", experts)):
        wanted = right(AdapterEvidenceRouter(background=ids), pool)
        assert_right(found[said], wanted)
