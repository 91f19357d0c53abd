"""verify_expert: each fault gets its own plain sentence."""

from dataclasses import replace

import pytest
import torch

from phatgoose.experts import Gates, adapter_hash, load_expert, verify_expert
from phatgoose.experts.bases import BaseWarning
from phatgoose.experts.kinds import KINDS
from phatgoose.experts.lora import WEIGHTS_FILE, read_adapter
from phatgoose.experts.verify import SMALLEST_GATE, check_modules, check_numbers


@pytest.fixture
def spoil(save_adapter, make_gates, edit_tensors):
    """spoil(change): an expert whose adapter went through `change` before its gates were made."""

    def make(change):
        folder = save_adapter()
        edit_tensors(folder / WEIGHTS_FILE, change)
        make_gates(folder).save(folder)
        return folder

    return make


def fill(word, value, entry=...):
    def change(tensors):
        tensors[next(key for key in sorted(tensors) if word in key)][entry] = value

    return change


def test_a_sound_expert_gets_no_sentence(expert_dir, make_base):
    assert verify_expert(expert_dir) == []
    assert verify_expert(str(expert_dir), make_base("llama")) == []


@pytest.mark.parametrize("half", ["lora_A", "lora_B"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_bad_number_in_the_adapter(half, value, expert_dir, edit_tensors):
    edit_tensors(expert_dir / WEIGHTS_FILE, fill(half, value, entry=(0, 1)))
    (sentence,) = verify_expert(expert_dir)
    assert sentence.startswith(f"{expert_dir / WEIGHTS_FILE}: ")
    assert f"{half} of model.layers.0.mlp.down_proj holds NaN or infinite values" in sentence


def test_one_bad_number_in_a_gate(expert_dir):
    gates = Gates.load(expert_dir)
    name = sorted(gates.vectors)[2]
    gates.vectors[name][3] = float("nan")
    gates.save(expert_dir)
    (sentence,) = verify_expert(expert_dir)
    assert f"the gates at {name} hold NaN or infinite values" in sentence


def test_one_bad_number_in_a_signature(complete_dir):
    found = load_expert(complete_dir).signatures["average_activation"]
    name = sorted(found.vectors)[2]
    found.vectors[name][3] = float("inf")
    found.save(complete_dir)
    (sentence,) = verify_expert(complete_dir)
    assert f"average activation at {name} hold NaN or infinite values" in sentence


def test_every_signature_of_another_base(complete_dir, make_base):
    found = load_expert(complete_dir).signatures
    for signatures in found.values():
        replace(signatures, base=replace(signatures.base, shape="another")).save(complete_dir)
    sentences = verify_expert(complete_dir, make_base("llama"))
    assert [sentence.split(": ", 2)[1] for sentence in sentences] == [
        f"its {KINDS[kind].words} were made on another base" for kind in found
    ]


def test_near_zero_gates_are_counted(expert_dir):
    gates = Gates.load(expert_dir)
    names = sorted(gates.vectors)
    for name in names:
        gates.vectors[name].fill_(1.01 * SMALLEST_GATE)  # just large enough
    gates.save(expert_dir)
    assert verify_expert(expert_dir) == []
    gates.vectors[names[1]].zero_()
    gates.vectors[names[4]].fill_(-SMALLEST_GATE / 2)
    gates.save(expert_dir)
    (sentence,) = verify_expert(expert_dir)
    assert f"2 of {len(names)} gates are still (near) zero, {names[1]} first" in sentence


def test_another_base_of_the_same_sizes(save_adapter, make_gates, make_base):
    folder = save_adapter()
    gates = make_gates(folder)
    base = replace(gates.record.base, name="owner/one", tokenizer="t" * 64)
    replace(gates, record=replace(gates.record, base=base)).save(folder)
    assert verify_expert(folder, make_base("llama")) == []
    model = make_base("llama")
    model.config._name_or_path = "owner/two"
    with pytest.warns(BaseWarning, match="owner/one, and this model is owner/two"):
        assert verify_expert(folder, model) == []
    assert verify_expert(folder, model, same_base=True) == []  # and no warning


def test_a_base_of_other_sizes(expert_dir, expert, make_base):
    sentences = verify_expert(expert_dir, make_base("llama", hidden=16))
    assert len(sentences) == len(expert.modules) + 1
    assert any(
        "model.layers.0.mlp.down_proj maps 20 to 12 features, the base maps 20 to 16" in sentence
        for sentence in sentences
    )
    assert "another base: the models differ in type or in the sizes" in sentences[-1]


def test_modules_the_base_does_not_have(expert_dir, expert, make_base):
    sentences = verify_expert(expert_dir, make_base("gpt2"))
    assert len(sentences) == len(expert.modules) + 1
    assert sum("is no linear layer of the base model" in sentence for sentence in sentences) == 6
    assert all(any(f"adapts {name}," in s for s in sentences) for name in expert.modules)


def test_no_gates(save_adapter):
    folder = save_adapter()
    (sentence,) = verify_expert(folder)
    assert "has no gates" in sentence and f"phatgoose gate {folder}" in sentence


def test_untrained(spoil, edit_tensors, save_adapter, make_gates):
    def zero_all(tensors):
        for key in tensors:
            if "lora_B" in key:
                tensors[key].zero_()

    (sentence,) = verify_expert(spoil(zero_all))
    assert "every lora_B is zero" in sentence


def test_one_trained_module_is_enough(spoil):
    def zero_most(tensors):
        for key in sorted(tensors)[:-1]:
            if "lora_B" in key:
                tensors[key].zero_()

    assert verify_expert(spoil(zero_most)) == []


def test_an_unreadable_expert_is_one_sentence(expert_dir, tmp_path):
    (expert_dir / KINDS["gates"].file).write_bytes(b"")
    (sentence,) = verify_expert(expert_dir)
    assert KINDS["gates"].file in sentence and "\n" not in sentence
    (sentence,) = verify_expert(tmp_path / "nowhere")
    assert "not a folder" in sentence


def test_several_faults_get_a_sentence_each(save_adapter, edit_tensors):
    folder = save_adapter()
    edit_tensors(folder / WEIGHTS_FILE, lambda ts: {k: t * ("lora_A" in k) for k, t in ts.items()})
    untrained, no_gates = verify_expert(folder)
    assert "every lora_B is zero" in untrained and "no gates" in no_gates


def test_the_parts_agree_with_the_whole(expert, make_base):
    assert list(check_numbers(expert)) == []
    assert list(check_modules(expert, make_base("llama"))) == []
    name = sorted(expert.modules)[0]
    bad = replace(expert.modules[name], a=torch.full((3, 20), float("inf")))
    (sentence,) = check_numbers(replace(expert, modules={**expert.modules, name: bad}))
    assert sentence.startswith(f"{expert.name}: lora_A of {name}")


def test_hash_and_reader_agree(expert_dir, expert):
    assert adapter_hash(read_adapter(expert_dir)[1]) == expert.gates.record.adapter
