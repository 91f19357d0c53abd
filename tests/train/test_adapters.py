"""LoRAs trained together are the LoRAs that train_adapter trains alone."""

import json
import random

import pytest
import torch
from peft import PeftModel

from phatgoose import load_expert, train_gates_together
from phatgoose.errors import ConfigError, TrainingError
from phatgoose.experts import adapter_hash
from phatgoose.experts.lora import CONFIG_FILE
from phatgoose.tasks import Encoded, batches
from phatgoose.train import AdapterTraining, train_adapter, train_adapters_together
from phatgoose.train.loop import loop
from tests.tolerances import TOLERANCE, assert_near
from tests.train.test_gated_adapter import assert_unchanged, snapshot
from tests.train.toys import PAD, VOCABULARY, gpt2, llama, make, t5

NEAR = TOLERANCE[torch.float32].delta  # after some steps of AdamW
# As train_adapter has it, a base's own dropout is on; without it, two runs can be compared.
QUIET = {
    "llama": {},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "t5": {"dropout_rate": 0.0},
}
SIZES = {"small": 3, "middle": 7, "large": 12}


def base(kind="llama"):
    torch.manual_seed(0)
    return {"llama": llama, "gpt2": gpt2, "t5": t5}[kind](**QUIET[kind]).eval()


def encoded(count):
    """Random examples; as many as there are, they are others."""
    draw = random.Random(count)

    def ids(most):
        return [draw.randrange(2, len(VOCABULARY)) for _ in range(draw.randint(1, most))]

    return [Encoded(ids(5), ids(3)) for _ in range(count)]


def settings(**changes):
    given = {"rank": 2, "alpha": 3, "steps": 9, "batch_size": 5, "learning_rate": 1e-2, "seed": 4}
    return AdapterTraining(**{**given, **changes})


def together(folder, *, kind="llama", tasks=None, model=None, run=None, **changes):
    tasks = {name: encoded(count) for name, count in SIZES.items()} if tasks is None else tasks
    model = model or base(kind)
    return train_adapters_together(
        model, tasks, folder, settings(**changes), pad=PAD, progress=False, **(run or {})
    )


def test_each_may_have_a_seed_of_its_own(tmp_path):
    """Each is what it is alone with that seed; the seed depends on the name, not on the others."""
    together(tmp_path / "together", seed_each=True)
    seeds = {settings(seed_each=True).of_expert(name).seed for name in SIZES}
    assert len(seeds) == len(SIZES)
    for name, count in SIZES.items():
        own = settings(seed_each=True).of_expert(name)
        train_adapter(base(), encoded(count), tmp_path / name, own, pad=PAD, progress=False)
        found, wanted = load_expert(tmp_path / "together" / name), load_expert(tmp_path / name)
        for site, module in wanted.modules.items():
            assert_near(found.modules[site].a, module.a, NEAR)
            assert_near(found.modules[site].b, module.b, NEAR)


def test_layers_that_are_not_there_are_refused(tmp_path):
    model = base()
    before = snapshot(model)
    with pytest.raises(ConfigError, match=r"target_modules: \['no_proj'\] cannot be adapted"):
        together(tmp_path, model=model, target_modules=["no_proj"])
    assert_unchanged(model, before)


@pytest.mark.parametrize("kind", QUIET)
def test_together_is_alone(kind, tmp_path):
    """Sizes are such that batches and epochs end at other steps for each task."""
    model = base(kind)
    before = snapshot(model)
    modules = together(tmp_path / "together", kind=kind, model=model)
    assert_unchanged(model, before)
    assert not hasattr(model, "peft_config")
    for name, count in SIZES.items():
        alone = tmp_path / "alone" / name
        train_adapter(base(kind), encoded(count), alone, settings(), pad=PAD, progress=False)
        found, wanted = load_expert(tmp_path / "together" / name), load_expert(alone)
        assert found.modules.keys() == wanted.modules.keys()
        for site, module in wanted.modules.items():
            assert_near(found.modules[site].a, module.a, NEAR)
            assert_near(found.modules[site].b, module.b, NEAR)
            assert found.modules[site].scale == module.scale
        assert adapter_hash(modules[name]) == adapter_hash(found.modules)
        configs = [
            json.loads((folder / CONFIG_FILE).read_text()) for folder in (found.folder, alone)
        ]
        for config in configs:
            config["target_modules"].sort()
        assert configs[0] == configs[1]


