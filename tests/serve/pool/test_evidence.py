"""Priors of batches in which requests take turns, against their definition."""

import pytest
import torch

from phatgoose.errors import ConfigError, RoutingError
from phatgoose.experts import Expert
from phatgoose.routers import Router
from phatgoose.serve.pool.evidence import Evidence
from phatgoose.serve.pool.settings import gated, served_router
from phatgoose.types import TokenContext

V, C, STRENGTH = 50, 3, 4.0


@pytest.fixture
def worth():
    return torch.randn(V, C, generator=torch.Generator().manual_seed(0))


def make(worth, *, ahead=False):
    made = Evidence(
        V, C, torch.device("cpu"), strength=STRENGTH, ahead=ahead, place=lambda table: table
    )
    for slot in range(C):
        made.put(slot, worth[:, slot])
    return made


def expected(worth, ids, prompt=0):
    """By definition, in fp64: the mean over what was read; over the prompt where that is known."""
    means = [worth[ids[: at + 1]].double().mean(0) for at in range(len(ids))]
    if prompt:
        means[:prompt] = [worth[ids[:prompt]].double().mean(0)] * prompt
    return STRENGTH * torch.stack(means)


def sequences(*lengths):
    random = torch.Generator().manual_seed(1)
    return {
        f"r{number}": torch.randint(V, (length,), generator=random).tolist()
        for number, length in enumerate(lengths)
    }


