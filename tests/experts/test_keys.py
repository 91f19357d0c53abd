"""Keys as trainers leave them are read as what they are, or refused for what they are."""

import pytest
import torch
from safetensors.torch import load_file

from phatgoose.errors import ExpertFormatError
from phatgoose.experts import adapter_hash, load_expert
from phatgoose.experts.keys import PREFIX, plain_keys
from phatgoose.experts.lora import WEIGHTS_FILE, read_adapter

WEIGHT = ".weight"


def rename(folder, edit_tensors, change):
    edit_tensors(folder / WEIGHTS_FILE, lambda tensors: {change(k): v for k, v in tensors.items()})


@pytest.mark.parametrize(
    "change",
    [
        lambda key: key.replace(WEIGHT, ".default.weight"),
        lambda key: key.replace(WEIGHT, ".my-law_2.weight"),
        lambda key: key.replace(PREFIX, PREFIX + "_orig_mod."),
        lambda key: "_orig_mod." + key,
        lambda key: "module." + key,
        lambda key: "module._orig_mod.module." + key,
        lambda key: PREFIX + key,
        lambda key: PREFIX * 3 + key,
        lambda key: key.replace("layers.0.", "layers.0._checkpoint_wrapped_module."),
        lambda key: key.replace("layers.", "_fsdp_wrapped_module.layers."),
        lambda key: "module." + PREFIX + key.replace(WEIGHT, ".default.weight"),
    ],
)
def test_what_wrappers_add_is_taken_off(change, expert_dir, expert, edit_tensors):
    """Gates and all: it is the same adapter, by its hash."""
    before = set(load_file(expert_dir / WEIGHTS_FILE))
    rename(expert_dir, edit_tensors, change)
    assert set(load_file(expert_dir / WEIGHTS_FILE)) != before
    found = load_expert(expert_dir)
    assert adapter_hash(found.modules) == adapter_hash(expert.modules)
    assert found.gates is not None


@pytest.mark.parametrize(
    ("key", "plain"),
    [
        ("m.lora_A.weight", "m.lora_A.weight"),
        ("m.lora_A.law.weight", "m.lora_A.weight"),
        ("m.lora_B.law.bias", "m.lora_B.bias"),
        ("m.lora_B.bias", "m.lora_B.bias"),
        ("m.lora_embedding_A", "m.lora_embedding_A"),
        ("m.lora_embedding_A.law", "m.lora_embedding_A"),
        ("m.lora_magnitude_vector", "m.lora_magnitude_vector"),
        ("m.lora_magnitude_vector.weight", "m.lora_magnitude_vector"),
        ("m.lora_magnitude_vector.law.weight", "m.lora_magnitude_vector"),
        ("m.modules_to_save.law.weight", "m.weight"),
        ("m.base_layer.weight", "m.base_layer.weight"),
        ("m.weight", "m.weight"),
        ("lora_A.layers.lora_A.law.weight", "lora_A.layers.lora_A.weight"),
        ("module_list.module.x.lora_A.weight", "module_list.module.x.lora_A.weight"),
        ("m.original_module.weight", None),
    ],
)
def test_keys_one_by_one(key, plain):
    found = plain_keys({key: torch.ones(2, 2)}, "file")
    assert list(found) == ([] if plain is None else [plain])


def test_two_adapters_in_one_file(one_line):
    one = torch.ones(2, 2)
    for module, said in (("m", "are one tensor by two names"), ("n", "two adapters, a and b")):
        with pytest.raises(ExpertFormatError, match=said) as info:
            plain_keys({"m.lora_A.a.weight": one, f"{module}.lora_A.b.weight": one}, "file")
        one_line(info)


@pytest.mark.parametrize("shape", [(0,), (0, 4), (12,)])
@pytest.mark.parametrize("half", ["lora_A", "lora_B"])
def test_shards_that_were_not_gathered(half, shape, expert_dir, edit_tensors, one_line):
    def empty(tensors):
        key = next(key for key in tensors if half in key)
        tensors[key] = torch.zeros(shape)

    edit_tensors(expert_dir / WEIGHTS_FILE, empty)
    with pytest.raises(ExpertFormatError, match="ZeRO-3 or FSDP") as info:
        read_adapter(expert_dir)
    assert half in one_line(info)
