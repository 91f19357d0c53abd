"""A pool inside vLLM answers as `phatgoose.route` does on transformers, in float32.

Every engine answers the same prompts in one batch, again with a warm prefix cache, and one by one.
"""

import json

import pytest
import torch

from phatgoose.default import tiny
from phatgoose.models import load_base
from tests.serve.models import VOCABULARY, save_base, save_pool

LOGPROB = 1e-4  # the most that log-probabilities may differ
NEAR_TIE = 3e-6  # between scores of about 1
NEAR_TIE_OF_RANKS = 1e-5
BUDGET = 64  # tokens in a forward: longer prompts go in chunks

pytestmark = pytest.mark.slow


def random_prompts(lengths=(1, 7, 33, 90, 150)):
    random = torch.Generator().manual_seed(5)
    return [
        torch.randint(1, VOCABULARY, (length,), generator=random).tolist() for length in lengths
    ]


def three_rounds(prompts):
    """All at once, all at once again, one by one."""
    return [[prompts], [prompts], [[prompt] for prompt in prompts]]


def assert_same(found, wanted):
    # Were it otherwise, rounding could decide which expert is the last to be chosen.
    assert all(answer["gap"] >= NEAR_TIE for answer in wanted)
    for answers in found:
        for answer, expected in zip(answers, wanted, strict=True):
            assert answer["tokens"] == expected["tokens"]
            pairs = zip(answer["logprobs"], expected["logprobs"], strict=True)
            assert max(abs(one - other) for one, other in pairs) <= LOGPROB


def assert_differ(one, other):
    """The experts matter: the bare base would be found out, on every prompt."""
    for a, b in zip(one, other, strict=True):
        pairs = zip(a["logprobs"], b["logprobs"], strict=True)
        assert max(abs(left - right) for left, right in pairs) > 100 * LOGPROB


def assert_cache_was_used(found):
    assert all(answer["cached"] == 0 for answer in found[0])
    assert any(answer["cached"] > 0 for answer in found[1])


@pytest.fixture(scope="module")
def demo(reference):
    """Prompts for the pool in the package, one longer than a chunk, and the right answers."""
    model, tokenizer = load_base(tiny.BASE, device="cpu")
    rows = [json.loads(line)["inputs"] for line in tiny.DEMO.read_text().splitlines()]
    prompts = [tokenizer(text).input_ids for text in [*rows, "\n".join(rows)]]
    pool = tiny.expert_folders()
    wanted = reference(model, pool, prompts, top_k=2)
    # Two ranks and a compiler round by more than one rank does: a prompt that is nearer to a tie is
    # left out, and few are.
    kept = [i for i, answer in enumerate(wanted) if answer["gap"] >= NEAR_TIE_OF_RANKS]
    assert len(kept) > 0.8 * len(prompts)
    prompts, wanted = [prompts[i] for i in kept], [wanted[i] for i in kept]
    assert max(map(len, prompts)) > 2 * BUDGET
    assert_differ(wanted, reference(model, [], prompts))
    return prompts, wanted


WAYS = {
    "eager": {"enforce_eager": True, "max_num_batched_tokens": BUDGET},
    "eager-unchunked": {"enforce_eager": True, "enable_chunked_prefill": False},
    "compiled": {"max_num_batched_tokens": BUDGET},
    "eager-tp2": {"enforce_eager": True, "tensor_parallel_size": 2},
    "compiled-tp2": {"max_num_batched_tokens": BUDGET, "tensor_parallel_size": 2},
    # Without compiling, vLLM's workers for CPUs have no room for what the first stage sends.
    "compiled-pp2": {"max_num_batched_tokens": BUDGET, "pipeline_parallel_size": 2},
}


USUAL = ("compiled-tp2",)  # and test_evidence.py is eager, test_live.py compiled on one rank


def mostly_thorough(names, usual):
    return [n if n in usual else pytest.param(n, marks=pytest.mark.thorough) for n in names]


@pytest.mark.parametrize("way", mostly_thorough(WAYS, USUAL))
def test_default_pool(way, demo, engine):
    prompts, wanted = demo
    settings = {"experts": [str(tiny.EXPERTS)], "router": "phatgoose", "top_k": 2}
    found = engine(tiny.BASE, settings, three_rounds(prompts), **WAYS[way])
    assert_same(found, wanted)
    assert_cache_was_used(found)


@pytest.mark.thorough
@pytest.mark.parametrize("family", ["qwen3", "mistral", "gemma", "phi3"])
def test_families(family, engine, reference, tmp_path):
    base = save_base(tmp_path / "base", family)
    pool = save_pool(tmp_path, base)
    prompts = random_prompts()
    settings = {"experts": [str(path) for path in pool], "top_k": 3, "temperature": 0.7}
    wanted = reference(base, pool, prompts, top_k=3, temperature=0.7)
    found = engine(tmp_path / "base", settings, three_rounds(prompts), **WAYS["eager"])
    assert_same(found, wanted)
    assert_differ(wanted, reference(base, [], prompts))


@pytest.mark.thorough
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_fewer_key_heads_than_ranks(family, engine, reference, tmp_path):
    base = save_base(tmp_path / "base", family, kv_heads=1)
    pool = save_pool(tmp_path, base)
    prompts = random_prompts()
    settings = {"experts": [str(path) for path in pool], "top_k": 2, "null_score": 0.3}
    wanted = reference(base, pool, prompts, top_k=2, null_score=0.3)
    found = engine(tmp_path / "base", settings, three_rounds(prompts), **WAYS["eager-tp2"])
    assert_same(found, wanted)


@pytest.mark.parametrize(
    ("router", "way"),
    [
        ("spectr", "eager-tp2"),
        pytest.param("spectr", "compiled-tp2", marks=pytest.mark.thorough),
        pytest.param("arrow", "compiled", marks=pytest.mark.thorough),
        pytest.param("lag", "eager", marks=pytest.mark.thorough),
        pytest.param("seqr", "eager-tp2", marks=pytest.mark.thorough),
        pytest.param("spectr_norm", "eager", marks=pytest.mark.thorough),
        pytest.param("uniform", "eager", marks=pytest.mark.thorough),
    ],
)
def test_routers_that_need_no_gates(router, way, engine, reference, tmp_path):
    """With their own settings, experts without gates, and room that none of them needs."""
    base = save_base(tmp_path / "base", "llama")
    pool = save_pool(tmp_path, base, gates=False)
    prompts = random_prompts()
    settings = {"experts": [str(path) for path in pool], "router": router}
    settings |= {"capacity": 8, "max_rank": 6}
    wanted = reference(base, pool, prompts, router=router)
    assert_same(engine(tmp_path / "base", settings, [[prompts]], **WAYS[way]), wanted)
    assert_differ(wanted, reference(base, [], prompts))


@pytest.mark.thorough
def test_a_compiled_model_is_not_taken_for_one_of_other_shapes(engine, reference, tmp_path):
    """The same folders with longer ranks in them, on a warm compile cache."""
    base = save_base(tmp_path / "base", "qwen3")
    prompts = random_prompts()
    for rank in (2, 5):
        pool = save_pool(tmp_path, base, rank=rank)
        settings = {"experts": [str(path) for path in pool]}
        wanted = reference(base, pool, prompts)
        assert_same(engine(tmp_path / "base", settings, [[prompts]]), wanted)
