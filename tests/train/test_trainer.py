"""After a Trainer, one line adds gates: in this process, from disk in another, and for PEFT."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

import phatgoose
from phatgoose import Gates
from phatgoose.errors import ConfigError, IncompatibleExpertError, UntrainedAdapterError
from phatgoose.experts.lora import read_adapter
from tests.tolerances import TOLERANCE, assert_near
from tests.train import reloaded
from tests.train.toys import ANIMALS, EOS, joined, llama, make_tokenizer, same

ROOT = Path(__file__).parents[2]
LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
SETTINGS = {
    "max_steps": 60,
    "learning_rate": 1e-2,
    "per_device_train_batch_size": 4,
    "use_cpu": True,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}


def base():
    torch.manual_seed(0)
    return llama()


def rows():
    """What each animal says, in token ids."""
    tokenizer = make_tokenizer()
    prompts = tokenizer([f"{animal} says" for animal in ANIMALS])["input_ids"]
    answers = tokenizer([f"{sound} {sound} loud" for sound in ANIMALS.values()])["input_ids"]
    return [
        {"input_ids": [*prompt, *answer, EOS], "labels": [-100] * len(prompt) + [*answer, EOS]}
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def plain_trainer(folder, **settings):
    """transformers.Trainer with a PeftModel."""
    return Trainer(
        get_peft_model(base(), LORA),
        TrainingArguments(str(folder), **{**SETTINGS, **settings}),
        train_dataset=rows(),
        processing_class=make_tokenizer(),
    )


def sft_trainer(folder, data, **settings):
    """TRL's, which in bf16 and with gradient checkpointing, as is its default."""
    return SFTTrainer(
        base(),
        args=SFTConfig(str(folder), **{**SETTINGS, **settings}),
        train_dataset=Dataset.from_list(data),
        processing_class=make_tokenizer(),
        peft_config=LORA,
    )


def answers():
    return [
        {"prompt": f"{animal} says", "completion": f" {sound} {sound} loud"}
        for animal, sound in ANIMALS.items()
    ]


def texts():
    return [{"text": row["prompt"] + row["completion"]} for row in answers()]


TRAINERS: dict[str, Callable[[Path], Any]] = {
    "trainer": plain_trainer,
    "trainer-bf16": lambda folder: plain_trainer(folder, bf16=True),
    "sft-completion": lambda folder: sft_trainer(folder, answers()),
    "sft-text": lambda folder: sft_trainer(
        folder, texts(), bf16=False, gradient_checkpointing=False
    ),
}


@dataclass
class Trained:
    """A trainer before and after its gates."""

    folder: Path
    trainer: Any
    gates: Gates
    before: list[float]  # logits of its PeftModel
    after: list[float]
    text: list[str]  # what its PeftModel says


@pytest.fixture(scope="module")
def prompts():
    encoded = make_tokenizer()([f"{animal} says" for animal in ANIMALS], return_tensors="pt")
    return {key: encoded[key] for key in ("input_ids", "attention_mask")}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, prompts):
    """trained(name): a trainer with gates, by its name in TRAINERS; each is trained once."""
    root, done = tmp_path_factory.mktemp("trained"), {}

    def train(name):
        if name not in done:
            trainer = TRAINERS[name](root / name)
            trainer.train()
            # Without accelerate's wrapper the forward is in fp32, as it is for whoever reloads.
            model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).eval()
            before = reloaded.logits(model, prompts)
            gates = phatgoose.train_gates_from_trainer(trainer, steps=10, progress=False)
            done[name] = Trained(
                folder=root / name,
                trainer=trainer,
                gates=gates,
                before=before,
                after=reloaded.logits(model, prompts),
                text=reloaded.answer(model, make_tokenizer(), prompts),
            )
        return done[name]

    return train


@pytest.fixture(scope="module")
def fresh(trained, tmp_path_factory, prompts):
    """What a fresh process says of each folder."""
    folder = tmp_path_factory.mktemp("base")
    base().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    save_file(prompts, folder / "prompts")
    experts = {name: str(trained(name).folder) for name in TRAINERS}
    source = str(Path(phatgoose.__file__).parents[1])
    run = subprocess.run(
        [
            *(sys.executable, "-m", reloaded.__name__, str(folder), str(folder / "prompts")),
            *experts.values(),
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join((source, str(ROOT)))},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=180,
    )
    report = json.loads(run.stdout)
    return {name: report[folder] for name, folder in experts.items()}


