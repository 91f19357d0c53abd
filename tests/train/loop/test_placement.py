"""Large bases: spread by a device_map, or sharded over processes, the gates are the same."""

import importlib.util
import json

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import Trainer, TrainingArguments

from phatgoose import train_gates, train_gates_from_trainer, train_gates_together
from phatgoose.errors import ConfigError
from phatgoose.train.gated_adapter import GatedAdapter
from tests.tolerances import TOLERANCE, assert_near
from tests.train import sharded
from tests.train.test_processes import launch
from tests.train.toys import (
    joined,
    make,
    make_batch,
    make_batches,
    make_collection,
    make_rows,
    modules_of,
    same,
)

NEAR = TOLERANCE[torch.float32].delta  # after some steps of AdamW


def no_deepspeed():
    return importlib.util.find_spec("deepspeed") is None


@pytest.fixture(scope="module")
def whole():
    """What one process makes of whole bases."""
    return dict(sharded.runs(1, lambda model: None))


@pytest.mark.parametrize(
    "how",
    [
        "fsdp2",
        pytest.param(
            "deepspeed", marks=pytest.mark.skipif(no_deepspeed(), reason="needs deepspeed")
        ),
    ],
)
def test_a_sharded_base_trains_the_gates_of_a_whole_one(how, whole, tmp_path):
    """T5 and GPT-2, alone, together and by a trainer; the base in halves, the gates in both."""
    launch(sharded, tmp_path, how)
    told = [json.loads((tmp_path / f"told-{rank}.json").read_text()) for rank in (0, 1)]
    assert told[0] == told[1] == {name: sharded.describe(g) for name, g in whole.items()}
    for name, gates in whole.items():
        first, second = (load_file(tmp_path / f"{name}-{rank}.safetensors") for rank in (0, 1))
        assert same(first, second)
        assert first.keys() == gates.vectors.keys()
        assert_near(joined(first), joined(gates.vectors), NEAR)


def spread(model, folder, before=""):
    """Some of it in memory, some on disk; what is on disk is in memory only while it computes."""
    parts = ["embed_tokens", "rotary_emb", "norm", "layers.0", "layers.1"]
    places = {f"{before}model.{part}": "cpu" for part in parts} | {f"{before}lm_head": "cpu"}
    places[f"{before}model.layers.1"] = "disk"
    return dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)


@pytest.mark.parametrize("where", ["disk", "cpu"])
def test_an_offloaded_base(where, tmp_path):
    batches = make_batches(4)
    wanted = train_gates(make(), batches, steps=4, progress=False)
    model = make()
    if where == "disk":
        model = spread(model, tmp_path, "base_model.model.")
    else:
        model = cpu_offload(model, execution_device=torch.device("cpu"))
    assert any(parameter.device.type == "meta" for parameter in model.parameters())
    found = train_gates(model, batches, steps=4, progress=False)
    assert same(found.vectors, wanted.vectors)
    assert found.record == wanted.record
    assert any(parameter.device.type == "meta" for parameter in model.parameters())


def test_a_trainer_s_offloaded_base(tmp_path):
    """The trainer leaves a model alone that accelerate has spread."""
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"), use_cpu=True, report_to="none", disable_tqdm=True
    )
    found = []
    for model in (make(), spread(make(), tmp_path, "base_model.model.")):
        trainer = Trainer(model, arguments, train_dataset=make_rows(16))
        found.append(train_gates_from_trainer(trainer, save=False, steps=3, progress=False))
    assert same(found[0].vectors, found[1].vectors)
    assert found[0].record == found[1].record


def test_many_adapters_of_an_offloaded_base(tmp_path):
    base, models = make_collection()
    adapters, batches = modules_of(models), {name: make_batches(4) for name in models}
    wanted = train_gates_together(base, adapters, batches, steps=4, progress=False)
    base = spread(base, tmp_path)
    found = train_gates_together(base, adapters, batches, steps=4, progress=False)
    for name in models:
        assert same(found[name].vectors, wanted[name].vectors)
        assert found[name].record == wanted[name].record


class Flat(FullyShardedDataParallel):
    """FSDP1 around a module, without a process group."""

    def __init__(self, module):
        nn.Module.__init__(self)
        self._fsdp_wrapped_module = module


def test_fsdp1_is_refused():
    model = make()
    layers = model.get_base_model().model.layers
    layers[0] = Flat(layers[0])
    with pytest.raises(ConfigError, match="fsdp_version 2"):
        GatedAdapter(model)
    base, models = make_collection(count=1)
    base.model.layers[0] = Flat(base.model.layers[0])
    with pytest.raises(ConfigError, match="FSDP2"):
        train_gates_together(base, modules_of(models), {"e0": [make_batch()]})
