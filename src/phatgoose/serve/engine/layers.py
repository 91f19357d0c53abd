"""Maps modules of the base to vLLM's linear layers, and to the slice of them that a rank holds."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.models.utils import PPMissingLayer

from phatgoose.errors import ConfigError, RoutingError
from phatgoose.experts import Delta
from phatgoose.serve.pool.slots import Place

# Subclasses may lay out their weights in ways of their own, so a class has to be one of these.
KNOWN = (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
# Merged on disk too, in vLLM's own order; others that come as one are put in another order.
MERGED_ON_DISK = ("qkv_proj", "gate_up_proj")
# Multi-head latent attention reads this layer's weight and does not run it.
NEVER_RUN = ("kv_b_proj",)


class Layers:
    """The linear layers of one rank's model, found by the names that modules have in the base."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._mapper = _names_only(getattr(model, "hf_to_vllm_mapper", None))
        self._packed: Mapping[str, Sequence[str]] = getattr(model, "packed_modules_mapping", {})
        self._modules = dict(model.named_modules())
        self._places: dict[str, Place] = {}
        for name, layer in self._modules.items():
            if isinstance(layer, LinearBase):
                self._places |= self._parts_of(name, layer)

    def find(self, module: str, who: str) -> Place | None:
        """Where a module of the base is; None where it is on another pipeline stage.

        Raises RoutingError, in the name of `who`, where vLLM has no layer that can be routed.
        """
        name = module if self._mapper is None else self._mapper._map_name(module + ".weight")
        name = module if name is None else name.removesuffix(".weight")
        if name not in self._places:
            if self._is_elsewhere(name):
                return None
            raise RoutingError(f"{who}: adapts {module}, {self._why_not(name)}")
        return self._checked(self._places[name], module, who)

    def named(self, targets: Sequence[str]) -> list[Place]:
        """All modules whose names end in one of `targets`, "q_proj" say.

        Raises ConfigError for a target that no module of the model has, else what `find` raises.
        """
        found = []
        for target in targets:
            mine = [n for n in self._places if n == target or n.endswith("." + target)]
            if not mine and not any(isinstance(m, PPMissingLayer) for m in self._modules.values()):
                raise ConfigError(
                    f"phatgoose: targets has {target!r}, and vLLM's {type(self._model).__name__} "
                    "has no linear layer whose name ends so."
                )
            found += [self._checked(self._places[name], name, "targets") for name in mine]
        return found

    def slice_of(
        self, place: Place, lora: Delta, signature: Tensor, *, gated: bool
    ) -> tuple[Delta, Tensor]:
        """What this tensor-parallel rank needs of an expert's module; see the function."""
        return slice_of(self._modules[place.layer], place, lora, signature, gated=gated)

    def _checked(self, place: Place, module: str, who: str) -> Place:
        name, layer = place.layer, self._modules[place.layer]
        if type(layer) not in KNOWN or name.rpartition(".")[2] in NEVER_RUN:
            raise RoutingError(
                f"{who}: adapts {module}, which vLLM computes in a {type(layer).__name__} that is "
                "not run as an ordinary linear layer. Leave the module out of the adapter."
            )
        if not place.shards:
            raise RoutingError(
                f"{who}: adapts {module}, which vLLM's {type(self._model).__name__} may keep in "
                "another order of rows than the base. Leave the module out of the adapter."
            )
        return place

    def _parts_of(self, name: str, layer: Any) -> dict[str, Place]:
        parent, dot, last = name.rpartition(".")
        names = self._packed.get(last, [last])
        shards = range(len(getattr(layer, "output_partition_sizes", [0])))
        mine: list[tuple[int, ...]]
        if len(names) == len(shards):
            mine = [(shard,) for shard in shards]
        elif len(names) == 1 and last in self._packed and last in MERGED_ON_DISK:
            mine = [tuple(shards)]
        else:
            mine = [() for _ in names]
        return {
            parent + dot + leaf: Place(name, number, len(names), mine[number])
            for number, leaf in enumerate(names)
        }

    def _is_elsewhere(self, name: str) -> bool:
        parents = [name[:end] for end, letter in enumerate(name) if letter == "."]
        return any(isinstance(self._modules.get(parent), PPMissingLayer) for parent in parents)

    def _why_not(self, name: str) -> str:
        kind = type(self._model).__name__
        found = self._modules.get(name)
        if found is not None:
            return (
                f"which is a {type(found).__name__} in vLLM's {kind}: only linear layers can be "
                "routed, not embeddings or output heads. Leave the module out of the adapter."
            )
        return (
            f"and vLLM's {kind} has no linear layer for it: experts of a mixture (fused there) "
            "cannot be routed. Leave the module out of the adapter."
        )


def slice_of(
    layer: Any, place: Place, lora: Delta, signature: Tensor, *, gated: bool
) -> tuple[Delta, Tensor]:
    """What this tensor-parallel rank needs of a LoRA [R, I], [O, R] and a signature [W].

    A gate (W = I) is cut to the rank's slice of the features. Other signatures stay whole.
    """
    if is_row_parallel(layer):
        width = layer.input_size_per_partition
        mine = slice(layer.tp_rank * width, (layer.tp_rank + 1) * width)
        return replace(lora, a=lora.a[:, mine]), signature[mine] if gated else signature
    whole = isinstance(layer, ReplicatedLinear | RowParallelLinear)
    rank, ranks = (0, 1) if whole else (layer.tp_rank, layer.tp_size)
    rows, start = [], 0
    for shard in place.shards:
        size, replicas = layer.output_partition_sizes[shard], _replicas(layer, shard)
        first = start + rank // replicas * size
        rows.append(lora.b[first : first + size])
        start += size * ranks // replicas
    if start != lora.out_features:
        raise RoutingError(
            f"{place.layer}: has {start} outputs in vLLM, the adapter {lora.out_features}."
        )
    return replace(lora, b=rows[0] if len(rows) == 1 else torch.cat(rows)), signature


def is_row_parallel(layer: Any) -> bool:
    """Whether each of several ranks sees a slice of the layer's input."""
    return isinstance(layer, RowParallelLinear) and layer.tp_size > 1


def input_size(layer: Any) -> int:
    """Features of the layer's input on this rank."""
    size: int = layer.input_size_per_partition if is_row_parallel(layer) else layer.input_size
    return size


def output_sizes(layer: Any, parts: int) -> list[int]:
    """Features of the output of each part on this rank."""
    sizes: list[int] = list(layer.output_partition_sizes)
    return sizes if parts == len(sizes) else [sum(sizes)]


def _replicas(layer: Any, shard: int) -> int:
    """How many ranks hold the same rows, because keys and values have fewer heads than ranks."""
    return layer.num_kv_head_replicas if isinstance(layer, QKVParallelLinear) and shard else 1


def _names_only(mapper: Any) -> Any:
    """The mapper without its packing of several weights into one, which we do ourselves."""
    stacked = getattr(mapper, "orig_to_new_stacked", None)
    return replace(mapper, orig_to_new_stacked={}) if stacked else mapper