@pytest.mark.parametrize("name", TRAINERS)
def test_gates_are_trained(name, trained):
    gates = trained(name).gates
    assert {vector.dtype for vector in gates.vectors.values()} == {torch.float32}
    assert all(vector.any() for vector in gates.vectors.values())
    found = joined(gates.vectors)
    assert not torch.equal(found.bfloat16().float(), found)
    record = gates.record
    assert record.last_loss < record.first_loss
    assert (record.steps, record.examples) == (10, 40)
    assert record.training["seed"] == trained(name).trainer.args.seed
    assert record.base.tokenizer is not None


@pytest.mark.parametrize("name", TRAINERS)
def test_the_trainer_s_model_is_as_before(name, trained):
    result = trained(name)
    assert result.after == result.before
    for parameter_name, parameter in result.trainer.model.named_parameters():
        assert parameter.requires_grad == ("lora_" in parameter_name)


@pytest.mark.parametrize("name", TRAINERS)
def test_it_learnt_its_task(name, trained):
    assert trained(name).text == [f"{sound} {sound} loud </s>" for sound in ANIMALS.values()]


@pytest.mark.parametrize("name", TRAINERS)
def test_adapter_and_gates_are_on_disk(name, trained):
    result = trained(name)
    expert = phatgoose.load_expert(result.folder)
    assert same(dict(expert.gates.vectors), dict(result.gates.vectors))
    assert expert.gates.record == result.gates.record
    assert phatgoose.verify_expert(result.folder, base()) == []


@pytest.mark.parametrize("name", TRAINERS)
def test_a_fresh_process_routes_to_the_same_text(name, trained, fresh):
    result, about = trained(name), fresh[name]
    assert about["sites"] == sorted(result.gates.vectors)
    near = TOLERANCE[torch.float32].output
    assert_near(torch.tensor(about["float32 routed"]), torch.tensor(result.before), near)
    assert about["float32 routed text"] == result.text
    assert about["float32 after"] == about["float32 before"]


@pytest.mark.parametrize("name", TRAINERS)
def test_a_fresh_process_with_the_base_in_bf16(name, trained, fresh):
    about, near = fresh[name], 3 * TOLERANCE[torch.bfloat16].output  # two layers, all rounded
    routed = torch.tensor(about["bfloat16 routed"])
    assert_near(routed, torch.tensor(about["bfloat16 peft"]), near)
    assert_near(routed, torch.tensor(trained(name).before), near)
    assert about["bfloat16 routed text"] == trained(name).text


@pytest.mark.parametrize("name", TRAINERS)
def test_peft_loads_the_folder_as_if_there_were_no_gates(name, trained, fresh):
    result, about = trained(name), fresh[name]
    near = TOLERANCE[torch.float32].output
    assert_near(torch.tensor(about["float32 peft"]), torch.tensor(result.before), near)
    assert about["float32 peft text"] == result.text
    assert about["bfloat16 peft text"] == result.text


def test_experts_of_different_trainers_share_a_pool(fresh):
    for about in fresh.values():
        pool = torch.tensor(about["pool"])
        assert pool.isfinite().all()
        assert not torch.allclose(pool, torch.tensor(about["float32 before"]), rtol=0.1)


def test_gates_are_not_saved_beside_another_adapter(trained):
    here, other = trained("trainer"), trained("sft-text")
    before = {path.name: path.read_bytes() for path in other.folder.iterdir() if path.is_file()}
    with pytest.raises(IncompatibleExpertError, match="made for adapter"):
        here.gates.save(other.folder)
    after = {path.name: path.read_bytes() for path in other.folder.iterdir() if path.is_file()}
    assert after == before


def test_the_folder_and_whether_to_save(trained, tmp_path):
    trainer = trained("trainer").trainer
    train = phatgoose.train_gates_from_trainer
    gates = train(trainer, output_dir=tmp_path / "new", steps=2, progress=False)
    assert same(dict(phatgoose.load_expert(tmp_path / "new").gates.vectors), dict(gates.vectors))
    before = (trained("trainer").folder / "phatgoose_gates.safetensors").read_bytes()
    again = train(trainer, save=False, steps=2, progress=False)
    assert same(again.vectors, gates.vectors)
    assert (trained("trainer").folder / "phatgoose_gates.safetensors").read_bytes() == before


