"""One expert per query, by the stored training prompts that are most like it.

Jang et al., arXiv:2302.03202; the "Retrieval" baseline of arXiv:2402.05859, section 4.
"""

import functools
import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional as F

from phatgoose.errors import ConfigError
from phatgoose.experts import identify_base
from phatgoose.files import write_tensors
from phatgoose.tasks import Example

BASE_ENCODER = "base"
STORED = 1000  # prompts per expert; published
LONGEST = 512  # tokens of a prompt that are read; its end, which mostly asks the question


@dataclass(frozen=True)
class ExampleIndex:
    """Embeddings of the experts' training prompts, centred and of length 1."""

    names: list[str]
    embeddings: Float[Tensor, "N D"]
    owners: Int[Tensor, " N"]  # indices into names
    centre: Float[Tensor, " D"]
    encoder: str
    key: str  # hash of all it was made of

    def choose(self, queries: Sequence[str], model: Any, tokenizer: Any) -> list[str]:
        """For each query the expert with the nearest stored prompt, by cosine; the first of equals.

        `model` is the base the index was made with, routed or not.
        """
        vectors = F.normalize(embed(queries, self.encoder, model, tokenizer) - self.centre, dim=-1)
        nearest = [(part @ self.embeddings.T).argmax(-1) for part in vectors.split(1024)]
        return [self.names[owner] for place in nearest for owner in self.owners[place].tolist()]


def build_index(
    examples: Mapping[str, Sequence[Example]],
    model: Any,
    tokenizer: Any,
    *,
    encoder: str = BASE_ENCODER,
    stored: int = STORED,
    seed: int = 0,
    cache: Path | None = None,
) -> ExampleIndex:
    """Embed up to `stored` training prompts of every expert, chosen by the seed.

    Args:
        examples: by the expert's name.
        encoder: "base", the mean of the base's own input embeddings over a prompt's tokens, which
            needs no download; or the name of a sentence-transformers model.
        cache: a folder in which an index of the same prompts, encoder and base is kept.

    Raises ConfigError where an expert has no examples, or the encoder cannot be had.
    """
    if not examples:
        raise ConfigError("retrieval: no expert has examples to be found by.")
    prompts: dict[str, list[str]] = {}
    for name, rows in examples.items():
        if not rows:
            raise ConfigError(f"retrieval: {name} has no examples to be found by.")
        places = random.Random(f"{seed} {name}").sample(range(len(rows)), min(stored, len(rows)))
        prompts[name] = [rows[place].prompt for place in sorted(places)]
    made_of = [encoder, LONGEST, prompts]
    if encoder == BASE_ENCODER:
        table = model.get_input_embeddings().weight.detach().cpu().contiguous()
        made_of.append(hashlib.sha256(table.view(torch.uint8).numpy()).hexdigest())
        made_of.append(identify_base(model, tokenizer).tokenizer)
    key = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()
    path = cache and cache / f"retrieval-{key[:12]}.safetensors"
    if path and (index := _read(path, key)):
        return index
    vectors = embed([p for rows in prompts.values() for p in rows], encoder, model, tokenizer)
    centre = vectors.mean(0)
    counts = torch.tensor([len(rows) for rows in prompts.values()])
    index = ExampleIndex(
        names=list(prompts),
        embeddings=F.normalize(vectors - centre, dim=-1),
        owners=torch.arange(len(counts)).repeat_interleave(counts),
        centre=centre,
        encoder=encoder,
        key=key,
    )
    if path:
        _write(path, index)
    return index


def embed(texts: Sequence[str], encoder: str, model: Any, tokenizer: Any) -> Float[Tensor, "N D"]:
    """Embed texts, in fp32 on the CPU and not normalised. See `build_index` for encoders."""
    if encoder != BASE_ENCODER:
        vectors = _sentence_transformer(encoder).encode(list(texts), convert_to_numpy=True)
        return torch.as_tensor(vectors).float()
    table = model.get_input_embeddings()
    found = []
    with torch.no_grad():
        for every in tokenizer(list(texts))["input_ids"] if texts else []:
            ids = every[-LONGEST:]
            rows = table(torch.tensor(ids, dtype=torch.long, device=table.weight.device))
            found.append(rows.float().mean(0) if ids else rows.new_zeros(rows.shape[-1]).float())
    return torch.stack(found).cpu() if found else torch.zeros(0, table.weight.shape[-1])


@functools.lru_cache(maxsize=1)  # it is asked for with every part of a stream
def _sentence_transformer(name: str) -> Any:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise ConfigError(
            f"retrieval: encoder {name} needs the sentence-transformers package: "
            "pip install 'phatgoose[eval]'. Encoder base needs none."
        ) from None
    try:
        return SentenceTransformer(name)
    except Exception as error:  # it raises many kinds
        raise ConfigError(
            f"retrieval: no sentence-transformers model could be loaded from {name} "
            f"({type(error).__name__}). Check the name, or use encoder base, which needs no hub."
        ) from error


def _write(path: Path, index: ExampleIndex) -> None:
    tensors = {"embeddings": index.embeddings, "owners": index.owners, "centre": index.centre}
    about = {"key": index.key, "encoder": index.encoder, "names": json.dumps(index.names)}
    write_tensors(path, tensors, about)


def _read(path: Path, key: str) -> ExampleIndex | None:
    """The index kept there; None where there is none of this key, or it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if about["key"] != key:
            return None
        return ExampleIndex(
            json.loads(about["names"]), encoder=about["encoder"], key=key, **tensors
        )
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None
