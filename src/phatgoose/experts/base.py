"""Which base model an expert was made for, told apart by shape and tokenizer."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from torch import nn

from phatgoose.experts import tokens
from phatgoose.experts.tokens import AddedTokens
from phatgoose.text import visible


@dataclass(frozen=True)
class BaseIdentity:
    """What must match between an expert and the base that it runs on."""

    name: str | None  # Hub id, or the last part of a local path
    revision: str | None
    shape: str  # hash of the model type and of every linear module's name and sizes
    tokenizer: str | None  # hash of the vocabulary; None where no tokenizer was given
    added: AddedTokens | None = None  # to that vocabulary; None where there are none, or unknown

    def to_json(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value or key != "added"}

    @classmethod
    def from_json(cls, value: Any) -> "BaseIdentity":
        """Read what a file says of a base. Raises ValueError if that is no identity."""
        names = [field.name for field in fields(cls) if field.name != "added"]
        if not isinstance(value, dict) or sorted({"added", *value}) != sorted({"added", *names}):
            raise ValueError(f"base is no object with {', '.join(names)}")
        for name in names:
            text = value[name]
            if text is None and name != "shape":
                continue
            if not isinstance(text, str) or visible(text) != text:
                raise ValueError(f"base.{name} is {text!r}, a text is wanted")
        added = AddedTokens.from_json(value["added"]) if "added" in value else None
        return cls(**{**value, "added": added})

    def difference(self, other: "BaseIdentity") -> str | None:
        """Why the two cannot be the same base, in words, or None. Names do not tell (`bases`)."""
        if self.shape != other.shape:
            return "the models differ in type or in the sizes of their linear layers"
        if self.tokenizer and other.tokenizer:
            return tokens.difference((self.tokenizer, self.added), (other.tokenizer, other.added))
        return None

    def remark(self, other: "BaseIdentity") -> str | None:
        """What an expert of this base should be told of on the other one, or None.

        Two revisions of one Hub id, or its weights and quantised ones, have the same layers.
        """
        revisions = self.revision, other.revision
        if not is_hub_name(self.name) or self.name != other.name or None in revisions:
            return None
        if self.revision == other.revision:
            return None
        return (
            f"made on {self.name} at {self.revision}, running at {other.revision}: the same layers "
            "with other weights, so that answers may differ a little"
        )


def identify_base(
    model: nn.Module, tokenizer: Any = None, *, name: str | None = None, revision: str | None = None
) -> BaseIdentity:
    """Identify a transformers model, as if there were no PEFT layers in it."""
    config = getattr(model, "config", None)
    name = name or getattr(config, "_name_or_path", None)
    vocabulary, added = (None, None) if tokenizer is None else tokens.identify_tokens(tokenizer)
    return BaseIdentity(
        name=_public_name(name) if name else None,
        revision=revision or getattr(config, "_commit_hash", None),
        shape=_shape_hash(model, getattr(config, "model_type", "")),
        tokenizer=vocabulary,
        added=added,
    )


def _public_name(name: str) -> str:
    """A name that means something on another machine: a path has its last part, for readers.

    A folder of the Hub's cache has the id of its repository.
    """
    if not Path(name).exists():
        return name
    path = Path(name).resolve()
    kind, _, repository = path.parent.parent.name.partition("--")
    if kind == "models" and path.parent.name == "snapshots" and repository:
        return repository.replace("--", "/")
    return path.name


def linear_sizes(module: nn.Module) -> tuple[int, int] | None:
    """(in_features, out_features) of a linear-like module, or None.

    nn.Linear and its quantised kin carry both names; GPT-2's Conv1D stores [in, out].
    """
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, Conv1D):
        # DeepSpeed's ZeRO-3 leaves an empty weight behind, which tells the whole one's shape.
        shape = getattr(module.weight, "ds_shape", module.weight.shape)
        return shape[0], shape[1]
    sizes = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    return sizes if isinstance(sizes[0], int) and isinstance(sizes[1], int) else None  # type: ignore[return-value]


def linear_modules(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Sizes of every linear module by the name it has in the bare base model."""
    sizes = {}
    for path, module in model.named_modules():
        if ".lora_" in path or ".base_layer." in path:
            continue
        if path.endswith(".base_layer") or not hasattr(module, "base_layer"):
            found = linear_sizes(module)
            if found is not None:
                sizes[base_name(path)] = found
    return sizes


def base_name(path: str) -> str:
    """A module's name in the bare base, given its name in a PeftModel."""
    return path.removeprefix("base_model.model.").removesuffix(".base_layer")


def is_hub_name(name: str | None) -> bool:
    """Whether a base's name is a Hub id ("owner/model"), which means the same on every machine."""
    return name is not None and name.count("/") == 1 and not name.startswith((".", "/", "~"))


def _shape_hash(model: nn.Module, model_type: str) -> str:
    sizes = {name: list(size) for name, size in linear_modules(model).items()}
    sizes = {name: size for name, size in sizes.items() if not name.endswith("lm_head")}
    return _hash({"model_type": model_type, "linear": sizes})


def _hash(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
