"""Gates after TRL's trainers: what they checkpoint, pack, mask, sample, and turn off on the way."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

import phatgoose
from phatgoose.errors import ConfigError, TrainingError
from phatgoose.experts import load_expert
from tests.train.toys import ANIMALS, llama, make_tokenizer, same

trl = pytest.importorskip("trl", reason="TRL is not installed")

LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
SETTINGS = {
    "max_steps": 3,
    "learning_rate": 5e-2,
    "per_device_train_batch_size": 2,
    "use_cpu": True,
    "bf16": False,
    "save_strategy": "no",
    "report_to": "none",
    "logging_strategy": "no",
    "disable_tqdm": True,
}
# {% generation %} is what tells an assistant's tokens, for a loss on them alone.
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}says "
    "{% generation %}{{ m.content }} </s>{% endgeneration %}"
    "{% else %}{{ m.content }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}says {% endif %}"
)
CHECKPOINTING = {
    "none": {"gradient_checkpointing": False},
    "plain": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    },
    "reentrant": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
}


def make(kind, folder, rows, config=None, **settings):
    """A trainer of TRL's, trained for a few steps."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    more = {}
    if kind == "GRPO":
        more["reward_funcs"] = settings.pop("reward")
    trainer = getattr(trl, f"{kind}Trainer")(
        llama(),
        args=getattr(trl, f"{kind}Config")(str(folder), **{**SETTINGS, **settings}),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=config or LORA,
        **more,
    )
    trainer.train()
    return trainer


def gates_of(trainer, **settings):
    return phatgoose.train_gates_from_trainer(trainer, **{"steps": 4, **settings}, progress=False)


def check(trainer, gates):
    """All gates are trained and on disk, and the trainer's model is as it was."""
    assert all(vector.any() for vector in gates.vectors.values())
    assert len(gates.vectors) == 14
    expert = load_expert(trainer.args.output_dir)
    assert same(expert.gates.vectors, gates.vectors)
    for name, parameter in trainer.model.named_parameters():
        if ".ref." not in name:
            assert parameter.requires_grad == ("lora_" in name), name
        assert parameter.grad is None or not parameter.grad.any()


def preferences():
    sounds = list(ANIMALS.values())
    return [
        {"prompt": f"{animal} says ", "chosen": f"{sound} loud", "rejected": f"{other} loud"}
        for animal, sound, other in zip(ANIMALS, sounds, sounds[1:] + sounds[:1], strict=True)
    ]


def completions():
    return [{"prompt": f"{a} says", "completion": f" {s} loud"} for a, s in ANIMALS.items()]


def chats():
    return [
        {"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": f"{s} {s}"}]}
        for a, s in ANIMALS.items()
    ]


@pytest.fixture(scope="module")
def dpo(tmp_path_factory):
    """dpo(way): gates after DPO with this way of checkpointing; each is trained once."""
    done = {}

    def train(way):
        if way not in done:
            folder = tmp_path_factory.mktemp(way)
            trainer = make("DPO", folder, preferences(), **CHECKPOINTING[way])
            done[way] = trainer, gates_of(trainer)
        return done[way]

    return train


@pytest.mark.parametrize("way", CHECKPOINTING)
def test_dpo_s_reference_turns_the_adapter_off_and_on(way, dpo):
    trainer, gates = dpo(way)
    check(trainer, gates)
    assert gates.last_loss < gates.first_loss


@pytest.mark.parametrize("way", ["plain", "reentrant"])
def test_checkpointing_changes_no_gate(way, dpo):
    gates, wanted = dpo(way)[1], dpo("none")[1]
    for name, vector in gates.vectors.items():
        torch.testing.assert_close(vector, wanted.vectors[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("rows", "settings"),
    [
        (completions, CHECKPOINTING["reentrant"]),
        (completions, {"completion_only_loss": True}),
        (completions, {"packing": True, "max_length": 12}),
        (chats, {"assistant_only_loss": True}),
        (chats, {"packing": True, "max_length": 12, "packing_strategy": "wrapped"}),
    ],
    ids=["reentrant", "completion-only", "packed", "assistant-only", "wrapped"],
)
def test_sft(rows, settings, tmp_path):
    trainer = make("SFT", tmp_path, rows(), **settings)
    gates = gates_of(trainer)
    check(trainer, gates)
    assert gates.last_loss < gates.first_loss


def reward(completions, **_):
    """For goose's word, and a little for length, so that answers differ."""
    return [float("honk" in text) + 0.1 * len(set(text.split())) for text in completions]


@pytest.mark.parametrize("accumulated", [1, 2])
def test_grpo_samples_answers_with_the_gates(accumulated, tmp_path):
    rows = [{"prompt": f"{animal} says"} for animal in ANIMALS]
    trainer = make(
        "GRPO",
        tmp_path,
        rows,
        reward=reward,
        num_generations=2,
        max_completion_length=4,
        gradient_accumulation_steps=accumulated,
    )
    seen = []
    sample = trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda batch: seen.append(batch) or sample(batch)
    step = trainer._step
    gates = gates_of(trainer)
    check(trainer, gates)
    assert len(seen) == 4, "answers are sampled once for all micro-batches of a step"
    assert gates.examples > 0
    assert trainer._step == step, "the trainer counts on from where it was"


def test_what_gates_cannot_be_saved_beside_is_refused_before_they_are_trained(tmp_path):
    """A trainer that saves its adapter in another dtype, as DeepSpeed may."""
    trainer = make("SFT", tmp_path, completions())
    save = trainer.save_model

    def rounded(folder):
        trainer.model.to(torch.bfloat16)
        save(folder)
        trainer.model.to(torch.float32)

    trainer.save_model, steps = rounded, []
    trainer.compute_loss = lambda *_, **__: steps.append(1)
    with pytest.raises(phatgoose.errors.IncompatibleExpertError, match="in another dtype"):
        gates_of(trainer)
    assert not steps


def test_gates_that_cannot_be_saved_are_kept(tmp_path, monkeypatch):
    """The disk fills up, or somebody writes another adapter there meanwhile."""
    trainer = make("SFT", tmp_path / "out", completions())
    wanted = gates_of(trainer, save=False)

    def fails(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("phatgoose.experts.Gates.save", fails)
    with pytest.raises(TrainingError, match="No space left.*put the file beside") as caught:
        gates_of(trainer)
    assert str(tmp_path / "out-gates") in str(caught.value)
    assert same(phatgoose.Gates.load(tmp_path / "out-gates").vectors, wanted.vectors)


def test_a_trainer_whose_loss_is_made_in_its_own_step(tmp_path):
    trainer = make("SFT", tmp_path, completions())

    def compute_loss(*_, **__):
        raise KeyError("old_logps")

    trainer.compute_loss = compute_loss
    with pytest.raises(TrainingError, match="SFTTrainer: its loss .*KeyError: 'old_logps'"):
        gates_of(trainer)


def test_a_trainer_without_data(tmp_path):
    trainer = make("SFT", tmp_path, completions())
    trainer.train_dataset = None
    with pytest.raises(ConfigError, match="has no train_dataset"):
        gates_of(trainer)
