"""As many experts as the largest published pool: from its file to text, and what it costs."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from phatgoose import ExpertPool, record, route, unroute
from phatgoose.experts import linear_modules
from phatgoose.experts.released import FLAN_NAMES, import_released
from tests.models import make_model

RANK = 16
ADDONS = "_addons.expert_lora.layer1__{0} _addons.expert_lora.layer2__{0}".split()
GATE = "_addons.router.expert_embeddings__{0}"


@pytest.fixture(scope="module")
def model():
    return make_model("t5", hidden=32, layers=1)


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    """best.pt with 166 random experts for the query, value and feed-forward layers."""
    random = torch.Generator().manual_seed(0)
    tensors = {}
    for name, (inputs, outputs) in linear_modules(model).items():
        if name.split(".")[-1] not in ("q", "v", "wi"):
            continue
        for i in range(len(FLAN_NAMES)):
            shapes = ((inputs, RANK), (RANK, outputs), (inputs,))
            for key, shape in zip((*ADDONS, GATE), shapes, strict=True):
                tensors[f"{name}.{key.format(i)}"] = torch.randn(shape, generator=random)
    path = tmp_path_factory.mktemp("published") / "best.pt"
    torch.save(tensors, path)
    model.config.save_pretrained(path.parent / "base")
    return path


@pytest.fixture(scope="module")
def pool(checkpoint):
    folders = import_released(
        checkpoint, str(checkpoint.parent / "base"), checkpoint.parent / "pool", progress=False
    )
    return ExpertPool.load(folders)


@pytest.fixture
def routed(model):
    """routed(pool): the model, routed until the next call or the end of the test."""

    def make(pool, **settings):
        if "_phatgoose" in vars(model):
            unroute(model)
        return route(model, pool, **settings)

    yield make
    unroute(model)


def test_from_the_published_file_to_text(pool, checkpoint, routed):
    assert pool.names == list(FLAN_NAMES)  # the published order, whatever the folders' order is
    tensors = torch.load(checkpoint)
    site = "decoder.block.0.layer.1.EncDecAttention.v"
    for i in (0, 36, 165):
        expert = list(pool)[i]
        assert torch.equal(expert.modules[site].a.T, tensors[f"{site}.{ADDONS[0].format(i)}"])
        assert torch.equal(expert.gates.vectors[site], tensors[f"{site}.{GATE.format(i)}"])
    model = routed(pool)
    prompts = torch.randint(1, 50, (3, 9), generator=torch.Generator().manual_seed(1))
    with record(model) as trace:
        text = model.generate(prompts, max_new_tokens=5, do_sample=False)
    assert text.shape == (3, 6)
    assert trace.names == list(FLAN_NAMES)
    used = torch.cat([chosen.flatten() for chosen in trace.experts.values()])
    assert used.unique().numel() > 50 and used.min() >= 0 and used.max() < 166
    with torch.no_grad():
        logits = model(input_ids=prompts, decoder_input_ids=text).logits
    assert torch.equal(logits.argmax(-1)[:, :-1], text[:, 1:])


def test_a_choice_among_all_is_the_definition(pool, routed, model):
    """One layer of 166 experts against every expert's output, weighed and added."""
    site = "encoder.block.0.layer.0.SelfAttention.q"
    layer, x = model.get_submodule(site), torch.randn(40, 32)
    gates = torch.stack([e.gates.vectors[site] for e in pool])
    size = (32,)
    scores = torch.layer_norm(x, size) @ torch.layer_norm(gates, size).T / 32**0.5
    kept, chosen = scores.topk(2, dim=-1)
    weights = torch.zeros(40, 166).scatter(1, chosen, kept.softmax(-1))
    outputs = torch.stack([x @ e.modules[site].a.T @ e.modules[site].b.T / RANK for e in pool])
    with torch.no_grad():
        wanted = layer(x) + torch.einsum("te,eto->to", weights, outputs)
        routed(pool)
        torch.testing.assert_close(layer(x), wanted, rtol=1e-4, atol=1e-5)


class Peak(TorchDispatchMode):
    """The most bytes that tensors made inside the block held at one time."""

    def __init__(self):
        super().__init__()
        self.bytes = self.held = 0
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {a.untyped_storage()._cdata for a in args if isinstance(a, torch.Tensor)}
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, torch.Tensor):
                self.add(value.untyped_storage(), given)
        return result

    def add(self, storage, given):
        if storage in self.known or storage._cdata in given:
            return  # a view, or changed in place
        self.known.add(storage)
        weakref.finalize(storage, self.drop, storage.nbytes())
        self.held += storage.nbytes()
        self.bytes = max(self.bytes, self.held)

    def drop(self, size):
        self.held -= size


def test_peak_counts_what_is_alive():
    x = torch.zeros(100)
    with Peak() as peak:
        y = x + 1
        y.mul_(2).view(10, 10)
        del y
        z = torch.stack([x, x])
    assert (peak.bytes, peak.held, len(z)) == (800, 800, 2)


@torch.no_grad()
def test_peak_memory_is_not_that_of_166_experts(pool, routed):
    sequences, length, few, top_k = 8, 64, 8, 2
    ids = torch.randint(1, 50, (sequences, length), generator=torch.Generator().manual_seed(2))
    peaks = {}
    for count in (few, len(pool)):
        model = routed(ExpertPool(list(pool)[:count]), top_k=top_k)
        with Peak() as peak:
            model(input_ids=ids, decoder_input_ids=ids, use_cache=False)
        peaks[count] = peak.bytes
    # Scores are [T, E] in fp32; choosing holds a second copy while it looks for the best.
    scores = 4 * sequences * length * (len(pool) - few)
    assert peaks[166] <= 1.3 * peaks[few] + 2 * scores
    # One expert's output for every token is [T, O]: computing them all would need E of these.
    every_output = 4 * sequences * length * 166 * 32
    assert peaks[166] < every_output / 2
