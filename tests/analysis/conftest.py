"""A hand-made trace, tokenizers made in memory, and tiny routed models."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

import phatgoose
from phatgoose.experts import Expert, GateRecord, Gates, adapter_hash, identify_base
from phatgoose.experts.lora import LoraModule
from phatgoose.nn import TokenTable, Trace


@pytest.fixture(scope="session")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """GPT-2's kind: one token a byte, and " a", and a whole tag."""
    letters = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġa"]
    vocab = {piece: i for i, piece in enumerate(["<pad>", "</s>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocab, [("Ġ", "a")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(["<script>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", padding_side="left"
    )


@pytest.fixture(scope="session")
def sentence_tokenizer() -> PreTrainedTokenizerFast:
    """Llama's kind: pieces with ▁ for a space, and bytes for what has no piece."""
    pieces = ["<unk>", "▁the", "film", "▁", *(f"<0x{byte:02X}>" for byte in range(256))]
    model = models.Unigram([(piece, -1.0) for piece in pieces], 0, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.fixture
def hand_made(byte_tokenizer: PreTrainedTokenizerFast) -> Trace:
    """Three tokens in two sequences, two layers; token 2 uses no expert in layer 1."""
    trace = Trace(names=["red", "green", "blue"], top_k=2)
    trace.tokens["decoder"] = TokenTable(
        ids=torch.tensor(byte_tokenizer.convert_tokens_to_ids(["x", "Ġa", "Ċ"])),
        sequence=torch.tensor([0, 0, 1]),
        position=torch.tensor([0, 1, 0]),
    )
    first, second = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"
    trace.experts[first] = torch.tensor([[0, 1], [1, 0], [2, -1]])
    trace.weights[first] = torch.tensor([[0.75, 0.25], [0.5, 0.5], [1.0, 0.0]])
    trace.experts[second] = torch.tensor([[0, 2], [1, 2], [-1, 0]])
    trace.weights[second] = torch.tensor([[0.5, 0.5], [0.75, 0.25], [0.75, 0.25]])
    trace.streams = {first: "decoder", second: "decoder"}
    return trace


@pytest.fixture
def routed(byte_tokenizer: PreTrainedTokenizerFast) -> Callable[..., nn.Module]:
    """routed("llama" or "t5", names, **settings): a tiny random model that routes among them."""

    def make(kind: str, names: list[str], **settings: Any) -> nn.Module:
        torch.manual_seed(0)
        model = {"llama": _llama, "t5": _t5}[kind](len(byte_tokenizer)).eval()
        pool = phatgoose.ExpertPool(_expert(name, model) for name in names)
        return phatgoose.route(model, pool, **settings)

    return make


def _llama(vocab_size: int) -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, num_attention_heads=2, **sizes))


def _t5(vocab_size: int) -> nn.Module:
    sizes = {"d_model": 16, "d_ff": 20, "d_kv": 8, "num_layers": 2, "num_heads": 2}
    start = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    return T5ForConditionalGeneration(T5Config(vocab_size=vocab_size, **sizes, **start))


def _expert(name: str, model: nn.Module) -> Expert:
    modules = {
        where: LoraModule(
            a=torch.randn(2, layer.in_features),
            b=torch.randn(layer.out_features, 2),
            scale=1.0,
        )
        for where, layer in model.named_modules()
        if where.rpartition(".")[2] in ("q_proj", "v_proj", "q", "v")
    }
    vectors = {where: torch.randn(module.in_features) for where, module in modules.items()}
    record = GateRecord(identify_base(model), adapter_hash(modules))
    return Expert(name, modules, Gates(vectors, record), base_name=None)
