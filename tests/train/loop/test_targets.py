"""The loss with logits at labels only is the model's own loss, and its gradient."""

import pytest
import torch
from torch import nn

from phatgoose.tasks import IGNORED
from phatgoose.train.loop.targets import Targets, batch_losses, output_head, target_losses
from tests.tolerances import TOLERANCE, assert_near
from tests.train.toys import BASES, VOCABULARY, add_lora

NEAR = TOLERANCE[torch.float32].output


def batch(kind, *, rows=3, length=9, every=False):
    """Random tokens; some rows are short, one has a single label, labels have gaps."""
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(2, len(VOCABULARY), (rows, length), generator=draw)
    labels = torch.randint(2, len(VOCABULARY), (rows, length), generator=draw)
    mask = torch.ones_like(ids)
    if not every:
        mask[1, 5:] = 0
        labels[0, :6] = IGNORED
        labels[1, :] = IGNORED
        labels[1, 4] = 3
        labels[2, ::2] = IGNORED
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def model_of(kind):
    torch.manual_seed(0)
    return BASES[kind]().eval()


@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize("kind", BASES)
def test_the_mean_is_the_models_own_loss(kind, every):
    """With a LoRA, whose gradients are compared too."""
    model, given = add_lora(model_of(kind)), batch(kind, every=every)
    parameters = [p for p in model.parameters() if p.requires_grad]
    wanted = model(**given).loss
    found = batch_losses(model, given).mean()
    assert_near(found, wanted, NEAR)
    pairs = zip(
        torch.autograd.grad(found, parameters), torch.autograd.grad(wanted, parameters), strict=True
    )
    for gradient, reference in pairs:
        assert_near(gradient, reference, TOLERANCE[torch.float32].delta)


@pytest.mark.parametrize("kind", BASES)
def test_the_head_sees_the_labels_alone(kind):
    model, given, seen = model_of(kind), batch(kind), []
    head = output_head(model)
    handle = head.register_forward_hook(lambda _, __, logits: seen.append(tuple(logits.shape)))
    losses = batch_losses(model, given)
    handle.remove()
    labels = given["labels"] if kind == "t5" else given["labels"][:, 1:]
    count = int((labels != IGNORED).sum())
    assert seen == [(1, count, len(VOCABULARY))]
    assert losses.shape == (count,)
    assert not head._forward_pre_hooks, "and nothing is left on it"


def test_nothing_is_left_on_the_head_of_a_forward_that_failed():
    model = model_of("llama")
    with pytest.raises(IndexError):
        batch_losses(model, {**batch("llama"), "input_ids": torch.full((3, 9), 999)})
    assert not output_head(model)._forward_pre_hooks


def test_a_head_that_cannot_be_found_makes_all_logits(monkeypatch):
    model, given = model_of("llama"), batch("llama")
    wanted = batch_losses(model, given)
    monkeypatch.setattr(type(model), "get_output_embeddings", lambda self: None)
    assert_near(batch_losses(model, given), wanted, NEAR)


def test_the_whole_head_gives_the_same():
    model, given = model_of("llama"), batch("llama")
    targets = Targets.of(given.pop("labels"), seq2seq=False)
    assert_near(
        target_losses(model, given, targets, whole=True), target_losses(model, given, targets), NEAR
    )


def test_without_labels_there_are_no_losses():
    given = batch("llama")
    given["labels"].fill_(IGNORED)
    assert batch_losses(model_of("llama"), given).shape == (0,)


@pytest.mark.parametrize("kind", ["keys", "labels", "model", "loss"])
def test_another_loss_is_left_to_the_model(kind):
    """What weighs or moves labels in ways of its own is not computed here."""
    model, given = model_of("llama"), batch("llama")
    if kind == "keys":
        given["pixel_values"] = torch.zeros(1)
    elif kind == "labels":
        del given["labels"]
    elif kind == "model":
        model = nn.Linear(2, 2)
    else:
        model.loss_type = "ForMaskedLM"
    assert batch_losses(model, given) is None
