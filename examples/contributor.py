"""You have an adapter: train its gate, check the folder, and route with it.

The small model in the package stands in for your base, so this takes seconds on a CPU:

    python examples/contributor.py
"""

import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import phatgoose
from phatgoose.default.tiny import BASE

EXAMPLES = [(f"Give the plural: {word}\n", f"{word}s") for word in ("hat", "cat", "dog", "pen")]


def batch(tokenizer, pairs):
    """What you would pass to the model: ids, a mask, and labels on the answer alone."""
    rows = tokenizer(
        [prompt + answer for prompt, answer in pairs], return_tensors="pt", padding=True
    )
    labels = rows["input_ids"].masked_fill(rows["attention_mask"] == 0, -100)
    for row, (prompt, _) in zip(labels, pairs, strict=True):
        row[: len(tokenizer(prompt)["input_ids"])] = -100
    return {**rows, "labels": labels}


def main() -> None:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    tokenizer.padding_side = "right"
    base = AutoModelForCausalLM.from_pretrained(BASE)
    batches = [batch(tokenizer, EXAMPLES)]

    # 1. An ordinary LoRA, trained the ordinary way.
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(20):
        loss = model(**batches[0]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"adapter trained, loss {loss.item():.2f}")

    with tempfile.TemporaryDirectory() as folder:
        adapter = Path(folder) / "plurals"
        model.save_pretrained(adapter)

        # 2. Its gate: the two lines that are new.
        gates = phatgoose.train_gates(model, batches, steps=20, tokenizer=tokenizer)
        gates.save(adapter)

        # 3. The folder is sound, and a pool can route it.
        assert phatgoose.verify_expert(adapter) == []
        pool = phatgoose.ExpertPool.load([adapter])
        plain = AutoModelForCausalLM.from_pretrained(BASE)
        phatgoose.route(plain, pool, top_k=1)
        prompt = tokenizer("Give the plural: hat\n", return_tensors="pt")
        answer = plain.generate(**prompt, max_new_tokens=4, do_sample=False)
        print("routed answer:", tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :]))


if __name__ == "__main__":
    main()
