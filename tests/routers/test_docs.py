"""docs/routers.md: it names all there is, and its example works."""

import re
from pathlib import Path

import torch
from torch.nn import functional as F

from phatgoose import record, route, unroute
from phatgoose.evaluation import is_router, method_names
from phatgoose.routers import Modifier, Router, make_router
from tests.models import make_batch

PAGE = (Path(__file__).parents[2] / "docs" / "routers.md").read_text(encoding="utf-8")
SITE = "model.layers.0.self_attn.q_proj"


def rows():
    """The cells of the tables' rows, by the name in the first."""
    lines = re.findall(r"^\| `([\w:+]+)` \| (.*) \|$", PAGE, flags=re.MULTILINE)
    return {name: [cell.strip() for cell in rest.split(" | ")] for name, rest in lines}


def test_every_router_and_method_has_its_row():
    modifiers = {name for name, kind in Router._known.items() if issubclass(kind, Modifier)}
    whole = {name for name in method_names() if "+" not in name}
    assert set(rows()) == {*whole, "single:NAME", *(f"ROUTER+{name}" for name in modifiers)}


def test_the_defaults_it_tells_are_those():
    for name, cells in rows().items():
        if is_router(name) and len(cells) == 5:
            own = {"top_k": 2, "scale": "softmax", "temperature": 1, **make_router(name).defaults}
            assert (cells[2], own["temperature"]) == (f"{own['top_k']}, {own['scale']}", 1), name


def test_the_example(model_and_pool, monkeypatch):
    monkeypatch.setattr(Router, "_known", dict(Router._known))
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    exec(example, {"__name__": "example"})
    model, pool = model_and_pool("llama", 3)
    inputs = []
    model.get_submodule(SITE).register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    for name in ("nearest", "nearest+adapter_evidence"):
        route(model, pool, name)
        with record(model) as trace:
            model(**make_batch(model, [5]))
        assert trace.weights[SITE].unique().tolist() == [1]
        if name == "nearest":
            means = torch.stack([e.modules[SITE].a.float().mean(0) for e in pool])
            wanted = F.cosine_similarity(inputs[0][0].unsqueeze(1), means, dim=-1).argmax(-1)
            assert trace.experts[SITE].squeeze(-1).tolist() == wanted.tolist()
        unroute(model)
