"""Adapters that are something else become plain LoRA folders."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from peft import LoHaConfig, LoKrConfig, OFTConfig, PeftModel, VeraConfig, get_peft_model
from safetensors.torch import load_file

from phatgoose import ExpertPool, route
from phatgoose.errors import (
    ConfigError,
    ExpertFormatError,
    ExpertNotFoundError,
    UnsupportedAdapterError,
)
from phatgoose.experts import adapter_hash, load_expert
from phatgoose.experts.convert import convert_adapter
from phatgoose.experts.lora import PICKLE, WEIGHTS_FILE

IDS = torch.tensor([[1, 5, 9, 13, 2, 3, 4, 7]])


@pytest.fixture
def bin_dir(expert_dir):
    """The expert with its weights in a pickle, as adapters of 2023 have them."""
    tensors = load_file(expert_dir / WEIGHTS_FILE)
    torch.save({key: tensor.clone() for key, tensor in tensors.items()}, expert_dir / PICKLE)
    (expert_dir / WEIGHTS_FILE).unlink()
    return expert_dir


def test_a_pickle_of_weights_is_read_on_request(expert, bin_dir, tmp_path, one_line):
    with pytest.raises(UnsupportedAdapterError, match=r"experts convert .* --bin") as info:
        load_expert(bin_dir)
    one_line(info)
    with pytest.raises(UnsupportedAdapterError, match="never loaded"):
        convert_adapter(bin_dir, tmp_path / "out")
    made = convert_adapter(bin_dir, tmp_path / "out", read_pickle=True)
    assert (made.was, made.error) == ("LORA", None)
    found = load_expert(made.folder)
    assert adapter_hash(found.modules) == adapter_hash(expert.modules)
    assert found.gates is not None  # they follow the adapter


def test_a_pickle_that_would_run_code_is_not_opened(bin_dir, tmp_path, one_line):
    ran = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return Path.touch, (ran,)

    for data in (pickle.dumps(Evil()), b"nonsense", b""):
        (bin_dir / PICKLE).write_bytes(data)
        with pytest.raises(ExpertFormatError, match=PICKLE) as info:
            convert_adapter(bin_dir, tmp_path / "out", read_pickle=True)
        one_line(info)
    torch.save({"x": Evil()}, bin_dir / PICKLE)
    with pytest.raises(ExpertFormatError, match="wants to run code"):
        convert_adapter(bin_dir, tmp_path / "out", read_pickle=True)
    assert not ran.exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("what", [[1], {"x": 1}, {1: torch.ones(2)}, {"x": torch.ones(2).int()}])
def test_pickles_that_are_no_adapter(what, bin_dir, tmp_path, one_line):
    torch.save(what, bin_dir / PICKLE)
    with pytest.raises(ExpertFormatError, match=PICKLE) as info:
        convert_adapter(bin_dir, tmp_path / "out", read_pickle=True)
    one_line(info)


def test_a_plain_lora_stays_what_it_is(expert_dir, expert, make_base, tmp_path):
    for base in (None, make_base("llama")):
        made = convert_adapter(expert_dir, tmp_path / f"out{base is None}", base=base)
        found = load_expert(made.folder)
        assert adapter_hash(found.modules) == adapter_hash(expert.modules) and found.gates


CONFIGS = {
    "LOKR": LoKrConfig(r=2, alpha=4, target_modules=["q_proj", "down_proj"], init_weights=False),
    "LOHA": LoHaConfig(r=2, alpha=4, target_modules=["q_proj", "down_proj"], init_weights=False),
    "VERA": VeraConfig(r=3, target_modules=["q_proj"], init_weights=False),
}


def other_dir(config, base, folder):
    tuned = get_peft_model(copy.deepcopy(base), config).eval()
    random = torch.Generator().manual_seed(1)
    for name, parameter in tuned.named_parameters():
        if "lok" in name or "hada" in name or "vera_lambda" in name:
            parameter.data = torch.randn(parameter.shape, generator=random) * 0.3
    tuned.save_pretrained(folder)
    return folder


@torch.no_grad()
@pytest.mark.parametrize("kind", CONFIGS)
def test_other_kinds_become_lora(kind, make_base, tmp_path):
    base = make_base("llama")
    folder = other_dir(CONFIGS[kind], base, tmp_path / "other")
    wanted = PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()(IDS).logits
    assert not torch.allclose(base(IDS).logits, wanted, atol=1e-3)
    made = convert_adapter(folder, tmp_path / "out", base=copy.deepcopy(base))
    assert made.was == kind and 0 < made.error < 1e-5
    route(base, ExpertPool.load([made.folder]), "arrow", top_k=1)
    torch.testing.assert_close(base(IDS).logits, wanted, rtol=1e-4, atol=1e-4)


def test_a_lower_rank_tells_its_error(make_base, tmp_path):
    base = make_base("llama")
    folder = other_dir(CONFIGS["LOKR"], base, tmp_path / "other")
    made = convert_adapter(folder, tmp_path / "out", base=base, rank=1)
    assert {lora.rank for lora in load_expert(made.folder).modules.values()} == {1}
    assert 0.01 < made.error < 1


def test_what_cannot_be_converted(make_base, tmp_path, expert_dir, edit_json, one_line):
    base = make_base("llama")
    rotation = OFTConfig(r=2, oft_block_size=0, target_modules=["q_proj"])
    oft = other_dir(rotation, base, tmp_path / "a")
    lokr = other_dir(CONFIGS["LOKR"], base, tmp_path / "b")
    for folder, model, error, said in (
        (oft, base, UnsupportedAdapterError, "PEFT does not make LoRA of this OFT adapter"),
        (lokr, None, ConfigError, "Pass --base"),
        (tmp_path / "nowhere", base, ExpertNotFoundError, "not a folder"),
        (lokr, make_base("gpt2"), UnsupportedAdapterError, "LOKR"),
    ):
        with pytest.raises(error, match=said) as info:
            convert_adapter(folder, tmp_path / "out", base=model)
        one_line(info)
        assert not (tmp_path / "out").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(ConfigError, match="no empty folder"):
        convert_adapter(expert_dir, tmp_path / "full")
    edit_json(expert_dir / "adapter_config.json", peft_type=None)
    with pytest.raises(ExpertFormatError, match="names no peft_type"):
        convert_adapter(expert_dir, tmp_path / "out")
