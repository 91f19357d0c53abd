"""The load format "phatgoose": vLLM's own loader loads the base, then the pool joins."""

import copy
from typing import Any

from torch import nn
from vllm.model_executor.model_loader import get_model_loader, register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from phatgoose.serve.engine.attach import attach, layout, load_pool, steer
from phatgoose.serve.engine.layers import Layers
from phatgoose.serve.engine.runner import check_ways, hand_over, is_ours
from phatgoose.serve.names import LOAD_FORMAT
from phatgoose.serve.pool.settings import ServeSettings
from phatgoose.serve.pool.slots import Slots

# Beside the settings, where it enters the key of vLLM's compile cache: a graph that was compiled
# for other shapes must not be taken for this model.
LAYOUT = "phatgoose_layout"


class PhatgooseLoader(BaseModelLoader):  # type: ignore[misc]
    """Loads the base as vLLM would without us, then routes its layers.

    The pool is in place before vLLM measures memory, compiles, or captures graphs.
    """

    def download_model(self, model_config: Any) -> None:
        self._inner("auto").download_model(model_config)

    def load_weights(self, model: nn.Module, model_config: Any) -> None:
        self._inner("auto").load_weights(model, model_config)

    def load_model(self, vllm_config: Any, model_config: Any, prefix: str = "") -> nn.Module:
        extra = vllm_config.additional_config
        settings = ServeSettings.read(extra.get(LOAD_FORMAT) if isinstance(extra, dict) else None)
        inner = self._inner(settings.base_load_format)
        base = {"vllm_config": vllm_config, "model_config": model_config, "prefix": prefix}
        if model_config is not vllm_config.model_config:  # a draft of speculative decoding
            draft: nn.Module = inner.load_model(**base)
            return draft
        chooses = is_ours(vllm_config.parallel_config.worker_cls)
        check_ways(vllm_config, settings, chooses=chooses)
        pool, bare = load_pool(
            model_config, settings, grows=chooses
        )  # may fail: before the weights
        model: nn.Module = inner.load_model(**base)
        slots = Slots(Layers(model), bare, model_config.model, settings)
        attach(model, pool, slots)
        if chooses:
            tokens = vllm_config.scheduler_config.max_num_batched_tokens
            hand_over(model, slots, steer(slots, pool, model_config, tokens))
        extra[LAYOUT] = layout(slots)
        return model

    def _inner(self, load_format: str) -> Any:
        config = copy.copy(self.load_config)
        config.load_format = load_format
        return get_model_loader(config)


def register() -> None:
    """Tell vLLM of our load format; may be called more than once."""
    register_model_loader(LOAD_FORMAT)(PhatgooseLoader)
