"""Adapters of every kind on several architectures, each against PEFT's own forward of it.

`python -m tests.experts.matrix --out out/matrix.json` prints and writes the whole table.
"""

import argparse
import copy
import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from phatgoose import ExpertPool, assign, load_expert, route, save_expert, unroute
from phatgoose.experts import verify_expert
from tests.models import LINEARS, make_batch, make_model

LARGEST = 1e-5  # the difference that is allowed, relative to the largest logit
HEAD = "lm_head"
EMBEDDING = {"gpt2": "wte"}  # embed_tokens elsewhere
NORMS = {
    "gpt2": ("ln_1", "ln_f"),
    "t5": ("layer_norm", "final_layer_norm"),
    "gemma3": ("input_layernorm", "norm"),
}
ATTENTION = {"gpt2": ("c_attn",), "t5": ("q", "v")}
MLP = {"gpt2": ("c_fc",), "t5": ("wi", "wo"), "qwen3-moe": ("o_proj",)}
FAMILIES = ("llama", "qwen3", "gemma3", "gpt2", "t5", "qwen3-moe")


@dataclass(frozen=True)
class Family:
    """What the parts of an architecture are called."""

    name: str

    @property
    def attention(self) -> list[str]:
        return list(ATTENTION.get(self.name, ("q_proj", "v_proj")))

    @property
    def mlp(self) -> list[str]:
        return list(MLP.get(self.name, ("up_proj", "down_proj")))

    @property
    def linears(self) -> list[str]:
        return list(LINEARS[self.name])

    @property
    def embedding(self) -> str:
        return EMBEDDING.get(self.name, "embed_tokens")

    @property
    def norms(self) -> list[str]:
        return list(NORMS.get(self.name, ("post_attention_layernorm", "model.norm")))

    @property
    def moe(self) -> bool:
        return self.name.endswith("-moe")

    @property
    def layers(self) -> list[str]:
        """Patterns of one layer."""
        return self.attention[:1]


Settings = Mapping[str, Any]
Variant = Callable[[Family], Settings | str]  # a reason where the family has no such thing


def _plain(**settings: Any) -> Variant:
    return lambda family: {"target_modules": family.attention, **settings}


def _on(pick: Callable[[Family], Sequence[str]], **settings: Any) -> Variant:
    return lambda family: {"target_modules": list(pick(family)), **settings}


def _saving(pick: Callable[[Family], Sequence[str]], **settings: Any) -> Variant:
    return lambda family: {
        "target_modules": family.attention,
        "modules_to_save": list(pick(family)),
        **settings,
    }


def _experts(*parameters: str, **settings: Any) -> Variant:
    def variant(family: Family) -> Settings | str:
        if not family.moe:
            return "has no batched experts"
        names = [f"mlp.experts.{name}" for name in parameters]
        return {"target_modules": [], "target_parameters": names, **settings}

    return variant


def _stored(dtype: torch.dtype, **settings: Any) -> Variant:
    return _plain(_stored=dtype, **settings)


