"""Tiny random bases that vLLM's CPU attention takes, saved with experts."""

import shutil
from pathlib import Path

from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.models import _fill, mixed_targets, save_experts

FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "gemma": (GemmaConfig, GemmaForCausalLM),
    "phi3": (Phi3Config, Phi3ForCausalLM),  # queries, keys and values in one, on disk too
    "gpt2": (GPT2Config, GPT2LMHeadModel),
}
VOCABULARY = 128


def save_base(folder, family, *, kv_heads=2, seed=0):
    """Save a base to `folder`; return it."""
    config, model = FAMILIES[family]
    base = model(
        config(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=kv_heads,
            head_dim=32,
            max_position_embeddings=512,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    _fill(base, seed)
    base.eval().save_pretrained(folder)
    return base


def save_pool(folder, base, count=6, **config):
    """Experts of uneven ranks, most of which adapt some of the layers only.

    Random ones as strong as in other tests make a model that itself amplifies rounding errors:
    transformers in fp32 is then 5e-5 away from float64.
    """
    for old in Path(folder).glob("e*"):
        shutil.rmtree(old)
    family = "phi3" if base.config.model_type == "phi3" else "llama"
    return save_experts(folder, base, mixed_targets(family, count), **{"alpha": 1, **config})
