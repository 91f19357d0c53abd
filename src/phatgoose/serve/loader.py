"""The load format "phatgoose": vLLM's own loader, and then the pool."""

import copy
from typing import Any

from torch import nn
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from phatgoose.serve import LOAD_FORMAT
from phatgoose.serve.attach import attach, load_pool
from phatgoose.serve.settings import ServeSettings

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
        pool = load_pool(model_config, settings)  # may fail, so it comes before the weights
        model: nn.Module = inner.load_model(**base)
        extra[LAYOUT] = attach(model, pool, settings)
        return model

    def _inner(self, load_format: str) -> Any:
        config = copy.copy(self.load_config)
        config.load_format = load_format
        return get_model_loader(config)