VARIANTS: dict[str, Variant] = {
    "lora": _plain(),
    "rank 1": _plain(r=1),
    "rank 7": _plain(r=7, lora_alpha=3),
    "rank above the width": _plain(r=40),
    "alpha 0.5": _plain(lora_alpha=0.5),
    "alpha 64": _plain(lora_alpha=64, _size=0.05),
    "rslora": _plain(use_rslora=True),
    "rslora, rank 7": _plain(use_rslora=True, r=7),
    "mlp": _on(lambda f: f.mlp),
    "attention and mlp": _on(lambda f: [*f.attention, *f.mlp]),
    "every linear layer": _on(lambda f: f.linears),
    "all-linear": lambda f: (
        "refused: it names the mixture's own router, whose choice cannot be mixed"
        if f.moe
        else {"target_modules": "all-linear"}
    ),
    "one kind of layer": _on(lambda f: f.attention[:1]),
    "a pattern": lambda f: {"target_modules": rf".*\.({'|'.join(f.attention)})"},
    "layers_to_transform": _plain(layers_to_transform=[1]),
    "exclude_modules": lambda f: {
        "target_modules": [*f.attention, *f.mlp],
        "exclude_modules": f.mlp,
    },
    "rank_pattern": lambda f: {"target_modules": f.attention, "rank_pattern": {f.attention[-1]: 5}},
    "alpha_pattern": lambda f: {
        "target_modules": f.attention,
        "alpha_pattern": {f.attention[-1]: 9},
    },
    "both patterns, rslora": lambda f: {
        "target_modules": [*f.attention, *f.mlp],
        "rank_pattern": {f.attention[0]: 2},
        "alpha_pattern": {f.mlp[-1]: 9},
        "use_rslora": True,
    },
    "dropout": _plain(lora_dropout=0.3),
    "gaussian": _plain(init_lora_weights="gaussian"),
    "orthogonal": _plain(init_lora_weights="orthogonal", r=4),
    "pissa": _plain(init_lora_weights="pissa"),
    "pissa, rslora": _plain(init_lora_weights="pissa", use_rslora=True),
    "pissa, mlp": _on(lambda f: f.mlp, init_lora_weights="pissa"),
    "olora": lambda f: (
        "PEFT's OLoRA does not fit layers that store [in, out]"
        if f.name == "gpt2"
        else {"target_modules": f.attention, "init_lora_weights": "olora"}
    ),
    "float16 file": _stored(torch.float16),
    "bfloat16 file": _stored(torch.bfloat16),
    "float64 file": _stored(torch.float64),
    "float8_e4m3 file": _stored(torch.float8_e4m3fn),
    "float8_e5m2 file": _stored(torch.float8_e5m2),
    "lora_bias": _plain(lora_bias=True),
    "lora_bias, rslora, mlp": _on(lambda f: f.mlp, lora_bias=True, use_rslora=True),
    "lora_bias, bfloat16 file": _stored(torch.bfloat16, lora_bias=True),
    "bias all": _plain(bias="all"),
    "bias lora_only": _plain(bias="lora_only"),
    "bias all, lora_bias": _plain(bias="all", lora_bias=True),
    "dora": _plain(use_dora=True),
    "dora, mlp": _on(lambda f: f.mlp, use_dora=True),
    "dora, every linear layer": _on(lambda f: f.linears, use_dora=True),
    "dora, rslora": _plain(use_dora=True, use_rslora=True),
    "dora, bias all": _plain(use_dora=True, bias="all"),
    "dora, bfloat16 file": _stored(torch.bfloat16, use_dora=True),
    "dora, rank_pattern": lambda f: {
        "target_modules": f.attention,
        "use_dora": True,
        "rank_pattern": {f.attention[-1]: 5},
    },
    "head": _on(lambda f: [*f.attention, HEAD]),
    "head alone": _on(lambda f: [HEAD]),
    "head, dora": _on(lambda f: [HEAD], use_dora=True),
    "head, lora_bias": _on(lambda f: [HEAD], lora_bias=True),
    "embedding": _on(lambda f: [*f.attention, f.embedding]),
    "embedding, rslora": _on(lambda f: [f.embedding], use_rslora=True),
    "embedding, dora": _on(lambda f: [f.embedding], use_dora=True),
    "embedding and head": _on(lambda f: [f.embedding, HEAD, *f.mlp]),
    "embedding and head, tied": lambda f: (
        "PEFT saves it as one of `shared`, which T5 does not run"
        if f.name == "t5"
        else {"target_modules": [f.embedding], "ensure_weight_tying": True}
    ),
    "saved head": _saving(lambda f: [HEAD]),
    "saved embedding": _saving(lambda f: [f.embedding]),
    "saved embedding and head": _saving(lambda f: [f.embedding, HEAD]),
    "saved norms": _saving(lambda f: f.norms),
    "saved linear layers": _saving(lambda f: f.mlp[-1:]),
    "saved all at once": _saving(lambda f: [f.embedding, HEAD, *f.norms, f.mlp[-1]]),
    "saved head, dora": _saving(lambda f: [HEAD], use_dora=True),
    "saved head, bfloat16 file": _saving(lambda f: [HEAD], _stored=torch.bfloat16),
    "saved norms, bias all": _saving(lambda f: f.norms, bias="all"),
    "saved, tied": _saving(lambda f: [f.embedding], ensure_weight_tying=True),
    "tokens": _plain(trainable_token_indices=[1, 7, 30]),
    "tokens of the embedding": lambda f: {
        "target_modules": f.attention,
        "trainable_token_indices": {f.embedding: [4]},
    },
    "tokens of both": lambda f: {
        "target_modules": f.attention,
        "trainable_token_indices": {f.embedding: [4, 2], HEAD: [4, 9]},
    },
    "tokens, dora": _plain(trainable_token_indices=[5], use_dora=True),
    "head and another weight of the base": _on(
        lambda f: [HEAD], _moved=f"{HEAD}.base_layer.weight"
    ),
    "experts, up": _experts("gate_up_proj"),
    "experts, down": _experts("down_proj"),
    "experts, both": _experts("gate_up_proj", "down_proj"),
    "experts and attention": _experts("gate_up_proj", "down_proj", target_modules=["q_proj"]),
    "experts, of two ranks": _experts(
        "gate_up_proj",
        "down_proj",
        rank_pattern={r".*\.gate_up_proj": 6},
        alpha_pattern={r".*\.down_proj": 2},
    ),
    "experts, rslora": _experts("down_proj", use_rslora=True, r=2),
}
QUICK = (
    "lora",
    "pissa",
    "dora",
    "lora_bias",
    "bias all",
    "embedding and head",
    "saved all at once",
    "tokens",
    "experts, both",
)


