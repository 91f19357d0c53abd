"""Tiny random bases with LoRA adapters that look trained, batches for them, and a toy task."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from phatgoose.experts import LoraModule
from phatgoose.train.gated_adapter import GatedAdapter

VOCABULARY = ["<pad>", "</s>", "<unk>", *"cat dog cow hen says meow woof moo cluck loud".split()]
PAD, EOS = 0, 1
ANIMALS = {"cat": "meow", "dog": "woof", "cow": "moo", "hen": "cluck"}
SPECIAL = {"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": EOS}


def llama(**changes: Any) -> nn.Module:
    """Grouped queries: four heads share two keys."""
    settings = {
        "vocab_size": len(VOCABULARY),
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.2,
        **SPECIAL,
    }
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes}))


def gpt2(**changes: Any) -> nn.Module:
    """Conv1D, whose weights are transposed; dropout of 0.1 everywhere, as released."""
    settings = {
        "vocab_size": len(VOCABULARY),
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 2,
        "initializer_range": 0.2,
        **SPECIAL,
    }
    return GPT2LMHeadModel(GPT2Config(**{**settings, **changes}))


def t5(**changes: Any) -> nn.Module:
    settings = {
        "vocab_size": len(VOCABULARY),
        "d_model": 32,
        "d_kv": 10,
        "d_ff": 40,
        "num_layers": 2,
        "num_heads": 2,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        "decoder_start_token_id": PAD,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
    }
    return T5ForConditionalGeneration(T5Config(**{**settings, **changes}))


def opt(**changes: Any) -> nn.Module:
    """Its layers call dropout as a function, not as a module."""
    settings = {
        "vocab_size": len(VOCABULARY),
        "hidden_size": 16,
        "word_embed_proj_dim": 16,
        "ffn_dim": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        **SPECIAL,
    }
    return OPTForCausalLM(OPTConfig(**{**settings, **changes}))


BASES = {"llama": llama, "gpt2": gpt2, "t5": t5, "opt": opt}
# What may be adapted; GPT-2's c_proj is a name that two kinds of layers share.
TARGETS = {
    "llama": ["q_proj", "k_proj", "o_proj", "gate_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "t5": ["q", "v", "o", "wi_0", "wo"],
    "opt": ["q_proj", "out_proj", "fc1"],
}


def add_lora(model: nn.Module, *, seed: int = 1, **config: Any) -> PeftModel:
    """A PeftModel whose lora_B is not zero, in eval mode."""
    kind = model.config.model_type
    settings = {
        "r": 3,
        "target_modules": TARGETS[kind],
        "fan_in_fan_out": kind == "gpt2",
        "task_type": "SEQ_2_SEQ_LM" if kind == "t5" else "CAUSAL_LM",
        **config,
    }
    peft_model = get_peft_model(model, LoraConfig(**settings))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in peft_model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.1, generator=generator)
    return peft_model.eval()


def make(kind: str = "llama", *, seed: int = 0, lora_seed: int = 1, **lora: Any) -> PeftModel:
    """A base of this kind with its adapter; the same numbers for the same arguments."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return add_lora(BASES[kind](), seed=lora_seed, **lora)


def make_batch(
    kind: str = "llama",
    *,
    seed: int = 0,
    lengths: Sequence[int] = (6, 4, 5),
    left: bool = False,
) -> dict[str, Tensor]:
    """Random rows of these lengths, padded on one side; the first two tokens have no loss."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths))
    ids = torch.randint(EOS, len(VOCABULARY), shape, generator=generator)
    place = torch.arange(shape[1]).expand(shape)
    size = torch.tensor(lengths).unsqueeze(1)
    real = place >= shape[1] - size if left else place < size
    mask = real.long()
    if kind == "t5":
        labels = torch.randint(EOS, len(VOCABULARY), (shape[0], 4), generator=generator)
        labels[0, -1] = -100
    else:
        labels = ids.masked_fill(~real | (place < 2), -100)
    return {"input_ids": ids.masked_fill(~real, PAD), "attention_mask": mask, "labels": labels}


def make_batches(count: int, kind: str = "llama", **arguments: Any) -> list[dict[str, Tensor]]:
    return [make_batch(kind, seed=seed, **arguments) for seed in range(count)]


def make_rows(count: int) -> list[dict[str, Tensor]]:
    """Rows of one length, for a DataLoader to put together."""
    batch = make_batch(seed=7, lengths=[5] * count)
    return [{key: value[row] for key, value in batch.items()} for row in range(count)]


class PowerCut(Exception):
    pass


class Interrupted:
    """Batches that fail when so many have been taken, the first time they are gone through."""

    def __init__(self, batches, after):
        self.batches, self.left = batches, after

    def __iter__(self):
        for batch in self.batches:
            if not self.left:
                self.left = None
                raise PowerCut
            if self.left:
                self.left -= 1
            yield batch


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word."""
    ids = {word: number for number, word in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def joined(tensors: Mapping[str, Tensor]) -> Tensor:
    """All of them in one vector, in the order of their names."""
    return torch.cat([tensors[name].detach().flatten() for name in sorted(tensors)])


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether two sets of gates are equal bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def make_collection(kind: str = "llama", count: int = 3) -> tuple[nn.Module, dict[str, PeftModel]]:
    """A bare base, and that base with one adapter or another: other ranks, scales and targets."""
    targets = TARGETS[kind]
    configs = [
        {"r": 3},
        {"r": 1, "target_modules": targets[:2]},
        {"r": 5, "target_modules": targets[1:], "lora_alpha": 16},
        {"r": 2, "target_modules": targets[-1:], "use_rslora": True},
    ]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = BASES[kind]().eval()
    models = {f"e{i}": make(kind, lora_seed=i, **configs[i % 4]) for i in range(count)}
    return base, models


def modules_of(models: Mapping[str, PeftModel]) -> dict[str, dict[str, LoraModule]]:
    """Each model's adapter, by module names of the base."""
    return {name: GatedAdapter(model).modules() for name, model in models.items()}
