"""A compiled routed model is the routed model, whatever becomes of its pool afterwards."""

import pytest
import torch
from torch._dynamo.exc import Unsupported
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend

from phatgoose import Choice, ExpertPool, assign, record, restrict, route, unroute
from phatgoose.errors import RoutingError
from phatgoose.ops.backends.sorting import FEW_PAIRS
from tests.models import LINEARS, make_batch, make_model, mixed_targets, save_experts
from tests.routers.counting import CountingRouter
from tests.tolerances import TOLERANCE, assert_near

NEAR = TOLERANCE[torch.float32].model
ATTENTION = "model.layers.0.self_attn."
ROOM = {"capacity": 6, "max_rank": 8}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """folders(family): of 3 experts that adapt every layer, then 1 that adapts some."""
    made = {}

    def make(family):
        if family not in made:
            targets = [LINEARS[family]] * 3 + mixed_targets(family, 3)[2:]
            model = make_model(family, layers=1)
            made[family] = save_experts(tmp_path_factory.mktemp(family), model, targets)
        return made[family]

    return make


class Compiled:
    """A routed model of one block, its pool, and what the compiler made of it."""

    def __init__(self, folders, family="llama", *, compiler="eager", dynamic=None, **settings):
        self.folders = folders(family)
        self.pool = ExpertPool.load(self.folders[:3])
        self.model = route(make_model(family, layers=1), self.pool, **{**ROOM, **settings})
        self.counter = (
            CompileCounter() if compiler == "eager" else CompileCounterWithBackend(compiler)
        )
        self.compiled = torch.compile(
            self.model, fullgraph=True, backend=self.counter, dynamic=dynamic
        )

    @property
    def compilations(self):
        return self.counter.frame_count

    def compare(self, lengths=(4, 7), gradients=False):
        batch = make_batch(self.model, lengths)
        with torch.set_grad_enabled(gradients):
            wanted, found = self.model(**batch).logits, self.compiled(**batch).logits
        assert_near(found, wanted, NEAR)
        return wanted.detach()

    def compare_gradients(self):
        batch, grown = make_batch(self.model, (4, 7)), []
        for model in (self.compiled, self.model):
            self.model.zero_grad()
            model(**batch).logits.square().mean().backward()
            grown.append([parameter.grad.clone() for parameter in self.model.parameters()])
        for found, wanted in zip(*grown, strict=True):
            assert_near(found, wanted, TOLERANCE[torch.float32].delta)


def change_the_pool(both):
    """Through additions, removals and restrictions, each of which changes the logits."""
    seen = [both.compare()]

    def compare():
        seen.append(both.compare())
        assert all(not torch.equal(seen[-1], before) for before in seen[:-1])

    both.pool.add(both.folders[3])
    compare()
    with restrict(both.model, ["e0", "e3"]):
        compare()
        with restrict(both.model, ["e2"]):
            compare()
    both.pool.remove("e1")
    compare()
    both.pool.add(both.folders[1])  # in another slot than before
    assert_near(both.compare(), seen[1], NEAR)


@pytest.mark.parametrize("family", ["llama", "t5-gated", "gpt2"])
def test_the_pool_changes_without_compiling_again(family, folders):
    both = Compiled(folders, family)
    change_the_pool(both)
    assert both.compilations == 1


@pytest.mark.slow
def test_by_the_default_compiler(folders):
    both = Compiled(folders, compiler="inductor")
    change_the_pool(both)
    assert both.compilations == 1


@pytest.mark.parametrize(
    "settings",
    [
        {"null_score": 0.1, "top_k": 3, "temperature": 0.5},
        {"scale": "unit", "top_k": 1},
        {"backend": "reference"},
    ],
)
def test_settings(settings, folders):
    both = Compiled(folders, **settings)
    both.compare()
    both.pool.add(both.folders[3])
    both.compare((9, 30, 30))  # many tokens
    assert both.compilations <= 2


def test_restricted_to_nobody_is_the_base(folders):
    both = Compiled(folders)
    both.compare()
    with restrict(both.model, []):
        assert torch.equal(both.compare(), make_base_logits())
    both.compare()


@pytest.mark.parametrize(
    "rows",
    [
        [{"e0": 0.7, "e1": 0.2, "e2": 1.3}, {"e2": 0.5}],
        [{"e0": 0.7, "e1": 0.2, "e2": 1.3}, Choice(allow=["e0", "e2"], top_k=1, temperature=0.5)],
    ],
    ids=str,
)
def test_rows_that_ask_for_themselves(rows, folders):
    both = Compiled(folders)
    routed = both.compare()
    with assign(both.model, rows):
        assert not torch.equal(both.compare(), routed)
    assert torch.equal(both.compare(), routed)