@pytest.mark.parametrize("ahead", [False, True])
def test_requests_that_take_turns_in_pieces(worth, ahead):
    texts = sequences(5, 40, 1, 90)
    prompts = {name: (len(ids) + 1) // 2 for name, ids in texts.items()}
    evidence = make(worth, ahead=ahead)
    for name, ids in texts.items():
        evidence.start(name, ids[: prompts[name]])
    found = {name: [] for name in texts}
    at = dict.fromkeys(texts, 0)
    random = torch.Generator().manual_seed(2)
    while any(at[name] < len(ids) for name, ids in texts.items()):
        names = [name for name in texts if at[name] < len(texts[name])]
        names = [names[i] for i in torch.randperm(len(names), generator=random)][:3]
        most = [
            (prompts[name] if at[name] < prompts[name] else at[name] + 1) - at[name]
            for name in names
        ]
        counts = [int(torch.randint(1, left + 1, (), generator=random)) for left in most]
        pieces = [texts[n][at[n] : at[n] + c] for n, c in zip(names, counts, strict=True)]
        flat = torch.tensor([token for piece in pieces for token in piece])
        priors = evidence.read(names, counts, flat, first=dict(at), known={})
        for name, count, prior in zip(names, counts, priors.split(counts), strict=True):
            found[name].append(prior)
            at[name] += count
    for name, ids in texts.items():
        wanted = expected(worth, ids, prompts[name] if ahead else 0)
        assert torch.allclose(torch.cat(found[name]).double(), wanted, rtol=0, atol=1e-6)


def test_what_the_cache_spared_and_what_was_interrupted(worth):
    (ids,) = sequences(30).values()
    evidence = make(worth)
    evidence.start("x", ids[:20])
    wanted = expected(worth, ids).float()
    got = evidence.read(["x"], [4], torch.tensor(ids[16:20]), first={"x": 16}, known={})
    assert torch.allclose(got, wanted[16:20], atol=1e-6)
    got = evidence.read(["x"], [1], torch.tensor(ids[20:21]), first={"x": 20}, known={})
    assert torch.allclose(got, wanted[20:21], atol=1e-6)
    # Preempted, and read again from the start in two pieces; or from within the answer.
    for first, count in ((0, 12), (12, 9), (21, 1), (25, 2)):
        part = torch.tensor(ids[first : first + count])
        got = evidence.read(["x"], [count], part, first={"x": first}, known={"x": ids[:25]})
        assert torch.allclose(got, wanted[first : first + count], atol=1e-6)
    with pytest.raises(RoutingError, match="x from tokens that evidence cannot see"):
        evidence.read(["x"], [1], torch.tensor([1]), first={"x": 29}, known={})


def test_rows_are_used_again_and_grow(worth):
    evidence = make(worth)
    ids = torch.tensor([7])
    for turn in range(3):
        names = [f"{turn}-{number}" for number in range(100)]
        for name in names:
            evidence.start(name, [7])
        got = evidence.read(
            names, [1] * 100, ids.expand(100), first=dict.fromkeys(names, 0), known={}
        )
        assert torch.equal(got, (STRENGTH * worth[7]).expand(100, C))
        for name in names:
            evidence.finish(name)
    assert len(evidence._sums) == 128


def test_a_newcomer_starts_from_nothing_and_a_slot_is_emptied(worth):
    evidence = make(worth)
    evidence.start("x", [1, 2])
    evidence.read(["x"], [2], torch.tensor([1, 2]), first={"x": 0}, known={})
    newcomer = torch.arange(V).float()
    evidence.put(1, newcomer)
    evidence.put(2, None)
    got = evidence.read(["x"], [1], torch.tensor([5]), first={"x": 2}, known={})
    total = worth[[1, 2, 5], 0].sum()
    assert torch.allclose(got[0], STRENGTH * torch.stack([total, newcomer[5], total * 0]) / 3)


def test_embeddings_are_refused(worth):
    with pytest.raises(RoutingError, match="token ids"):
        make(worth).start("x", None)


class Weighs(Router):
    """A router from outside: all that it takes for its prior to reach the engine."""

    strength = 3.0
    scores = False

    def signature(self, expert, module):
        return torch.zeros(1)

    def score(self, x, signatures):
        return x.new_zeros(len(x), len(signatures), dtype=torch.float32)

    def worth(self, experts):
        seeds = [int(expert.name) for expert in experts]
        tables = [torch.randn(V, generator=torch.Generator().manual_seed(s)) for s in seeds]
        return torch.stack(tables, dim=1)


@pytest.fixture
def known(monkeypatch):
    """known(name=value, ...): the class above, with these, by the name "weighs"."""
    monkeypatch.setattr(Router, "_known", dict(Router._known))
    return lambda **own: type("Own", (Weighs,), {"name": "weighs", **own})


@pytest.mark.parametrize("name", ["weighs", "weighs+evidence"])
@pytest.mark.parametrize("ahead", [False, True])
def test_a_router_of_ones_own_reaches_the_engine(known, ahead, name):
    """By `worth` alone: no file of the engine knows its class."""
    known(ahead=ahead)
    if name != "weighs":  # two priors, of which the engine could keep only one
        with pytest.raises(ConfigError, match="wants to run the base first"):
            served_router(name)
        return
    router = served_router(name)
    assert router.has_prior and router.weighs_ids and gated(router)
    experts = [Expert(str(number), {}) for number in range(C)]
    evidence = Evidence(
        V,
        C,
        torch.device("cpu"),
        strength=router.strength,
        ahead=router.ahead,
        place=lambda table: table,
    )
    for slot, column in enumerate(router.worth(experts).unbind(1)):
        evidence.put(slot, column)
    (ids,) = sequences(20).values()
    evidence.start("x", ids)
    got = evidence.read(["x"], [20], torch.tensor(ids), first={"x": 0}, known={})
    real = torch.ones(1, 20, dtype=torch.bool)
    context = TokenContext(length=20, ids=torch.tensor([ids]), real=real)
    assert torch.allclose(got, router.prior(context, experts), atol=1e-6)


def test_what_an_engine_cannot_keep_is_refused(known):
    known(prior=lambda self, context, experts: None)
    with pytest.raises(ConfigError, match="wants to run the base first"):
        served_router("weighs")
    known(prepare=lambda self, model, experts: None)
    with pytest.raises(ConfigError, match="wants to run the base first"):
        served_router("weighs")
    known(prepare=lambda self, model, experts: None, prepares_on="first layer")
    assert served_router("weighs").prepares_on == "first layer"
