"""Signatures measured on data: against an independent mean, and kept in files."""

from dataclasses import replace

import pytest
import torch

from phatgoose import (
    ExpertPool,
    Router,
    derive_signatures,
    load_expert,
    record,
    route,
    save_expert,
    unroute,
)
from phatgoose.errors import (
    ConfigError,
    ExpertFormatError,
    IncompatibleExpertError,
    MissingGateError,
)
from phatgoose.experts.hub import files
from phatgoose.experts.kinds import KINDS, Kind
from phatgoose.routers.spectral import right_singular
from phatgoose.tasks import Encoded
from tests.models import PAD, VOCABULARY, make_model, mixed_targets, save_experts
from tests.tolerances import assert_near


class Tokenizer:
    """All that deriving asks of one."""

    pad_token_id = PAD

    def get_vocab(self):
        return {}


def make_rows(lengths, seed=0):
    random = torch.Generator().manual_seed(seed)

    def ids(length):
        return torch.randint(1, VOCABULARY, (length,), generator=random).tolist()

    return [Encoded(ids(prompt), ids(target)) for prompt, target in lengths]


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5-gated"])
def test_the_average_activation_is_the_mean_of_means(family, model_and_pool):
    model, pool = model_and_pool(family, 3)
    rows = make_rows([(5, 2), (3, 3), (7, 1)])
    made = derive_signatures(
        model, Tokenizer(), pool.experts, dict.fromkeys(pool.names, rows), batch_size=2
    )
    expert = pool["e0"]
    route(model, ExpertPool([expert]), "arrow", top_k=1)  # one at weight 1
    sums = {}
    for row in rows:
        handles = [
            model.get_submodule(name).register_forward_pre_hook(
                lambda _, args, name=name: sums.setdefault(name, []).append(
                    args[0].double().flatten(0, -2).mean(0)
                )
            )
            for name in expert.modules
        ]
        if model.config.is_encoder_decoder:
            labels = torch.tensor([row.target])
            model(input_ids=torch.tensor([row.prompt]), labels=labels)
        else:
            model(input_ids=torch.tensor([row.prompt + row.target]))
        for handle in handles:
            handle.remove()
    unroute(model)
    found = made["e0"]["average_activation"]
    assert found.examples == 3 and found.tokens == 21
    for name in expert.modules:
        assert_near(found.vectors[name], torch.stack(sums[name]).mean(0), 1e-5)


def test_the_mean_prompt_and_arrow(model_and_pool):
    model, pool = model_and_pool("llama", 2)
    rows = make_rows([(5, 2), (3, 3)])
    made = derive_signatures(model, Tokenizer(), pool.experts, dict.fromkeys(pool.names, rows))
    ids = torch.tensor(rows[0].prompt + rows[1].prompt)
    norm = model.model.layers[0].input_layernorm
    wanted = norm(model.get_input_embeddings()(ids)).mean(0)
    (found,) = made["e1"]["prompt_mean"].vectors.values()
    assert_near(found, wanted.detach(), 1e-5)
    for name, lora in pool["e1"].modules.items():
        assert_near(made["e1"]["arrow"].vectors[name], right_singular(lora)[1][0], 1e-6)


def test_files_come_back_and_are_used(tmp_path):
    model = make_model("llama")
    folders = save_experts(tmp_path, model, mixed_targets("llama", 3))
    pool = ExpertPool.load(folders)
    rows = make_rows([(5, 2), (4, 3)])
    made = derive_signatures(model, Tokenizer(), pool.experts, dict.fromkeys(pool.names, rows))
    for folder in folders:
        for signatures in made[folder.name].values():
            signatures.save(folder)
    loaded = ExpertPool.load(folders)
    for kind, wanted in made["e2"].items():
        found = loaded["e2"].signatures[kind]
        assert (found.base, found.adapter, found.examples) == (
            wanted.base,
            wanted.adapter,
            2 * (kind != "arrow"),
        )
        assert all(torch.equal(found.vectors[n], v.float()) for n, v in wanted.vectors.items())
    for router in ("average_activation", "evidence", "average_activation+evidence"):
        route(model, loaded, router)
        with record(model) as trace:
            model(input_ids=torch.tensor([[3, 4, 5]]))
        assert trace.experts
        unroute(model)


def test_bad_files_are_refused(tmp_path):
    model = make_model("llama")
    first, second = save_experts(tmp_path, model, [("q_proj",), ("q_proj",)])
    made = derive_signatures(model, Tokenizer(), [load_expert(first)], {}, kinds=("arrow",))
    signatures = made["e0"]["arrow"]
    with pytest.raises(IncompatibleExpertError, match=r"e1.*were made for adapter"):
        signatures.save(second)
    path = signatures.save(first) / KINDS["arrow"].file
    path.rename(second / path.name)
    with pytest.raises(IncompatibleExpertError, match=r"Arrow vectors were made for adapter"):
        load_expert(second)
    (second / path.name).write_bytes(b"no tensors")
    with pytest.raises(ExpertFormatError, match=r"phatgoose_arrow"):
        load_expert(second)


def test_what_cannot_be_measured(model_and_pool):
    model, pool = model_and_pool("llama", 2)
    with pytest.raises(ConfigError, match="'nonsense' is unknown"):
        derive_signatures(model, Tokenizer(), pool.experts, {}, kinds=("nonsense",))
    with pytest.raises(ConfigError, match="e0: no examples"):
        derive_signatures(model, Tokenizer(), pool.experts, {})
    rows = {name: [Encoded([], [3, 4])] for name in pool.names}
    with pytest.raises(ConfigError, match="e0: its examples have no prompts"):
        derive_signatures(model, Tokenizer(), pool.experts, rows)


def test_a_kind_of_ones_own(model_and_pool, tmp_path, monkeypatch):
    """A line in KINDS and a router: all else goes through them."""
    monkeypatch.setitem(KINDS, "ends", Kind("ends", "last tokens", True, True))
    monkeypatch.setattr(Router, "_known", dict(Router._known))

    class Ends(Router):
        name = "ends"
        needs = measures = "ends"

        @classmethod
        def measure(cls, given):
            return [
                {
                    name: torch.full((lora.in_features,), float(given.prompts[expert.name][-1]))
                    for name, lora in expert.modules.items()
                }
                for expert in given.experts
            ]

        def signature(self, expert, module):
            return self.kept(expert)[module]

        def score(self, x, signatures):
            return x.float() @ signatures.T

    model, pool = model_and_pool("llama", 2)
    with pytest.raises(MissingGateError, match=r"^e0: has no last tokens, which .* ends needs\."):
        route(model, pool, "ends")
    rows = {name: make_rows([(5, 2), (4, 3)]) for name in pool.names}
    made = derive_signatures(model, Tokenizer(), pool.experts, rows)
    assert set(made["e0"]) == set(KINDS) - {"gates"}
    experts = [
        replace(expert, signatures={**expert.signatures, **made[expert.name]}) for expert in pool
    ]
    loaded = [load_expert(save_expert(expert, tmp_path / expert.name)) for expert in experts]
    assert all(set(expert.signatures) == set(KINDS) for expert in loaded)
    assert KINDS["ends"].file in files()
    route(model, ExpertPool(loaded), "ends")
    with record(model) as trace:
        model(input_ids=torch.tensor([[3, 4, 5]]))
    assert trace.experts
    unroute(model)