def make_base_logits():
    model = make_model("llama", layers=1)
    with torch.no_grad():
        return model(**make_batch(model, (4, 7))).logits


def test_a_pool_beyond_its_room_compiles_again(folders):
    both = Compiled(folders, capacity=3)
    both.compare()
    both.pool.add(both.folders[3])
    both.compare()
    assert both.compilations == 2


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_gradients(family, folders):
    both = Compiled(folders, family, compiler="aot_eager")
    both.compare_gradients()
    both.pool.remove("e1")
    both.pool.add(both.folders[3])
    both.compare_gradients()
    assert both.compilations == 1


def test_lengths_on_both_sides_of_every_threshold(folders):
    both = Compiled(folders, dynamic=True)
    for length in (5, 9, 31, 32, 33, 40, 60):
        both.compare([length])
    assert both.compilations <= 2
    for length in (1, 2):  # the compiler takes a size of 1 for a constant
        both.compare([length])
    assert both.compilations <= 3


@pytest.mark.slow
def test_lengths_where_gradients_are_wanted(folders):
    both = Compiled(folders, compiler="aot_eager", dynamic=True)
    for length in (9, 31, 33, 60):
        both.compare([length], gradients=True)
    assert both.compilations <= 3


def test_lengths_marked_as_dynamic(folders):
    """Many tokens: on the other side of the 'torch' backend's threshold it compiles again."""
    both = Compiled(folders)
    for length in (40, 33, 60):
        batch = make_batch(both.model, [length])
        for value in batch.values():
            torch._dynamo.mark_dynamic(value, 1, min=1 + FEW_PAIRS // 2, max=64)
        with torch.no_grad():
            assert_near(both.compiled(**batch).logits, both.model(**batch).logits, NEAR)
    assert both.compilations == 1


# ---------------------------------------------------------------- what a compiled model cannot do


@pytest.mark.parametrize("whole", [True, False])
def test_recording_is_refused(whole, folders):
    both = Compiled(folders)
    compiled = torch.compile(both.model, fullgraph=whole, backend="eager")
    batch = make_batch(both.model, [4])
    with torch.no_grad():
        wanted = compiled(**batch).logits
        error = Unsupported if whole else RoutingError
        with pytest.raises(error, match="q_proj: .*cannot be recorded"), record(both.model):
            compiled(**batch)
        assert torch.equal(compiled(**batch).logits, wanted)
        with record(both.model) as trace:
            both.model(**batch)
    assert len(trace.tokens["decoder"].ids) == 4


@pytest.mark.parametrize("whole", [True, False])
def test_a_prior_is_refused(whole, folders):
    model = route(
        make_model("llama", layers=1), ExpertPool.load(folders("llama")), CountingRouter()
    )
    compiled = torch.compile(model, fullgraph=whole, backend="eager")
    batch = make_batch(model, [4])
    model(**batch)  # by itself it works, and leaves nothing that the compiler could take
    with pytest.raises(Unsupported if whole else RoutingError, match="torch.compile do not work"):
        compiled(**batch)


def test_a_prior_is_refused_in_an_encoder_on_its_own(folders):
    """Rather than given the tokens that the encoder saw last."""
    model = route(make_model("t5", layers=1), ExpertPool.load(folders("t5")), CountingRouter())
    batch = make_batch(model, [4])
    model(**batch)
    compiled = torch.compile(model.encoder, fullgraph=True, backend="eager")
    with pytest.raises(Unsupported, match="torch.compile do not work"):
        compiled(input_ids=batch["input_ids"].flip(0))


# ---------------------------------------------------------------- changes a compiler may not see


def test_a_layer_that_loses_its_last_expert_or_gets_its_first(tmp_path):
    targets = [("q_proj", "o_proj", "down_proj"), ("q_proj",)]
    folders = save_experts(tmp_path, make_model("llama", layers=1), targets)
    both = Compiled(lambda _: folders, top_k=1)
    both.compare()
    both.pool.remove("e0")
    both.compare()
    both.pool.add(folders[0])
    both.compare()


def test_unrouting_and_routing_again(folders):
    both = Compiled(folders)
    both.compare()
    unroute(both.model)
    assert torch.equal(both.compare(), make_base_logits())
    route(both.model, both.pool, **ROOM)
    both.compare()


def test_routing_a_model_that_was_compiled_before(folders):
    both = Compiled(folders)
    unroute(both.model)
    both.compare()
    route(both.model, both.pool, **ROOM)
    both.compare()
