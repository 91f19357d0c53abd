"""What the tiny pool computed at commit f1f3807: the cases, and the script that recorded them.

    python -m tests.pool.golden tests/pool/golden.safetensors

Record again only where a change of the numbers is intended, and say so in the changelog.
"""

import hashlib
import json
import platform
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from phatgoose import ExpertPool, assign, record, restrict, route, unroute
from phatgoose.default.tiny import BASE, DEMO, expert_folders
from phatgoose.experts import adapter_hash
from phatgoose.models import load_base
from phatgoose.pool import merge_experts

FILE = Path(__file__).with_suffix(".safetensors")
SITES, TOKENS = slice(None, None, 8), slice(None, None, 3)  # what is kept in full
VOCABULARY = slice(None, None, 128)
BACKENDS = ("reference", "torch")
ROUTERS = {
    "phatgoose": {},
    "phatgoose, top 1, unit": {"top_k": 1, "scale": "unit"},
    "phatgoose, top 3 with null, warm": {"top_k": 3, "null_score": 0.2, "temperature": 1.7},
    "phatgoose, all": {"top_k": "all"},
    "phatgoose, room": {"capacity": 20, "max_rank": 24},
    "phatgoose+evidence": {},
    "phatgoose+prompt_evidence": {},
    "arrow": {},
    "spectr": {"top_k": 2},
    "adapter_prompt_evidence": {},
}


class Golden:
    """The tiny pool on its base, and two batches: one of many pairs, one of few."""

    def __init__(self) -> None:
        self.model, tokenizer = load_base(BASE, device="cpu")
        self.pool = ExpertPool.load(expert_folders())
        lines = [json.loads(line)["inputs"] for line in DEMO.read_text().splitlines()]
        tokenizer.padding_side = "left"
        self.many = dict(tokenizer(lines[:2], return_tensors="pt", padding=True))
        self.few = {name: ids[1:, -9:] for name, ids in self.many.items()}

    def cases(self) -> dict[str, Callable[[], dict[str, Tensor]]]:
        """By name, what to compute: tensors of which all are hashed and some kept."""
        cases: dict[str, Callable[[], dict[str, Tensor]]] = {}
        for name, settings in ROUTERS.items():
            for backend in BACKENDS:
                cases[f"{name}, {backend}"] = lambda n=name, s=settings, b=backend: self._routed(
                    n.partition(",")[0], backend=b, **s
                )
        return cases | {
            "assign and restrict": self._asked,
            "bfloat16": lambda: self._routed("phatgoose", dtype=torch.bfloat16),
            "gradients": self._gradients,
            "merge": self._merged,
        }

    def hashes(self) -> dict[str, str]:
        """Of every adapter as it was read: no arithmetic, so equal on every machine."""
        return {expert.name: adapter_hash(expert.modules) for expert in self.pool}

    def _routed(self, router: str, *, dtype=torch.float32, **settings) -> dict[str, Tensor]:
        model = self.model.to(dtype)
        route(model, self.pool, router, **settings)
        try:
            found = {}
            for size, batch in (("many", self.many), ("few", self.few)):
                with torch.no_grad(), record(model) as trace:
                    found[f"{size} logits"] = model(**batch).logits
                found[f"{size} experts"] = torch.stack(list(trace.experts.values())).char()
                found[f"{size} weights"] = torch.stack(list(trace.weights.values()))
            found["tokens"] = model.generate(**self.few, max_new_tokens=4, do_sample=False)
            return found
        finally:
            unroute(model)
            self._restore(dtype)

    def _restore(self, dtype: torch.dtype) -> None:
        if dtype != torch.float32:
            self.model, _ = load_base(BASE, device="cpu")

    def _asked(self) -> dict[str, Tensor]:
        route(self.model, self.pool, backend="torch")
        names = self.pool.names
        try:
            with torch.no_grad():
                with assign(self.model, [names[3], None]):
                    assigned = self.model(**self.many).logits
                with restrict(self.model, names[4:9]):
                    restricted = self.model(**self.many).logits
            return {"assigned logits": assigned, "restricted logits": restricted}
        finally:
            unroute(self.model)

    def _gradients(self) -> dict[str, Tensor]:
        route(self.model, self.pool, backend="torch")
        inputs = self.model.get_input_embeddings()(self.many["input_ids"]).detach()
        try:
            inputs.requires_grad_()
            out = self.model(
                inputs_embeds=inputs,
                attention_mask=self.many["attention_mask"],
                labels=self.many["input_ids"],
            )
            (slope,) = torch.autograd.grad(out.loss, inputs)
            return {"loss": out.loss.detach().view(1), "gradient logits": slope}
        finally:
            unroute(self.model)

    def _merged(self) -> dict[str, Tensor]:
        some = self.pool.experts[:3]
        found = {}
        for method, rank in (("average", None), ("average", 4), ("ties", None)):
            expert = merge_experts(some, method=method, rank=rank)
            module = expert.modules[sorted(expert.modules)[0]]
            product = module.scale * module.b.double() @ module.a.double()
            found[f"{method} {rank} logits"] = product.float()
        return found


def kept(name: str, values: Tensor) -> Tensor:
    """The part of a tensor that the file holds."""
    if name.endswith("logits"):
        return values[..., -1, VOCABULARY].float().clone()
    if name.endswith(("experts", "weights")):
        return values[SITES, TOKENS].clone()
    return values.clone()


def hashed(values: Tensor) -> str:
    raw = values.detach().contiguous().flatten().view(torch.uint8).numpy()
    return hashlib.sha256(str(list(values.shape)).encode() + raw.tobytes()).hexdigest()


def machine() -> str:
    """What decides the last bits. Numbers recorded on another one are compared with a tolerance."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line for line in cpuinfo.read_text().splitlines() if ":" in line]
        facts = dict(map(str.strip, line.split(":", 1)) for line in reversed(lines))
        model = " ".join(facts.get(key, "") for key in ("model name", "cpu family", "model"))
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return f"{model}, {torch.backends.cpu.get_cpu_capability()}, {versions}"


def read() -> tuple[dict[str, str], dict[str, Tensor]]:
    """What is on file: hashes, and the machine; tensors."""
    with safe_open(FILE, "pt") as file:
        return file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def main(path: str) -> None:
    torch.set_num_threads(1)
    golden, tensors = Golden(), {}
    hashes = {"machine": machine(), "adapters": json.dumps(golden.hashes(), sort_keys=True)}
    for case, compute in golden.cases().items():
        for name, values in compute().items():
            tensors[f"{case}: {name}"] = kept(name, values)
            hashes[f"{case}: {name}"] = hashed(values)
    save_file(tensors, path, hashes)


if __name__ == "__main__":
    main(sys.argv[1])
