"""An expert that has every kind of signature."""

from pathlib import Path

import pytest
import torch

from phatgoose.experts import GateRecord, Gates, Signatures, adapter_hash, identify_base
from phatgoose.experts.kinds import GATES, KINDS
from phatgoose.experts.lora import read_adapter
from tests.models import make_model, save_expert


def write_signatures(folder: Path, *, seed: int) -> None:
    """Every kind, random."""
    _, modules = read_adapter(folder)
    random = torch.Generator().manual_seed(seed)
    base, adapter = identify_base(make_model("llama", layers=1)), adapter_hash(modules)
    for kind in KINDS:
        vectors = {n: torch.randn(m.in_features, generator=random) for n, m in modules.items()}
        if kind == GATES:
            Gates(vectors, GateRecord(base, adapter, steps=seed)).save(folder)
        else:
            Signatures(kind, vectors, base, adapter, steps=seed).save(folder)


@pytest.fixture(scope="module")
def expert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one expert, e, that has every kind of signature."""
    root = tmp_path_factory.mktemp("expert")
    save_expert(root / "e", make_model("llama", layers=1), seed=1, targets=["q_proj", "down_proj"])
    (root / "e" / "README.md").unlink()
    write_signatures(root / "e", seed=1)
    return root
