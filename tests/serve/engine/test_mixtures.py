"""Mixtures and knobs by request inside vLLM: what `assign` says on transformers, in float32."""

import pytest

from phatgoose import Choice
from tests.serve.models import save_base, save_pool
from tests.serve.test_offline import assert_differ, assert_same, random_prompts

pytestmark = pytest.mark.slow

COUNT, TOKENS = 4, 8
CHOICES = {
    "all": {},
    "mixture": {"weights": {"e0": 0.7, "e1": 0.5, "e3": 0.9}},  # more than top_k
    "one": {"weights": {"e2": 1}},
    "its adapter": {"allow": ["e2"]},
    "louder": {"allow": ["e2"], "scale": 1.5},
    "best": {"top_k": 1},
    "even": {"top_k": 3, "temperature": 5.0, "scale": 0.5},
    "silent": {"scale": 0},
    "base": {"base": True},
}
SAME = {"one": "its adapter", "silent": "base"}


@pytest.mark.parametrize("way", [{}, {"tensor_parallel_size": 2, "enforce_eager": True}], ids=str)
def test_requests_mix_experts(way, tmp_path, engine, reference):
    """In one batch, again with a warm prefix cache, and one by one."""
    base = save_base(tmp_path / "base", "qwen3")
    experts = save_pool(tmp_path, base, COUNT)
    prompts = random_prompts((150, 7))
    right = {
        name: reference(base, experts, prompts, tokens=TOKENS, choice=Choice(**asked))
        for name, asked in CHOICES.items()
    }
    for name in ("mixture", "louder", "best", "even", "base"):
        assert_differ(right["all"], right[name])
    for name, other in SAME.items():
        assert_same([right[name]], right[other])
    requests = [[prompt, asked] for prompt in prompts for asked in CHOICES.values()]
    rounds = [{"ask": requests}, {"ask": requests}, *({"ask": [one]} for one in requests)]
    found = engine(
        tmp_path / "base",
        {"experts": [str(path) for path in experts], "max_mixture": 3, "routing": True},
        [*rounds, {"unchecked": True, "ask": [[prompts[1], {"top_k": 4}]]}],
        runs="tests.serve.run_live",
        tokens=TOKENS,
        worker_cls="phatgoose.serve.worker.Worker",
        max_num_batched_tokens=64,
        **way,
    )
    *found, (refused,) = found
    cold, warm, alone = found[0], found[1], [one for (one,) in found[2:]]
    assert any(answer["cached"] for answer in warm)
    for answers in (cold, warm, alone):
        for place, name in enumerate(CHOICES):
            assert_same([answers[place :: len(CHOICES)]], right[name])
    assert refused["tokens"] == [0] * TOKENS  # more than there is room for: no other experts
