"""Tiny random models of several families, and experts for them as PEFT saves them."""

import copy
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
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
from phatgoose.experts.resolve import resolve

VOCABULARY = 53
PAD = 0

# The last parts of the names of each family's linear layers.
LINEARS = {
    "llama": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "llama-biased": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "qwen3": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "gemma3": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "qwen3-moe": ("q_proj", "k_proj", "v_proj", "o_proj"),  # beside its batched experts
    "gpt2": ("c_attn", "c_fc", "c_proj"),  # Conv1D; queries, keys and values in one
    "phi3": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    "neox": ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
    "t5": ("q", "k", "v", "o", "wi", "wo"),
    "t5-gated": ("q", "k", "v", "o", "wi_0", "wi_1", "wo"),
}
DECODERS = ("llama", "qwen3", "gpt2", "phi3", "neox")


def make_model(family: str, *, seed: int = 0, hidden: int = 24, layers: int = 2) -> nn.Module:
    """A model in evaluation mode, with random weights large enough that every layer matters."""
    tokens: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "pad_token_id": PAD,
        "bos_token_id": None,
        "eos_token_id": None,  # so that generate always gives as many tokens as asked
    }
    sizes = {
        "hidden_size": hidden,
        "intermediate_size": hidden + 7,
        "num_hidden_layers": layers,
        "num_attention_heads": 3,
        "max_position_embeddings": 64,
        **tokens,
    }
    grouped = {**sizes, "num_attention_heads": 4, "num_key_value_heads": 2}
    t5 = {
        "d_model": hidden,
        "d_kv": 5,
        "d_ff": hidden + 7,
        "num_layers": layers,
        "num_decoder_layers": layers,
        "num_heads": 3,
        "decoder_start_token_id": PAD,
        **tokens,
    }
    if family == "llama":
        model = LlamaForCausalLM(LlamaConfig(**grouped, head_dim=6))
    elif family == "llama-biased":
        biases = {"attention_bias": True, "mlp_bias": True}
        model = LlamaForCausalLM(LlamaConfig(**grouped, head_dim=6, **biases))
    elif family == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**grouped, head_dim=10))
    elif family == "gemma3":  # its embedding scales what it gives, and is the output head too
        config = Gemma3TextConfig(**grouped, head_dim=6, sliding_window=8)
        model = Gemma3ForCausalLM(config)
    elif family == "qwen3-moe":
        mixture = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**grouped, head_dim=10, **mixture))
    elif family == "gpt2":
        model = GPT2LMHeadModel(
            GPT2Config(n_embd=hidden, n_layer=layers, n_head=3, n_positions=64, **tokens)
        )
    elif family == "phi3":
        model = Phi3ForCausalLM(Phi3Config(**sizes))
    elif family == "neox":
        model = GPTNeoXForCausalLM(GPTNeoXConfig(**sizes))
    elif family == "t5":
        model = T5ForConditionalGeneration(T5Config(**t5, feed_forward_proj="relu"))
    else:
        model = T5ForConditionalGeneration(T5Config(**t5, feed_forward_proj="gated-gelu"))
    _fill(model, seed)
    return model.eval()


def _fill(model: nn.Module, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=random)
        if parameter.ndim > 1:
            parameter.data = noise / parameter.shape[-1] ** 0.5
        else:
            parameter.data += 0.2 * noise
    model.tie_weights()


def save_expert(
    folder: Path,
    model: nn.Module,
    *,
    seed: int,
    targets: Sequence[str] | str,
    rank: int = 3,
    alpha: float = 4,
    gates: bool = True,
    **config: Any,
) -> Path:
    """Save a random expert of `model`: its adapter by PEFT, its gates by phatgoose."""
    targets = targets if isinstance(targets, str) else list(targets)
    settings = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, **config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT notes that Conv1D stores its weight transposed
        adapted = get_peft_model(copy.deepcopy(model), settings)
    random = torch.Generator().manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if ".lora_" in name:
            noise = torch.randn(parameter.shape, generator=random)
            width = parameter.shape[min(1, parameter.dim() - 1)]
            parameter.data = (noise / width**0.5).to(parameter.dtype)
    adapted.save_pretrained(folder, save_embedding_layers=False)
    if gates:
        save_gates(folder, model, seed=seed)
    return folder


def save_gates(folder: Path, model: nn.Module, *, seed: int) -> None:
    """Write random gates beside an adapter; of odd size and mean, so standardising matters."""
    modules = load_expert(folder).modules
    random = torch.Generator().manual_seed(seed + 1)
    resolved = modules
    if any(delta.gate_features is None for delta in modules.values()):  # the base tells
        resolved = resolve(Expert("any", modules), model).expert.modules
    vectors = {
        name: 0.1 * (seed % 5 + 1) * (1 + torch.randn(resolved[name].in_features, generator=random))
        for name in modules
    }
    record = GateRecord(base=identify_base(model), adapter=adapter_hash(modules))
    Gates(vectors, record).write(folder)


def save_experts(
    root: Path, model: nn.Module, targets: Sequence[Sequence[str]], *, seed: int = 0, **config: Any
) -> list[Path]:
    """Save one expert for each entry of `targets`, named e0, e1 and so on, of growing rank."""
    return [
        save_expert(
            root / f"e{i}",
            model,
            seed=100 * seed + i,
            targets=leaves,
            **{"rank": 1 + i % 4, "alpha": 2 + i, **config},
        )
        for i, leaves in enumerate(targets)
    ]


def mixed_targets(family: str, count: int) -> list[tuple[str, ...]]:
    """Which layers each of `count` experts adapts: the first all, each other a different part.

    The first kind of layer is adapted by all, the last by the first expert alone.
    """
    leaves = LINEARS[family]
    return [leaves, *(leaves[: 1 + i % (len(leaves) - 1)] for i in range(count - 1))]


def make_batch(
    model: nn.Module, lengths: Sequence[int], *, side: str = "left", seed: int = 0
) -> dict[str, Tensor]:
    """Random sequences of these lengths, padded on one side; T5 also gets decoder inputs."""
    random = torch.Generator().manual_seed(seed)
    ids, mask = _pad(lengths, side, random)
    batch = {"input_ids": ids, "attention_mask": mask}
    if model.config.is_encoder_decoder:
        ids, mask = _pad([1 + length // 2 for length in reversed(lengths)], side, random)
        return {**batch, "decoder_input_ids": ids, "decoder_attention_mask": mask}
    return {**batch, "position_ids": (mask.cumsum(-1) - 1).clamp_min(0)}


def take_row(batch: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """One sequence of a batch, without its padding."""
    alone = {}
    for key, value in batch.items():
        prefix = "decoder_" if key.startswith("decoder_") else ""
        real = batch[prefix + "attention_mask"][row].bool()
        alone[key] = value[row : row + 1, real]
    return alone


def _pad(lengths: Sequence[int], side: str, random: torch.Generator) -> tuple[Tensor, Tensor]:
    width = max(lengths)
    ids = torch.full((len(lengths), width), PAD)
    mask = torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        place = slice(width - length, width) if side == "left" else slice(0, length)
        ids[row, place] = torch.randint(1, VOCABULARY, (length,), generator=random)
        mask[row, place] = 1
    return ids, mask


def real_tokens(batch: dict[str, Tensor], stream: str) -> Tensor:
    """Which of a stream's tokens are not padding, flattened as a layer sees them."""
    key = "decoder_attention_mask" if stream == "decoder" else "attention_mask"
    return batch.get(key, batch["attention_mask"]).flatten().bool()