@dataclass(frozen=True)
class Cell:
    """One adapter on one architecture."""

    family: str
    variant: str
    difference: float | None  # the largest, relative to the largest logit; None: see reason
    reason: str = ""


def make_adapter(folder: Path, family: Family, settings: Settings, seed: int = 1) -> Path:
    """A random adapter, saved by PEFT."""
    settings = {"r": 3, "lora_alpha": 5, **settings}
    own = {name: settings.pop(name, None) for name in ("_stored", "_moved", "_size")}
    model = get_peft_model(copy.deepcopy(make_model(family.name)), LoraConfig(**settings))
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if not weight.requires_grad:
                continue
            scale = (own["_size"] or 0.2) * (0.2 if "lora_" not in name else 1.0)
            weight += scale * torch.randn(weight.shape, generator=noise)
    model.save_pretrained(folder)
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    if own["_stored"] is not None:
        tensors = {name: tensor.to(own["_stored"]) for name, tensor in tensors.items()}
    if own["_moved"] is not None:
        tensors["base_model.model." + own["_moved"]] += 0.1
    save_file(tensors, path, {"format": "pt"})
    return folder


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    batch = make_batch(model, [6, 4])
    found: Tensor = model(**batch).logits
    return found


def by_peft(family: Family, folder: Path) -> Tensor:
    return logits(PeftModel.from_pretrained(make_model(family.name), folder).eval())


def cell(family: Family, variant: str, folder: Path) -> Cell:
    """The adapter alone at weight 1, as it is and as `save_expert` writes it."""
    settings = VARIANTS[variant](family)
    if isinstance(settings, str):
        return Cell(family.name, variant, None, settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own
        try:
            make_adapter(folder / "e", family, dict(settings))
            wanted = by_peft(family, folder / "e")
        except (ValueError, TypeError, KeyError, RuntimeError) as error:
            return Cell(family.name, variant, None, f"PEFT: {type(error).__name__}: {error}")
        expert = load_expert(folder / "e")
        save_expert(expert, folder / "copy")
        again = by_peft(family, folder / "copy")
    model = make_model(family.name)
    plain = logits(model)
    assert verify_expert(folder / "e", model)[0].startswith("e: has no gates")
    route(model, ExpertPool([expert]), "uniform")
    with assign(model, ["e"]):
        found = logits(model)
    unroute(model)
    assert torch.equal(logits(model), plain), f"{family.name}, {variant}: unroute"
    assert (wanted - plain).abs().max() > 1e-3 * plain.abs().max(), "the adapter does nothing"
    size = wanted.abs().max()
    differences = [float((other - wanted).abs().max() / size) for other in (found, again)]
    return Cell(family.name, variant, max(differences))


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="", help="variants whose name holds this")
    parser.add_argument("--family", default="", help="architectures whose name holds this")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    cells = []
    names = [name for name in VARIANTS if given.only in name]
    families = [Family(name) for name in FAMILIES if given.family in name]
    width = max(map(len, names))
    print(" " * width, *(f"{family.name:>10}" for family in families))
    for name in names:
        row = []
        for family in families:
            with tempfile.TemporaryDirectory() as folder:
                try:
                    row.append(cell(family, name, Path(folder)))
                except Exception as error:
                    row.append(Cell(family.name, name, float("inf"), repr(error)))
        shown = ["-" if c.difference is None else f"{c.difference:.1e}" for c in row]
        print(f"{name:{width}}", *(f"{value:>10}" for value in shown), flush=True)
        cells += row
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps([asdict(each) for each in cells], indent=1) + "\n")
    wrong = [c for c in cells if c.difference is not None and not c.difference <= LARGEST]
    for each in cells:
        if each.difference is None or each in wrong:
            print(f"{each.variant}, {each.family}: {each.reason or each.difference}")
    right = sum(c.difference is not None for c in cells) - len(wrong)
    print(f"{right} right, {len(wrong)} wrong, {len(cells) - right - len(wrong)} not there")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
