"""LoRA on an embedding, and rows of it that were trained."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from phatgoose.errors import ExpertFormatError, IncompatibleExpertError
from phatgoose.experts.base import linear_sizes
from phatgoose.experts.delta import Delta, OnBase
from phatgoose.experts.differences import DOWN, FACTOR, UP, WEIGHT, EmbeddingDifference
from phatgoose.experts.layers import difference, embed_scale_of, weight_of
from phatgoose.experts.lora_parts import BASE_WEIGHT, MAGNITUDE
from phatgoose.experts.low_rank import LoraModule
from phatgoose.experts.saved import nothing, tied_to

EMBEDDING_A, EMBEDDING_B = "lora_embedding_A", "lora_embedding_B"
ROWS = "token_adapter.trainable_tokens_delta"
INDICES = "trainable_token_indices"


@final
@dataclass(frozen=True)
class EmbeddingLora(OnBase):
    """LoRA, or DoRA, on an embedding: it adds scale * B A[id] to what an id is embedded as.

    Its gate scores what the embedding gives, because ids are no vectors. So `a` and `b` are empty
    here, and its factors are in `tensors`.
    """

    kind: ClassVar[str] = "LoRA on an embedding"
    keys: ClassVar[frozenset[str]] = frozenset({EMBEDDING_A, EMBEDDING_B})
    optional: ClassVar[frozenset[str]] = frozenset({MAGNITUDE, BASE_WEIGHT})
    place: ClassVar[str] = "embedding"

    @classmethod
    def rank_in(cls, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> int | None:
        return len(tensors[EMBEDDING_A])

    @classmethod
    def read(cls, tensors: Mapping[str, Tensor], scale: float) -> Delta:
        return cls(*nothing(len(tensors[EMBEDDING_B])), scale, dict(tensors))

    @property
    def alpha_rank(self) -> int:
        return len(self.tensors[EMBEDDING_A])

    @property
    def hashed(self) -> Mapping[str, Tensor]:
        return {key: tensor for key, tensor in self.tensors.items() if key != BASE_WEIGHT}

    @property
    def trained(self) -> tuple[Tensor, ...]:
        return (self.tensors[EMBEDDING_A], self.tensors[EMBEDDING_B])

    def setting(self, module: str) -> Mapping[str, Any]:
        dora = {"use_dora": True} if MAGNITUDE in self.tensors else {}
        return {"target_modules": [module], **dora}

    def problem(self, layer: nn.Module) -> str | None:
        return None if isinstance(layer, nn.Embedding) else f"no {self.place}"

    def on(self, layer: nn.Module, who: str) -> Delta:
        check_embedding(layer, who)
        width, rows = self.in_features, self.tensors[EMBEDDING_A].shape[1]
        own = list(layer.weight.shape)  # type: ignore[arg-type]
        if own != [rows, width]:
            raise IncompatibleExpertError(
                f"{who}: its LoRA is of an embedding of {[rows, width]}, the base's is {own}. It "
                "was trained on another base, or with more tokens: then resize the base's "
                "embeddings, by model.resize_token_embeddings."
            )
        rest = {}
        if BASE_WEIGHT in self.tensors:
            changed = difference(layer, "weight", self.tensors[BASE_WEIGHT], who)
            if torch.any(changed):
                rest[WEIGHT] = changed
        device: Any = layer.weight.device
        down = self.tensors[EMBEDDING_A].detach().to(device).float().T
        up = self.scale * self.tensors[EMBEDDING_B].detach().to(device).float().T
        if MAGNITUDE in self.tensors:
            weight = weight_of(layer, who) + rest.get(WEIGHT, 0)
            norms = (weight + down @ up).norm(dim=0)  # of columns, as PEFT has it
            factor = self.tensors[MAGNITUDE].detach().to(device).float().flatten() / norms
            up = up * factor
            rest = {name: value * factor for name, value in rest.items()} | {FACTOR: factor - 1}
        scale = embed_scale_of(layer)
        if WEIGHT in rest:
            rest[WEIGHT] = rest[WEIGHT] * scale
        return EmbeddingDifference(*nothing(width), 1.0, {DOWN: down, UP: up * scale, **rest})

    def also(self, module: str, model: nn.Module) -> Mapping[str, Delta]:
        return tied_to(module, model, self.tensors.get(BASE_WEIGHT), module)


@final
@dataclass(frozen=True)
class TokenRows(OnBase):
    """Rows that stand in for the base's, of some tokens: PEFT's trainable_token_indices.

    The difference is of low rank: one for each token. Where the base's output head is tied to the
    embedding, its rows are others too.
    """

    indices: tuple[int, ...] = ()
    key: str = ""  # what the config calls the module; PEFT takes another name for another tying

    kind: ClassVar[str] = "rows of an embedding (trainable_token_indices)"
    keys: ClassVar[frozenset[str]] = frozenset({ROWS})
    fields: ClassVar[Mapping[str, Any]] = {INDICES: {}}
    targeted: ClassVar[bool] = False
    place: ClassVar[str] = "embedding or output head"

    @classmethod
    def read_of(
        cls, tensors: Mapping[str, Tensor], scale: float, module: str, config: Mapping[str, Any]
    ) -> Delta:
        rows, said, key = tensors[ROWS], config.get(INDICES), ""
        if isinstance(said, Mapping):
            key = next((str(k) for k in said if f".{module}".endswith(f".{k}")), "")
            said = said.get(key)
        fits = isinstance(said, list) and all(type(i) is int and i >= 0 for i in said)
        if not fits or rows.dim() != 2 or len(said or ()) != len(rows):
            raise ExpertFormatError(
                f"adapter_config.json: {INDICES} does not name {len(rows)} tokens of {module}, as "
                "many as its file has rows. The two do not belong together; save the adapter again."
            )
        return cls(*nothing(rows.shape[1]), 1.0, dict(tensors), tuple(said or ()), key)

    @property
    def hashed(self) -> Mapping[str, Tensor]:
        return {**self.tensors, "indices": torch.tensor(self.indices)}

    def setting(self, module: str) -> Mapping[str, Any]:
        return {INDICES: {self.key or module: list(self.indices)}}

    def problem(self, layer: nn.Module) -> str | None:
        known = isinstance(layer, nn.Embedding) or linear_sizes(layer) is not None
        return None if known else f"no {self.place}"

    def on(self, layer: nn.Module, who: str) -> Delta:
        rows = self._difference(layer, who)
        chosen = torch.zeros(len(rows), len(weight_of(layer, who)), device=rows.device)
        chosen[torch.arange(len(rows)), torch.tensor(self.indices)] = 1.0
        if linear_sizes(layer) is not None:
            return LoraModule(rows, chosen.T.contiguous(), 1.0)
        check_embedding(layer, who)
        up = rows * embed_scale_of(layer)
        return EmbeddingDifference(*nothing(rows.shape[1]), 1.0, {DOWN: chosen.T, UP: up})

    def also(self, module: str, model: nn.Module) -> Mapping[str, Delta]:
        layer: Any = model.get_submodule(module)
        weight = getattr(layer, "weight", None)
        # PEFT changes what is tied to the embedding that the model itself calls its own.
        if layer is not model.get_input_embeddings():  # type: ignore[operator]
            return {}
        return {
            name: self
            for name, other in model.named_modules()
            if other is not layer and getattr(other, "weight", None) is weight
        }

    def _difference(self, layer: nn.Module, who: str) -> Tensor:
        weight, rows = weight_of(layer, who), self.tensors[ROWS]
        if max(self.indices, default=0) >= len(weight) or rows.shape[1] != weight.shape[1]:
            raise IncompatibleExpertError(
                f"{who}: has rows {list(rows.shape)} of tokens up to {max(self.indices)}, the "
                f"base's embedding is {list(weight.shape)}. It was trained on another base, or "
                "with more tokens: then resize it, by model.resize_token_embeddings."
            )
        dtype = getattr(layer, "weight").dtype  # noqa: B009  (mypy)
        stored = rows.detach().to(weight.device, dtype).float()
        return stored - weight[torch.tensor(self.indices, device=weight.device)]


def check_embedding(layer: nn.Module, who: str) -> None:
    """Raise IncompatibleExpertError unless the layer is an embedding."""
    if not isinstance(layer, nn.Embedding):
        raise IncompatibleExpertError(
            f"{who}: is an adapter of an embedding, and the base has a {type(layer).__name__} "
            "there. It was trained on another base."
        )
