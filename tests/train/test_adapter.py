"""Training an adapter: it learns, and what is on disk is what gates are trained for."""

from math import log

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from phatgoose import load_expert, train_adapter, train_gates
from phatgoose.errors import ConfigError
from phatgoose.experts import adapter_hash
from phatgoose.tasks import Encoded, batches
from phatgoose.train import AdapterTraining
from phatgoose.train.gated_adapter import GatedAdapter
from tests.train.toys import ANIMALS, BASES, EOS, PAD, VOCABULARY


def rows():
    """What each animal says, twice."""
    ids = {word: number for number, word in enumerate(VOCABULARY)}
    return [
        Encoded([ids[animal], ids["says"]], [ids[sound], ids[sound], EOS])
        for animal, sound in ANIMALS.items()
    ]


def mean_loss(model, kind):
    """Nats per target token over the whole task."""
    batch = next(iter(batches(rows(), 4, pad=PAD, seq2seq=kind == "t5")))
    with torch.no_grad():
        return float(model.eval()(**batch).loss)


def train(kind, folder, progress=False, noise=0, **settings):
    torch.manual_seed(0)
    base = BASES[kind]()
    torch.manual_seed(noise)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    settings = {"steps": 60, "learning_rate": 2e-2, "batch_size": 4, **settings}
    model = train_adapter(
        base, rows(), folder, AdapterTraining(**settings), pad=PAD, progress=progress
    )
    for name, value in model.get_base_model().state_dict().items():
        if "lora_" not in name:
            assert torch.equal(value, before[name.replace(".base_layer", "")]), name
    return model


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_the_loss_falls_and_gates_follow(kind, tmp_path):
    model = train(kind, tmp_path)
    with model.disable_adapter():
        untrained = mean_loss(model, kind)
    assert untrained > log(4)
    assert mean_loss(model, kind) < untrained / 5
    data = batches(rows(), 4, pad=PAD, seq2seq=kind == "t5")
    gates = train_gates(model, data, steps=20, progress=False)
    assert gates.record.last_loss < gates.record.first_loss
    gates.save(tmp_path)
    assert set(load_expert(tmp_path).modules) == set(gates.vectors)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_model_keeps_what_is_on_disk(dtype, tmp_path):
    model = train("llama", tmp_path, save_dtype=dtype, rank=2, alpha=3, dropout=0.2)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {getattr(torch, dtype)}
    modules = GatedAdapter(model).modules()
    assert {m.a.dtype for m in modules.values()} == {torch.float32}
    assert {m.scale for m in modules.values()} == {1.5}
    assert adapter_hash(modules) == adapter_hash(load_expert(tmp_path).modules)
    rounded = all(torch.equal(m.a.bfloat16().float(), m.a) for m in modules.values())
    assert rounded == (dtype == "bfloat16")
    # What PEFT makes of the folder is the same model.
    batch = next(iter(batches(rows(), 4, pad=PAD)))
    wanted = model.eval()(**batch).logits
    loaded = PeftModel.from_pretrained(model.unload(), tmp_path).eval()
    assert torch.equal(loaded(**batch).logits, wanted)


def test_the_seed_decides(tmp_path):
    """Whatever random numbers were drawn before."""
    hashes = []
    for noise, seed in enumerate((1, 1, 2)):
        folder, settings = tmp_path / str(noise), {"steps": 5, "batch_size": 2}
        model = train("llama", folder, noise=noise, seed=seed, **settings)
        hashes.append(adapter_hash(GatedAdapter(model).modules()))
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize("progress", [False, True])
def test_nothing_is_printed_where_results_go(progress, tmp_path, capfd):
    """`phatgoose train --json` prints one line of JSON after it."""
    train("llama", tmp_path, steps=2, progress=progress)
    printed = capfd.readouterr()
    assert printed.out == ""
    assert ("train_loss" in printed.err) == progress


def test_targets_and_bfloat16_autocast(tmp_path):
    model = train("llama", tmp_path, steps=2, target_modules=["q_proj"], bf16=True)
    assert {name.rpartition(".")[2] for name in load_expert(tmp_path).modules} == {"q_proj"}
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rank", 0),
        ("alpha", 0.0),
        ("steps", 0),
        ("batch_size", 0),
        ("learning_rate", -1.0),
        ("warmup_ratio", 2.0),
        ("save_dtype", "float16"),
    ],
)
def test_settings_out_of_range(name, value):
    with pytest.raises(ConfigError, match=name) as caught:
        AdapterTraining(**{name: value})
    assert str(value) in str(caught.value) and "\n" not in str(caught.value)


def test_no_examples(tmp_path):
    with pytest.raises(ConfigError, match="no examples"):
        train_adapter(BASES["llama"](), [], tmp_path / "out", pad=PAD)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("field", "value"), [("dropout", 1.0), ("dropout", -0.1), ("seed", -1)])
def test_settings_that_would_fail_later_are_refused_at_once(field, value):
    with pytest.raises(ConfigError, match=f"^{field} must be .*, got {value}"):
        AdapterTraining(**{field: value})
