"""The layers' operators: same numbers as those they stand for, whole and in shares."""

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from phatgoose.ops import EPS, choose_experts, routed_lora_reference
from phatgoose.ops import operators as routed_layer
from phatgoose.routers import make_router
from phatgoose.serve.engine import operators
from phatgoose.types import Routing
from tests.tolerances import TOLERANCE, assert_near

BOUND = TOLERANCE[torch.float32]
IN, OUT, SLOTS, RANK = 12, (5, 3, 4), 4, 2
GATES = "signatures", "sums", "opened", "a", "b"


def make_layer(tokens, seed=0, mean=0.5):
    random = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=random)

    signatures = torch.nn.functional.layer_norm(
        normal(len(OUT), SLOTS, IN), (IN,), eps=EPS
    ) + 0.1 * normal(len(OUT), SLOTS, 1)  # whose sums matter
    opened = torch.rand(len(OUT), SLOTS, generator=random) < 0.8
    opened[0] = False  # a part without experts
    return {
        "output": normal(tokens, sum(OUT)),
        "x": normal(tokens, IN) + mean,
        "signatures": signatures.flatten(0, 1),
        "sums": signatures.sum(-1),
        "opened": opened,
        "a": normal(len(OUT), SLOTS, RANK, IN),
        "b": [normal(SLOTS, size, RANK) for size in OUT],
    }


def add(
    layer,
    whole=None,
    *,
    prior=None,
    tally=None,
    rows=(),
    router=None,
    top_k=2,
    null_score=None,
    backend="torch",
):
    output = layer["output"].clone()
    turn = torch.zeros(1)
    torch.ops.phatgoose.fork_(turn, layer["x"], whole)
    torch.ops.phatgoose.add_routed_(
        output,
        turn,
        layer["x"],
        whole,
        *(layer[key] for key in GATES),
        prior,
        tally,
        rows,
        IN,
        router,
        backend,
        top_k,
        0.9,
        False,
        null_score,
    )
    return output


def added_by_parts(layer, top_k=2, null_score=None):
    """By the operators for single parts, of the reference backend."""
    gates = [layer[key] for key in ("signatures", "sums", "opened", "a")]
    experts, _, *down = routed_layer.gated_down(
        layer["x"], *gates, None, None, "reference", top_k, 0.9, False, null_score
    )
    outputs = [part.clone() for part in layer["output"].split(OUT, dim=1)]
    for part, output in enumerate(outputs):
        z, *plan = down
        routed_layer.routed_up_(output, layer["b"][part], z, experts, *plan, part, "reference")
    return torch.cat(outputs, dim=1)


@given(st.sampled_from([0, 1, 2, 40, 131]), st.integers(1, SLOTS + 1), st.sampled_from([None, 0.2]))
def test_all_parts_at_once(tokens, top_k, null_score):
    layer = make_layer(tokens)
    wanted = added_by_parts(layer, top_k, null_score)
    for backend in ("torch", "reference"):
        found = add(layer, top_k=top_k, null_score=null_score, backend=backend)
        assert_near(found, wanted, BOUND.output)
        assert torch.equal(found[:, : OUT[0]], layer["output"][:, : OUT[0]])


