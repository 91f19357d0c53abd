"""Tiny random bases, and adapters that PEFT itself saved for them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from phatgoose.experts import (
    Expert,
    GateRecord,
    Gates,
    adapter_hash,
    identify_base,
    load_expert,
)
from phatgoose.experts.lora import read_adapter
from phatgoose.experts.signatures import KINDS, Signatures


def llama(hidden: int = 12) -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=20,
            hidden_size=hidden,
            intermediate_size=20,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
    )


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=12, n_layer=2, n_head=2, n_inner=20))


def t5(gated: bool = True, width: int = 12) -> nn.Module:
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=20,
            d_model=width,
            d_kv=5,
            d_ff=20,
            num_layers=2,
            num_decoder_layers=1,
            num_heads=2,
            feed_forward_proj="gated-gelu" if gated else "relu",
            tie_word_embeddings=False,
        )
    )


# For each base: how to make it, and what to adapt. GPT-2's layers are Conv1D.
BASES: dict[str, tuple[Callable[..., nn.Module], dict[str, Any]]] = {
    "llama": (llama, {"target_modules": ["q_proj", "k_proj", "down_proj"]}),
    "gpt2": (gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "t5": (t5, {"target_modules": ["q", "wi_0", "wo"], "task_type": "SEQ_2_SEQ_LM"}),
}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def make_base() -> Callable[..., nn.Module]:
    """make_base("llama", hidden=16): a tiny random model."""
    return lambda kind, **sizes: BASES[kind][0](**sizes)


@pytest.fixture
def peft_model() -> Callable[..., nn.Module]:
    """peft_model("llama", r=3, ...): a tiny model with a random LoRA, nothing zero in it."""

    def make(kind: str = "llama", **settings: Any) -> nn.Module:
        build, defaults = BASES[kind]
        config = LoraConfig(**{"r": 3, "lora_alpha": 5, **defaults, **settings})
        model = get_peft_model(build(), config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("lora_B.default.weight"):
                    parameter.normal_()
        return model.eval()

    return make


@pytest.fixture
def save_adapter(peft_model: Callable[..., nn.Module], tmp_path: Path) -> Callable[..., Path]:
    """save_adapter("llama", r=3, ...): the folder PEFT writes for such a model."""

    def save(kind: str = "llama", folder: str = "adapter", **settings: Any) -> Path:
        peft_model(kind, **settings).save_pretrained(tmp_path / folder)
        return tmp_path / folder

    return save


@pytest.fixture
def make_gates() -> Callable[..., Gates]:
    """make_gates(folder, base): random gates for the adapter in the folder."""

    def make(folder: Path, base: nn.Module | None = None, **record: Any) -> Gates:
        _, modules = read_adapter(folder)
        return Gates(
            {name: torch.randn(module.in_features) for name, module in modules.items()},
            GateRecord(identify_base(base or llama()), adapter_hash(modules), **record),
        )

    return make


@pytest.fixture
def expert_dir(save_adapter: Callable[..., Path], make_gates: Callable[..., Gates]) -> Path:
    """A complete expert of the tiny llama."""
    folder = save_adapter()
    make_gates(folder, steps=100, first_loss=2.5, last_loss=1.25).save(folder)
    return folder


@pytest.fixture
def complete_dir(expert_dir: Path, tmp_path: Path) -> Path:
    """An expert that has every kind of signature beside its gates."""
    folder = Path(shutil.copytree(expert_dir, tmp_path / "complete"))
    _, modules = read_adapter(folder)
    of_modules = {name: torch.randn(module.in_features) for name, module in modules.items()}
    for kind in KINDS:
        if kind != "gates":
            vectors = of_modules if kind != "prompt_mean" else {next(iter(modules)): torch.ones(12)}
            made = Signatures(
                kind, vectors, identify_base(llama()), adapter_hash(modules), examples=3, tokens=9
            )
            made.save(folder)
    return folder


@pytest.fixture
def expert(expert_dir: Path) -> Expert:
    return load_expert(expert_dir)


@pytest.fixture
def edit_json() -> Callable[..., None]:
    """edit_json(path, field=value, ...): change fields of a JSON file; None stays a value."""

    def edit(path: Path, **fields: Any) -> None:
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return edit


@pytest.fixture
def edit_tensors() -> Callable[..., None]:
    """edit_tensors(path, function): rewrite a safetensors file through a function of its dict."""

    def edit(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
        tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
        changed = change(tensors)
        save_file(tensors if changed is None else changed, path, metadata={"format": "pt"})

    return edit


@pytest.fixture
def one_line() -> Callable[[pytest.ExceptionInfo[Exception]], str]:
    """The message of a raised error, after checking that it is one line."""

    def message(info: pytest.ExceptionInfo[Exception]) -> str:
        text = str(info.value)
        assert text and "\n" not in text
        return text

    return message
