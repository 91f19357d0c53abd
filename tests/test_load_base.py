"""Bases as people load them: dtypes, device maps, quantised, and with code of their own."""

import copy
import importlib.util
import json
import shutil
from typing import get_args

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import phatgoose
from phatgoose.cli.options import Quantization
from phatgoose.errors import BaseNotFoundError, ConfigError
from phatgoose.experts import identify_base
from phatgoose.models import load_base
from phatgoose.models.quantization import QUANTIZATIONS
from tests.train.toys import llama, make_batches, make_tokenizer

IDS = torch.arange(2, 10)[None]
# Of logits of about 1: what adding the LoRA in fp32, rather than in the base's dtype, may change.
NEAR = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def folder_of(model, folder):
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base and an expert of it, in folders."""
    root = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    # As wide as the blocks of 4-bit weights.
    model = llama(hidden_size=64, intermediate_size=128)
    for parameter in model.parameters():
        parameter.data.normal_(0, parameter.shape[-1] ** -0.5)
    folder_of(model, root / "base")
    tuned = get_peft_model(
        copy.deepcopy(model),
        LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.1)
    tuned.save_pretrained(root / "one")
    return root


def edit(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


# bitsandbytes takes this kernel only for inputs without a gradient, of which there is none to lose.
@pytest.mark.filterwarnings("ignore:bitsandbytes.*gemv_4bit")
@pytest.mark.parametrize("dtype", NEAR)
@pytest.mark.parametrize("name", ["bnb-8bit", "bnb-4bit", "torchao-int8"])
def test_a_quantised_base_is_routed_and_gated_as_peft_has_it(name, dtype, world):
    package, _ = QUANTIZATIONS[name]
    pytest.importorskip(package, reason=f"{package} is not installed")
    how = {"device": "cpu", "quantization": name, "dtype": dtype}
    base, tokenizer = load_base(world / "base", **how)
    assert identify_base(base, tokenizer) == identify_base(*load_base(world / "base", device="cpu"))
    tuned = PeftModel.from_pretrained(load_base(world / "base", **how)[0], world / "one").eval()
    with torch.no_grad():
        plain, wanted = base(IDS).logits, tuned(IDS).logits
        phatgoose.route(base, phatgoose.ExpertPool.load([world / "one"]), "arrow", top_k=1)
        torch.testing.assert_close(base(IDS).logits, wanted, rtol=0, atol=NEAR[dtype])
        assert (wanted - plain).abs().max() > 4 * NEAR[dtype]
        phatgoose.unroute(base)
        assert torch.equal(base(IDS).logits, plain)
    batches = make_batches(2)
    with torch.no_grad():
        # Gates start at zero, where each is a half.
        for module in tuned.modules():
            if hasattr(module, "lora_A"):
                module.scaling["default"] /= 2
        first = float(tuned(**batches[0]).loss)
        for module in tuned.modules():
            if hasattr(module, "lora_A"):
                module.scaling["default"] *= 2
    gates = phatgoose.train_gates(tuned, batches, steps=3, progress=False)
    assert all(vector.any() for vector in gates.vectors.values())
    assert gates.first_loss == pytest.approx(first, rel=NEAR[dtype])
    together = phatgoose.train_gates_together(
        base, {"one": world / "one"}, {"one": batches}, steps=3, progress=False
    )["one"]
    assert together.first_loss == pytest.approx(first, rel=NEAR[dtype])
    assert together.last_loss == pytest.approx(gates.last_loss, rel=NEAR[dtype])


def test_a_quantisation_that_is_not_there(world, monkeypatch):
    with pytest.raises(ConfigError, match="'int3' is unknown. Choose from: bnb-8bit"):
        load_base(world / "base", device="cpu", quantization="int3")
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name)
    )
    with pytest.raises(ConfigError, match="needs a package: pip install bitsandbytes"):
        load_base(world / "base", device="cpu", quantization="bnb-4bit")
    assert get_args(Quantization) == tuple(QUANTIZATIONS)


@pytest.mark.parametrize("method", ["gptq", "awq", "aqlm", "hqq", "eetq", "higgs"])
def test_a_base_whose_quantisation_does_not_run_here(method, world, tmp_path):
    """Packages that need a GPU, or are not installed: one line that names what is missing."""
    base = folder_of(llama(), tmp_path / "base")
    edit(base, quantization_config={"quant_method": method, "bits": 4, "group_size": 128})
    with pytest.raises(ConfigError, match="cannot be loaded here .*not quantised.$") as caught:
        load_base(base, device="cpu")
    assert "\n" not in str(caught.value)
    assert method in str(caught.value).lower()


def test_dtype_and_device_map(world):
    model, _ = load_base(world / "base", device_map={"": "cpu"}, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16 and model.device.type == "cpu"
    spread, _ = load_base(world / "base", device_map="auto")
    assert not spread.training
    with pytest.raises(ConfigError, match="device and device_map: both say"):
        load_base(world / "base", device="cpu", device_map="auto")


@pytest.fixture
def custom(world, tmp_path):
    """A base with code of its own."""
    base = shutil.copytree(world / "base", tmp_path / "custom")
    (base / "configuration_x.py").write_text(
        "from transformers import LlamaConfig\n"
        "class XConfig(LlamaConfig):\n    model_type = 'x_custom'\n"
    )
    (base / "modeling_x.py").write_text(
        "from transformers import LlamaForCausalLM\nfrom .configuration_x import XConfig\n"
        "class XForCausalLM(LlamaForCausalLM):\n    config_class = XConfig\n"
    )
    auto = {
        "AutoConfig": "configuration_x.XConfig",
        "AutoModelForCausalLM": "modeling_x.XForCausalLM",
    }
    edit(base, model_type="x_custom", architectures=["XForCausalLM"], auto_map=auto)
    return base


def test_code_of_its_own_runs_only_if_it_is_trusted(custom, world):
    with pytest.raises(ConfigError, match="brings Python code of its own.*--trust-remote-code"):
        load_base(custom, device="cpu")
    model, _ = load_base(custom, device="cpu", trust_remote_code=True)
    assert type(model).__name__ == "XForCausalLM"
    phatgoose.route(model, phatgoose.ExpertPool.load([world / "one"]), "arrow", top_k=1)
    assert model(IDS).logits.isfinite().all()


def test_a_gguf_that_is_none(tmp_path):
    path = tmp_path / "model.gguf"
    with pytest.raises(BaseNotFoundError, match=r"model\.gguf: no base model"):
        load_base(path, device="cpu")
    path.write_bytes(b"GGUF is not all")
    with pytest.raises(BaseNotFoundError, match=r"model\.gguf: no base model"):
        load_base(path, device="cpu")
