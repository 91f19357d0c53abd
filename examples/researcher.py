"""You compare methods: one table of routers, and where the tokens of a prompt went.

The pool in the package and six examples stand in for your tasks:

    python examples/researcher.py
"""

import json
import tempfile
from pathlib import Path

from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

import phatgoose
from phatgoose.default.tiny import BASE, expert_folders
from phatgoose.evaluation import Base, Own, Routed, read_tasks, run_evaluation, table

PLURALS = {
    "hat": "hats",
    "pen": "pens",
    "cup": "cups",
    "bus": "buses",
    "box": "boxes",
    "sea": "seas",
}


class Nearest(phatgoose.Router):
    """A router of your own: the cosine of a token with the mean row of A."""

    name = "nearest"
    defaults = {"top_k": 1, "scale": "unit"}

    def signature(self, expert, module):
        return F.normalize(expert.modules[module].a.float().mean(0), dim=-1)  # [in_features]

    def score(self, x, signatures):
        return F.normalize(x.float(), dim=-1) @ signatures.T  # [tokens, experts], fp32


def main() -> None:
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    model = AutoModelForCausalLM.from_pretrained(BASE).eval()
    pool = phatgoose.ExpertPool.load(expert_folders())

    with tempfile.TemporaryDirectory() as folder:
        # 1. A task is a folder with examples. Its name is an expert's, so it is that expert's own.
        task = Path(folder) / "proc_pluralise"
        task.mkdir()
        lines = [
            json.dumps({"inputs": f"Give the plural of each word: {one}", "targets": many})
            for one, many in PLURALS.items()
        ]
        (task / "test.jsonl").write_text("\n".join(lines))

        # 2. One table of methods.
        tasks = read_tasks([task], pool.names, model, tokenizer)
        methods = [
            Base("base"),
            Own("own"),
            Routed("phatgoose"),
            Routed("nearest", router="nearest"),
        ]
        results = run_evaluation(
            model, tokenizer, pool, methods=methods, tasks=tasks, out=Path(folder) / "results"
        )
        print(table(results))

    # 3. Where did the tokens go?
    phatgoose.route(model, pool)
    prompt = tokenizer("Give the plural of each word: ink, eruption\n", return_tensors="pt")
    with phatgoose.record(model) as trace:
        model(**prompt)
    module = "model.layers.3.mlp.up_proj"
    chosen = trace.experts[module].flatten().bincount(minlength=len(pool.names))
    favourite = pool.names[int(chosen.argmax())]
    print(f"at {module}, most tokens went to {favourite}")


if __name__ == "__main__":
    main()