@given(st.sampled_from([0, 1, 50]), st.sampled_from([1, 2, 3, 4]), st.sampled_from([0.0, 4.0]))
def test_shares_of_the_features_add_up(tokens, ranks, mean):
    layer = make_layer(tokens, mean=mean)
    width = IN // ranks
    shares = []
    for rank in range(ranks):
        mine = slice(rank * width, (rank + 1) * width)
        names = ("x", "signatures", "a")
        shares.append({**layer, **{name: layer[name][..., mine] for name in names}})
    statistics = sum(operators.gate_statistics(share["x"], share["signatures"]) for share in shares)
    assert statistics.shape[1] * statistics.element_size() % 16 == 0  # as vLLM's all-reduce wants
    scores = operators.scores_of(statistics, layer["sums"], IN)
    x = torch.nn.functional.layer_norm(layer["x"].double(), (IN,), eps=EPS)
    exact = x @ layer["signatures"].double().T / math.sqrt(IN)
    assert_near(scores.flatten(1), exact, BOUND.output)
    if mean == 0.0:
        zero = torch.zeros_like(layer["output"])
        found = sum(add({**share, "output": zero}, statistics) for share in shares)
        assert_near(layer["output"] + found, added_by_parts(layer), BOUND.output)


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("router", ["arrow", "spectr", "lag", "uniform"])
def test_scores_of_another_router(router, ranks):
    """Whole, and in shares of the features, of which each router sees the whole input."""
    layer = make_layer(40)
    width = {"spectr": 2 * IN, "lag": 2 * IN, "uniform": 1}.get(router, IN)
    random = torch.Generator().manual_seed(1)
    signatures = torch.randn(len(OUT), SLOTS, width, generator=random)
    wanted = layer["output"].clone()
    first = 0
    for part, size in enumerate(OUT):
        scores = make_router(router).score(layer["x"], signatures[part])
        scores = scores.masked_fill(~layer["opened"][part], -torch.inf)
        chosen = choose_experts(scores, 2, temperature=0.9)
        added = routed_lora_reference(layer["x"], layer["a"][part], layer["b"][part], chosen)
        wanted[:, first : first + size] += added
        first += size
    layer["signatures"] = signatures.flatten(0, 1)
    found = layer["output"].clone()
    for rank in range(ranks):
        mine = slice(rank * IN // ranks, (rank + 1) * IN // ranks)
        share = {**layer, **{name: layer[name][..., mine] for name in ("x", "a")}}
        whole = layer["x"] if ranks > 1 else None
        found += add(share, whole, router=router) - layer["output"]
    assert_near(found, wanted, BOUND.output)


@pytest.mark.parametrize("shared", [False, True])
def test_each_token_has_its_own_candidates(shared):
    """A batch of tokens that close different slots, and each token alone with these closed."""
    layer = make_layer(40)
    closed = torch.rand(40, SLOTS, generator=torch.Generator().manual_seed(1)) < 0.5
    closed[:2] = torch.tensor([[True], [False]])  # none is left, all are
    prior = torch.zeros(50, SLOTS)  # room for more tokens than come
    prior[:40].masked_fill_(closed, -torch.inf)
    tally = torch.zeros(50, 1 + SLOTS)
    statistics = None
    if shared:
        statistics = operators.gate_statistics(layer["x"], layer["signatures"])
    found = add(layer, statistics, prior=prior, tally=tally)
    for token in range(40):
        alone = {**layer, "opened": layer["opened"] & ~closed[token]}
        alone |= {key: layer[key][token : token + 1] for key in ("output", "x")}
        assert_near(found[token : token + 1], added_by_parts(alone), BOUND.output)
    assert torch.equal(found[0], layer["output"][0])
    # Every open part of a token gives away a weight of one.
    parts = (layer["opened"].unsqueeze(0) & ~closed.unsqueeze(1)).any(-1).sum(-1)
    assert_near(tally[:40].sum(-1), parts.float(), BOUND.output)
    assert not tally[:40, 1:][closed].any() and not tally[40:].any()


def own_rows(tokens, places=3):
    """Every other token has a fixed mixture; the rest differ in top_k, temperature and scale."""
    random = torch.Generator().manual_seed(3)
    slots = torch.stack([torch.randperm(SLOTS, generator=random)[:places] for _ in range(tokens)])
    slots[::4, 1:] = -1
    top_k = torch.arange(tokens) % places + 1
    top_k[::2] = 0
    return (
        slots,
        torch.rand(tokens, places, generator=random),
        top_k,
        0.3 + torch.rand(tokens, generator=random),
        2 * torch.rand(tokens, generator=random),
    )


@pytest.mark.parametrize("null_score", [None, 0.1])
@pytest.mark.parametrize("shared", [False, True])
def test_each_token_has_its_own_mixture_or_knobs(shared, null_score):
    layer, rows = make_layer(40), own_rows(50)
    statistics = None
    if shared:
        statistics = operators.gate_statistics(layer["x"], layer["signatures"])
    tally = torch.zeros(50, 1 + SLOTS)
    found = add(layer, statistics, rows=rows, tally=tally, null_score=null_score)
    x = torch.nn.functional.layer_norm(layer["x"], (IN,), eps=EPS) / math.sqrt(IN)
    scores = (x @ layer["signatures"].T).view(40, len(OUT), SLOTS)
    scores = scores.masked_fill(~layer["opened"], -torch.inf)
    for token in range(40):
        slots, weights, top_k, temperature, scale = (table[token] for table in rows)
        wanted = []
        for part, b in enumerate(layer["b"]):
            chosen = choose_experts(
                scores[token : token + 1, part],
                max(1, int(top_k)),
                temperature=float(temperature),
                null_score=null_score,
            )
            if top_k == 0:
                there = (slots >= 0) & layer["opened"][part, slots.clamp_min(0)]
                mine = torch.where(there, slots, -1)[None]
                chosen = Routing(mine, (weights * there)[None])
            chosen = Routing(chosen.experts, chosen.weights * scale)
            one = layer["x"][token : token + 1]
            wanted.append(routed_lora_reference(one, layer["a"][part], b, chosen))
        added = torch.cat(wanted, dim=1)
        assert_near(found[token : token + 1], layer["output"][token : token + 1] + added, 1e-5)
    assert tally[:40].any() and not tally[40:].any()


@pytest.mark.parametrize("tokens", [0, 1, 40])
def test_rows_that_ask_for_nothing_change_nothing(tokens):
    layer = make_layer(tokens)
    usual = (
        torch.full((tokens, 4), -1),
        torch.zeros(tokens, 4),
        torch.full((tokens,), 2),
        torch.full((tokens,), 0.9),
        torch.ones(tokens),
    )
    assert_near(add(layer, rows=usual), add(layer), 1e-6)


def test_more_tokens_than_rows():
    with pytest.raises(ValueError, match="3 tokens in a forward, room for 2"):
        add(make_layer(3), prior=torch.zeros(2, SLOTS))


@pytest.mark.parametrize("tokens", [2, 131])
def test_as_torch_wants_operators(tokens):
    layer = make_layer(tokens)
    turn = torch.zeros(1)
    torch.library.opcheck(torch.ops.phatgoose.fork_.default, (turn, layer["x"], None))
    arguments = [layer[key] for key in GATES]
    tables = torch.zeros(200, SLOTS), torch.zeros(200, 1 + SLOTS)
    for router, backend in ((None, "torch"), (None, "reference"), ("arrow", "torch")):
        settings = IN, router, backend, 2, 1.0, False, None
        for rows in ((), own_rows(200)):
            given = layer["output"], turn, layer["x"], None, *arguments, *tables, [*rows]
            call = *given, *settings
            torch.library.opcheck(torch.ops.phatgoose.add_routed_.default, call)


def test_one_graph_for_any_number_of_tokens():
    """As vLLM compiles: once, for any number of tokens, and without looking again."""
    compiled = []

    def backend(graph, _):
        compiled.append(graph)
        return graph.forward

    prior, tally = torch.zeros(200, SLOTS), torch.zeros(200, 1 + SLOTS)
    prior[:, 0] = -torch.inf

    def run(output, turn, x, gates, tally):
        settings = (IN, None, "torch", 2, 0.9, False, None)
        torch.ops.phatgoose.fork_(turn, x, None)
        output = output + 0.0
        torch.ops.phatgoose.add_routed_(output, turn, x, None, *gates, prior, tally, [], *settings)
        return output

    fast = torch.compile(run, backend=backend, fullgraph=True)
    for tokens in (50, 3, 131):
        layer = make_layer(tokens)
        for name in ("output", "x"):
            torch._dynamo.mark_dynamic(layer[name], 0)
        gates = [layer[key] for key in GATES]
        mine = torch.zeros_like(tally)
        wanted = add(layer, prior=prior, tally=mine)
        assert torch.equal(
            fast(layer["output"], torch.zeros(1), layer["x"], gates, tally.zero_()), wanted
        )
        assert torch.equal(tally, mine)
        assert mine[:tokens].any() and not mine[tokens:].any()
    assert len(compiled) == 1


def test_the_compiler_keeps_them_in_turns():
    """What routing runs beside hangs on the order in which layers are launched; and no copies."""
    from torch._inductor.utils import run_and_get_code

    prior, tally = torch.zeros(200, SLOTS), torch.zeros(200, 1 + SLOTS)
    settings = (IN, None, "torch", 2, 0.9, False, None)

    def routed(x, weight, turn, gates):
        torch.ops.phatgoose.fork_(turn, x, None)
        output = torch.nn.functional.linear(x, weight)
        torch.ops.phatgoose.add_routed_(output, turn, x, None, *gates, prior, tally, [], *settings)
        return output

    def run(attended, weight, turn, gates):  # attention leaves [T, heads, features of a head]
        first = routed(attended.view(-1, IN), weight, turn, gates)
        return routed(torch.nn.functional.silu(first[:, :IN]), weight, turn, gates)

    layer, weight, turn = make_layer(50), torch.randn(sum(OUT), IN), torch.zeros(1)
    attended = layer["x"].view(50, 2, -1)
    torch._dynamo.mark_dynamic(attended, 0)
    arguments = attended, weight, turn, [layer[key] for key in GATES]
    with torch.inference_mode():
        found, [code] = run_and_get_code(torch.compile(run, fullgraph=True), *arguments)
        assert_near(found, run(*arguments), BOUND.output)
    called = re.findall(r"^ *(?:torch\.ops\.phatgoose|extern_kernels)\.(\w+)", code, re.MULTILINE)
    assert called == ["fork_", "mm", "add_routed_"] * 2
    assert "copy" not in code[code.index("def call") :]
