"""A PEFT LoRA whose every module is scaled by a gate: W u + scale * B A u * sigmoid(v·u)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from phatgoose.errors import (
    ConfigError,
    TrainingError,
    UnsupportedAdapterError,
    UntrainedAdapterError,
)
from phatgoose.experts import LoraModule
from phatgoose.experts.base import base_name, linear_sizes
from phatgoose.experts.initial import initial
from phatgoose.experts.lora import refuse_unsupported
from phatgoose.train.loop.frozen import frozen
from phatgoose.train.loop.packed import Packed
from phatgoose.train.loop.placement import device_of, refuse_fsdp1, whole_weight

Layer = Any  # a peft LoraLayer
# Settings of adapters that are more than LoRA on linear layers.
MORE = ("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "target_parameters")


class GatedAdapter:
    """The LoRA layers of a PeftModel's active adapter, and a zero gate for each.

    While `installed()`, hooks multiply each lora_B's output by sigmoid(v·u), with u the layer's
    input, in fp32. PEFT computes everything else, so its classes stay as they are.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.adapter = _active_adapter(model)
        refuse_fsdp1(model)
        self.layers = dict(lora_layers(model, self.adapter))
        if not self.layers:
            raise ConfigError(f"adapter {self.adapter!r}: adapts no linear layer of this model.")
        if not any(self._is_trained(layer) for layer in self.layers.values()):
            raise UntrainedAdapterError(
                f"adapter {self.adapter!r}: every lora_B is zero, so gates would get no gradient. "
                "Train the adapter first, then its gates."
            )
        self.packed = Packed(
            {
                name: (
                    device_of(layer.lora_B[self.adapter]),
                    (layer.lora_A[self.adapter].in_features,),
                )
                for name, layer in self.layers.items()
            }
        )
        self.gates = self.packed.parameters
        self._scaled: set[str] = set()  # layers whose gate has been applied, with a gradient
        self._probing = False

    def modules(self) -> dict[str, LoraModule]:
        """The adapter as an expert would hold it, by module names of the base."""
        modules = {}
        for name, layer in self.layers.items():
            first, second = self._halves(layer)
            with whole_weight(first) as a, whole_weight(second) as b:
                modules[name] = LoraModule(a, b, scale=float(layer.scaling[self.adapter]))
        return modules

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Apply the gates, with everything else frozen and dropout off; then undo all of it."""
        handles = [h for name, layer in self.layers.items() for h in self._hook(name, layer)]
        try:
            with frozen(self.model):
                yield
        finally:
            for handle in handles:
                handle.remove()

    @property
    def unscaled(self) -> list[str]:
        """Layers whose gate has not been applied yet in a pass with gradients."""
        return [name for name in self.layers if name not in self._scaled]

    def check_reached(self, backward: Callable[[], object]) -> None:
        """Refuse `unscaled` layers that compute their LoRA around the gate.

        A gate scales what lora_B returns. A forward that reads lora_B's weight instead never calls
        it, so that its gate would stay zero. Layers that a batch does not reach are unscaled too;
        `backward` tells the two apart, running the model once more with gradients of the adapter.
        The gates' own gradients stay as they are.
        """
        weights = {name: self._halves(self.layers[name])[1].weight for name in self.unscaled}
        before = [gradient.clone() for gradient in self.packed.gradients]
        self._probing = True
        try:
            for name in self.layers:
                for half in self._halves(self.layers[name]):
                    half.requires_grad_(True)
            backward()
            around = [n for n, w in weights.items() if w.grad is not None and torch.any(w.grad)]
        finally:
            self._probing = False
            for gradient, kept in zip(self.packed.gradients, before, strict=True):
                gradient.copy_(kept)
            for layer in self.layers.values():
                for half in self._halves(layer):
                    half.requires_grad_(False)
                    half.weight.grad = None
        if around:
            more = f" and {len(around) - 1} more layers compute" if len(around) > 1 else " computes"
            raise TrainingError(
                f"{around[0]}{more} LoRA without calling lora_B, as patched and fused forwards do "
                "(unsloth's and compiled ones, for example), so a gate cannot be put there. Save "
                "the adapter and train its gates on the plain base: phatgoose gate FOLDER"
            )

    def _hook(self, name: str, layer: Layer) -> tuple[Any, Any]:
        gate = self.gates[name]
        inputs: list[Tensor] = []

        def keep_input(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            if layer.disable_adapters or self.adapter not in layer.active_adapters:
                return  # a reference's pass
            inputs[:] = args[:1]
            # PEFT thaws an adapter that it activates again, so after a reference's pass too.
            for half in self._halves(layer):
                half.requires_grad_(self._probing)

        def scale(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            (u,) = inputs
            inputs.clear()
            if torch.is_grad_enabled():
                self._scaled.add(name)
            with torch.autocast(output.device.type, enabled=False):
                # Where a device_map parts two layers, the input comes from another device.
                return output * torch.sigmoid(u.to(output.device).float() @ gate).unsqueeze(-1)

        lora_b = layer.lora_B[self.adapter]
        return layer.register_forward_pre_hook(keep_input), lora_b.register_forward_hook(scale)

    def _halves(self, layer: Layer) -> tuple[Any, Any]:
        return layer.lora_A[self.adapter], layer.lora_B[self.adapter]

    def _is_trained(self, layer: Layer) -> bool:
        with whole_weight(self._halves(layer)[1]) as b:
            return bool(torch.any(b))


def _active_adapter(model: nn.Module) -> str:
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        raise ConfigError(
            f"train_gates wants a peft.PeftModel with a trained LoRA, got {type(model).__name__}."
        )
    active = list(model.active_adapters)
    if len(active) != 1:
        raise ConfigError(f"one active adapter is wanted, got {active}. Call set_adapter(name).")
    config = model.peft_config[active[0]].to_dict()
    refuse_unsupported(config, f"adapter {active[0]!r}")
    more = [field for field in MORE if config.get(field)]
    more += ["bias"] if config.get("bias", "none") != "none" else []
    more += ["init_lora_weights"] if initial(config) else []
    if more:
        raise UnsupportedAdapterError(
            f"adapter {active[0]!r}: {more[0]} is set, so that it is more than lora_B and lora_A, "
            "whose output a gate could scale here. Save it, and train its gates on the plain base: "
            "phatgoose gate FOLDER, or phatgoose.train_gates_together."
        )
    return active[0]


def lora_layers(model: nn.Module, adapter: str) -> Iterator[tuple[str, Layer]]:
    """The layers that an adapter adapts, by module names of the base; raises for other kinds."""
    from peft.tuners.lora import LoraLayer

    for path, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        if adapter in module.lora_embedding_A:
            raise UnsupportedAdapterError(
                f"adapter {adapter!r}: has LoRA on the embedding {base_name(path)}, which has no "
                "lora_B whose output a gate could scale here. Save it, and train its gates on the "
                "plain base: phatgoose gate FOLDER, or phatgoose.train_gates_together."
            )
        if adapter in module.lora_A:
            if linear_sizes(module.get_base_layer()) is None:
                kind = type(module.get_base_layer()).__name__
                raise UnsupportedAdapterError(
                    f"adapter {adapter!r}: has LoRA on {base_name(path)}, a {kind}, which is not "
                    "supported. Train a LoRA on linear layers only."
                )
            if module.merged:
                raise ConfigError(f"adapter {adapter!r}: is merged. Call unmerge_adapter() first.")
            yield base_name(path), module
