"""What a fresh process makes of saved experts: prints one JSON object, by expert.

The arguments are a folder of the base with its tokenizer, a tensor file of prompts, and experts.
"""

import json
import sys
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from phatgoose import ExpertPool, record, route, unroute


def answer(model: Any, tokenizer: Any, prompts: dict[str, torch.Tensor]) -> list[str]:
    """What the model says to each prompt, greedily."""
    ids = model.generate(**prompts, max_new_tokens=6, do_sample=False)
    return tokenizer.batch_decode(ids[:, prompts["input_ids"].shape[1] :])


def logits(model: Any, prompts: dict[str, torch.Tensor]) -> list[float]:
    with torch.no_grad():
        return model(**prompts).logits.flatten().float().tolist()


def main(base: str, prompts_file: str, *experts: str) -> dict[str, Any]:
    tokenizer, prompts = AutoTokenizer.from_pretrained(base), load_file(prompts_file)
    report: dict[str, Any] = {}
    for expert in experts:
        report[expert] = about = {}
        for dtype in (torch.float32, torch.bfloat16):
            name = str(dtype).removeprefix("torch.")
            model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
            about[f"{name} before"] = logits(model, prompts)
            route(model, ExpertPool.load([expert]), top_k=1)
            with record(model) as trace:
                about[f"{name} routed"] = logits(model, prompts)
            about["sites"] = sorted(trace.experts)
            about[f"{name} routed text"] = answer(model, tokenizer, prompts)
            unroute(model)
            about[f"{name} after"] = logits(model, prompts)
            peft_model = PeftModel.from_pretrained(model, expert)
            about[f"{name} peft"] = logits(peft_model, prompts)
            about[f"{name} peft text"] = answer(peft_model, tokenizer, prompts)
        # Experts of one base share a pool.
        model = AutoModelForCausalLM.from_pretrained(base)
        route(model, ExpertPool.load(experts))
        about["pool"] = logits(model, prompts)
    return report


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
