"""How a routed layer computes: as vLLM would, and then its chosen experts on top."""

from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import (
    tensor_model_parallel_all_gather,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

from phatgoose.nn import Bank, RoutingSettings
from phatgoose.ops import Rows
from phatgoose.serve.engine import operators

BANK = "phatgoose_bank"  # the name of the bank among the layer's submodules
# Of the bank's buffers, those that all banks of a model share; see `Batch` and `Usage`, and for
# the last one `operators`.
PRIOR, TALLY, TURN = "prior", "tally", "turn"
ROWS = tuple(f"row_{name}" for name in Rows._fields)  # where requests may have mixtures; `RowTable`


class RoutedMethod(QuantizeMethodBase):  # type: ignore[misc]
    """Stands in for a layer's `quant_method`, which every kind of linear layer calls.

    So the layer keeps its name, its class and its own communication. In a row-parallel layer each
    rank adds its part of the sum, and the layer's own all-reduce completes it.
    """

    def __init__(
        self,
        inner: Any,
        bank: Bank,
        settings: RoutingSettings,
        *,
        features: int,
        router: str | None = None,
    ) -> None:
        self.inner = inner
        self.settings = settings
        self.features = features  # of the layer's whole input
        self.router = router  # None: scores are gates'
        self.shared = features > bank.a.shape[3]  # a rank sees a slice of the input
        for name in ("requires_device_loading", "uses_meta_device"):
            setattr(self, name, getattr(inner, name, getattr(QuantizeMethodBase, name, False)))

    def create_weights(self, layer: nn.Module, *arguments: Any, **more: Any) -> None:
        self.inner.create_weights(layer, *arguments, **more)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        self.inner.process_weights_after_loading(layer)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        bank: Bank = getattr(layer, BANK)
        flat = x.reshape(-1, x.shape[-1])
        gates, a = bank.view(range(bank.parts))
        whole = None
        if self.shared and self.router is None:
            signatures = bank.signatures[:, : gates.open.shape[1]].flatten(0, 1)
            whole = operators.gate_statistics(flat, signatures)
            whole = tensor_model_parallel_all_reduce(whole)
        elif self.shared:
            whole = tensor_model_parallel_all_gather(flat)
        rows = [getattr(bank, name) for name in ROWS if hasattr(bank, name)]
        if rows:  # plain torch scores then
            gates = gates._replace(
                signatures=bank.signatures[:, : gates.open.shape[1]].flatten(0, 1)
            )
        turn = getattr(bank, TURN)
        torch.ops.phatgoose.fork_(turn, flat, whole)
        output: Tensor = self.inner.apply(layer, x, bias).contiguous()
        torch.ops.phatgoose.add_routed_(
            output.view(-1, output.shape[-1]),
            turn,
            flat,
            whole,
            *gates,
            a,
            [bank.b(part) for part in range(bank.parts)],
            getattr(bank, PRIOR, None),
            getattr(bank, TALLY, None),
            rows,
            self.features,
            self.router,
            bank.backend,
            *self.settings.choosing(gates.open.shape[1]),
        )
        return output