def test_peft_loads_what_is_written(tmp_path):
    """In bfloat16 too, and gates that follow belong to what is on disk."""
    model = base()
    modules = together(tmp_path, model=model, save_dtype="bfloat16", dropout=0.2)
    assert {m.a.dtype for m in modules["small"].values()} == {torch.float32}
    assert {m.a.dtype for m in load_expert(tmp_path / "small").modules.values()} == {torch.bfloat16}
    data = {name: batches(encoded(count), 3, pad=PAD) for name, count in SIZES.items()}
    batch = next(iter(data["small"]))
    plain = model(**batch).loss.item()
    for name, gates in train_gates_together(model, modules, data, steps=3, progress=False).items():
        gates.save(tmp_path / name)
        assert load_expert(tmp_path / name).gates is not None
    assert PeftModel.from_pretrained(model, tmp_path / "small")(**batch).loss.item() < plain


def test_in_groups_and_by_seed(tmp_path):
    found = [
        together(tmp_path / str(number), run={"together": size}, seed=seed)
        for number, (size, seed) in enumerate([(None, 4), (2, 4), (1, 5)])
    ]
    for name in SIZES:
        one, two, other = (modules[name] for modules in found)
        for site in one:
            assert_near(two[site].b, one[site].b, NEAR)
        assert not torch.allclose(other[site].a, one[site].a)


def test_dropout_and_autocast(tmp_path):
    plain, dropped, again, mixed = (
        together(tmp_path / str(number), **changes)["large"]
        for number, changes in enumerate([{}, {"dropout": 0.5}, {"dropout": 0.5}, {"bf16": True}])
    )
    site = next(iter(plain))
    assert adapter_hash(dropped) == adapter_hash(again)
    assert not torch.allclose(dropped[site].b, plain[site].b, rtol=0.05)
    assert torch.cosine_similarity(mixed[site].b.flatten(), plain[site].b.flatten(), dim=0) > 0.9


def test_it_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    wanted = together(tmp_path / "whole", steps=25)
    step = loop.Loop._step

    def stop_at_15(self, stream, forward, done):
        if done.step == 15:
            raise KeyboardInterrupt
        return step(self, stream, forward, done)

    run = {"checkpoint": tmp_path / "progress"}
    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "_step", stop_at_15)
        with pytest.raises(KeyboardInterrupt):
            together(tmp_path / "stopped", steps=25, run=run)
    assert not (tmp_path / "stopped").exists()
    found = together(tmp_path / "stopped", steps=25, run=run)
    for name, modules in wanted.items():
        assert adapter_hash(found[name]) == adapter_hash(modules)
    with pytest.raises(ConfigError, match="set of examples"):
        tasks = {name: encoded(count + 1) for name, count in SIZES.items()}
        together(tmp_path / "other", steps=25, run=run, tasks=tasks)


def test_refusals(tmp_path):
    with pytest.raises(ConfigError, match="^empty: there are no examples"):
        together(tmp_path, tasks={"full": encoded(3), "empty": []})
    with pytest.raises(ConfigError, match="none to train"):
        together(tmp_path, tasks={})
    with pytest.raises(ConfigError, match="together"):
        together(tmp_path, run={"together": 0})
    with pytest.raises(ConfigError, match="unload"):
        together(tmp_path, model=make())
    with pytest.raises(TrainingError, match="^bad: the loss is nan at step 1"):
        together(tmp_path, tasks={"good": encoded(3), "bad": [Encoded([], [5])]})
    assert not any(tmp_path.iterdir())
