"""You collect adapters: route every token of one model among a pool that changes.

The pool in the package stands in for yours:

    python examples/collector.py
"""

from transformers import AutoModelForCausalLM, AutoTokenizer

import phatgoose
from phatgoose.default.tiny import BASE, expert_folders

PROMPT = "Give the plural of each word: ink, eruption\n"


def main() -> None:
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    model = AutoModelForCausalLM.from_pretrained(BASE).eval()
    inputs = tokenizer(PROMPT, return_tensors="pt")

    def answer() -> str:
        output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
        return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    print("base:              ", answer())

    # 1. Route. The model is changed in place; generate works as before.
    first, *others = expert_folders()
    pool = phatgoose.ExpertPool.load(others)
    phatgoose.route(model, pool, "phatgoose+evidence")
    print("routed:            ", answer())

    # 2. The pool changes while the model is routed.
    pool.add(first)
    pool.remove(others[0].name)
    print("after a change:    ", answer())

    # 3. Only some experts, for a while.
    with phatgoose.restrict(model, ["proc_pluralise"]):
        print("proc_pluralise only:", answer())

    # 4. And back: the model is as it was, bit for bit.
    phatgoose.unroute(model)
    print("unrouted:          ", answer())


if __name__ == "__main__":
    main()
