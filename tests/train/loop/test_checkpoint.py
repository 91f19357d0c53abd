"""Going on after an interrupt: the same gates, and never from another run's progress."""

import pytest
import torch
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from phatgoose import train_gates
from phatgoose.errors import ConfigError, ExpertFormatError
from phatgoose.train.gates import model_loss
from tests.train.toys import Interrupted, PowerCut, make, make_batch, make_batches, make_rows, same


def train(batches, *, model=None, steps=16, **settings):
    return train_gates(model or make(), batches, steps=steps, progress=False, **settings)


class Never:
    """Batches that must not be asked for."""

    def __iter__(self):
        raise AssertionError("no batch is needed")


@pytest.mark.parametrize("micro", [1, 3])
def test_an_interrupted_run_ends_with_the_same_gates(tmp_path, micro):
    """Interrupted at step 13; the checkpoint is of step 10, and the order is random."""
    settings = {"gradient_accumulation_steps": micro, "seed": 4}
    rows, checkpoint = make_rows(24), tmp_path / "deep" / "gates.ckpt"

    def batches():
        return DataLoader(rows, batch_size=2, shuffle=True)

    wanted = train(batches(), **settings)
    interrupted = Interrupted(batches(), after=12 * micro)
    with pytest.raises(PowerCut):
        train(interrupted, checkpoint=checkpoint, **settings)
    torch.manual_seed(99)
    seen = []

    def loss(model, batch):
        seen.append(batch)
        return model_loss(model, batch)

    found = train(batches(), checkpoint=checkpoint, loss=loss, **settings)
    assert len(seen) == 6 * micro, "it went on from step 10"
    assert same(found.vectors, wanted.vectors)
    assert found.record == wanted.record


def test_two_interrupts(tmp_path):
    checkpoint, batches = tmp_path / "gates.ckpt", make_batches(7)
    wanted = train(batches, steps=31)
    for after in (12, 25):
        with pytest.raises(PowerCut):
            train(Interrupted(batches * 5, after=after), steps=31, checkpoint=checkpoint)
    assert same(train(batches, steps=31, checkpoint=checkpoint).vectors, wanted.vectors)


def test_a_finished_run_returns_at_once(tmp_path):
    checkpoint = str(tmp_path / "gates.ckpt")
    wanted = train(make_batches(3), checkpoint=checkpoint)
    found = train(Never(), checkpoint=checkpoint)
    assert same(found.vectors, wanted.vectors)
    assert found.record == wanted.record


def test_an_unused_module_can_be_saved_too(tmp_path):
    """T5's decoder has no part in this loss, so its gates have no gradient."""

    def loss(model, batch):
        return model.get_encoder()(batch["input_ids"])[0].pow(2).mean()

    model, batches = make("t5"), [make_batch("t5")]
    settings = {"model": model, "loss": loss, "steps": 12}
    wanted = train(batches, **settings)
    with pytest.raises(PowerCut):
        train(Interrupted(batches * 12, 11), checkpoint=tmp_path / "c", **settings)
    assert same(train(batches, checkpoint=tmp_path / "c", **settings).vectors, wanted.vectors)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "seed"),
        ({"learning_rate": 1e-3}, "learning_rate"),
        ({"steps": 17}, "steps"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps"),
        ({"warmup_ratio": 0.1}, "warmup_ratio"),
        ({"max_grad_norm": 2.0}, "max_grad_norm"),
        ({"autocast": torch.bfloat16}, "autocast"),
        ({"model": "other seed"}, "adapter"),
        ({"model": "other scale"}, "adapter"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, change, named):
    others = {"other seed": make(lora_alpha=8, seed=2), "other scale": make(lora_alpha=16)}
    checkpoint = tmp_path / "gates.ckpt"
    others["other seed"].get_base_model().model.layers[0].mlp.down_proj.lora_A.default.weight.data[
        0, 0
    ] += 1
    train(make_batches(3), checkpoint=checkpoint)
    before = checkpoint.read_bytes()
    change = {key: others[value] if key == "model" else value for key, value in change.items()}
    with pytest.raises(ConfigError, match=named) as caught:
        train(make_batches(3), checkpoint=checkpoint, **change)
    assert str(checkpoint) in str(caught.value) and "\n" not in str(caught.value)
    assert checkpoint.read_bytes() == before


def test_a_file_that_is_no_checkpoint(tmp_path):
    path = tmp_path / "gates.ckpt"
    path.write_bytes(b"half a file")
    with pytest.raises(ExpertFormatError, match=r"gates\.ckpt"):
        train(make_batches(3), checkpoint=path)
    save_file({"x": torch.zeros(3)}, path)
    with pytest.raises(ConfigError, match=r"gates\.ckpt"):
        train(make_batches(3), checkpoint=path)


def test_an_interrupt_while_writing_leaves_the_file_before(tmp_path, monkeypatch):
    """The second checkpoint cannot be put in place; the first one still serves."""
    import os

    checkpoint, batches = tmp_path / "gates.ckpt", make_batches(3)
    wanted = train(batches, steps=25)
    replace, calls = os.replace, []

    def failing(*paths):
        calls.append(paths)
        if len(calls) == 2:
            raise OSError("no space left")
        replace(*paths)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing)
        with pytest.raises(OSError, match="no space left"):
            train(batches, steps=25, checkpoint=checkpoint)
    assert [path.name for path in tmp_path.iterdir()] == ["gates.ckpt"]
    assert same(train(batches, steps=25, checkpoint=checkpoint).vectors, wanted.vectors)