def test_reloaded_in_bf16_and_gated_again(trained):
    """Adapters come back in fp32, so these gates too belong to what is on disk."""
    result = trained("trainer")
    model = PeftModel.from_pretrained(base().bfloat16(), result.folder)
    batch = {key: torch.tensor([row[key] for row in rows()]) for key in rows()[0]}
    gates = phatgoose.train_gates(model, [batch], steps=10, progress=False)
    assert {vector.dtype for vector in gates.vectors.values()} == {torch.float32}
    assert gates.record.adapter == result.gates.record.adapter
    near = torch.cosine_similarity(joined(gates.vectors), joined(result.gates.vectors), dim=0)
    assert near > 0.9


def test_a_bf16_adapter_is_gated_as_it_is_on_disk(tmp_path):
    """Cast to bf16 after training: what is saved is what was gated."""
    trainer = plain_trainer(tmp_path, max_steps=5)
    trainer.train()
    trainer.model.to(torch.bfloat16)
    phatgoose.train_gates_from_trainer(trainer, steps=2, progress=False)
    _, modules = read_adapter(tmp_path)
    assert {module.a.dtype for module in modules.values()} == {torch.bfloat16}
    assert phatgoose.load_expert(tmp_path).gates is not None


@pytest.fixture
def one_row_a_batch(tmp_path):
    """A trainer whose gates depend on the order of its rows."""
    settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "seed": 9}
    trainer = plain_trainer(tmp_path, max_steps=3, **settings)
    trainer.train()
    return trainer


def gates_of(trainer, **settings):
    return phatgoose.train_gates_from_trainer(
        trainer, save=False, steps=3, progress=False, **settings
    )


def test_the_seed_alone_decides(one_row_a_batch):
    """Whatever random numbers were drawn between training and gates."""
    found = []
    for seed, noise in ((1, 0), (1, 5), (2, 0)):
        torch.manual_seed(noise)
        found.append(gates_of(one_row_a_batch, seed=seed))
        assert torch.initial_seed() == noise
    assert same(found[0].vectors, found[1].vectors)
    assert not same(found[0].vectors, found[2].vectors)


def test_the_trainer_s_own_settings_are_the_defaults(one_row_a_batch):
    gates = gates_of(one_row_a_batch)
    assert gates.record.training["gradient_accumulation_steps"] == 2
    assert gates.record.training["seed"] == 9
    assert gates.record.examples == 3 * 2
    assert same(gates.vectors, gates_of(one_row_a_batch, seed=9).vectors)
    assert gates_of(one_row_a_batch, gradient_accumulation_steps=1).record.examples == 3


def test_the_trainer_s_own_loss_is_used(tmp_path):
    """A Trainer with its own loss: half the usual one."""

    class Half(Trainer):
        def compute_loss(self, model, inputs, *arguments, **settings):
            return model(**inputs).loss / 2

    losses = []
    for kind in (Trainer, Half):
        trainer = plain_trainer(tmp_path, max_steps=2)
        trainer.__class__ = kind
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.data.fill_(0.05)
        gates = phatgoose.train_gates_from_trainer(trainer, save=False, steps=1, progress=False)
        losses.append(gates.record.first_loss)
    assert losses[1] == pytest.approx(losses[0] / 2, rel=1e-5)


def test_a_processor_stands_for_its_tokenizer(tmp_path, trained):
    """Multimodal processors hold a tokenizer, feature extractors none."""

    class Processor:
        tokenizer = make_tokenizer()

    trainer = trained("trainer").trainer
    before, found = trainer.processing_class, {}
    try:
        for name, processing in {"both": Processor(), "none": None, "other": object()}.items():
            trainer.processing_class = processing
            gates = phatgoose.train_gates_from_trainer(trainer, save=False, steps=1, progress=False)
            found[name] = gates.record.base.tokenizer
    finally:
        trainer.processing_class = before
    assert found["both"] == trained("trainer").gates.record.base.tokenizer
    assert found["none"] is None and found["other"] is None


def test_refuses_a_model_without_adapter(tmp_path):
    trainer = Trainer(base(), TrainingArguments(str(tmp_path), use_cpu=True), train_dataset=rows())
    with pytest.raises(ConfigError, match="not a PeftModel") as caught:
        phatgoose.train_gates_from_trainer(trainer)
    assert "\n" not in str(caught.value)


def test_refuses_before_training(tmp_path):
    trainer = plain_trainer(tmp_path)
    with pytest.raises(UntrainedAdapterError, match="lora_B"):
        phatgoose.train_gates_from_trainer(trainer, steps=1, progress=False)
    assert not (tmp_path / "adapter_config.json").exists()
