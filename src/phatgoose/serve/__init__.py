"""Routed pools inside vLLM: a plugin that adds the load format "phatgoose".

vLLM finds `register` by the entry point in the group "vllm.general_plugins" and calls it in every
process it starts. A plugin that fails leaves the load format unknown, and vLLM refuses to start.
"""

LOAD_FORMAT = "phatgoose"  # also the key of our settings in vLLM's additional_config


def register() -> None:
    """Tell vLLM of our load format; may be called more than once."""
    from vllm.model_executor.model_loader import register_model_loader

    from phatgoose.serve.loader import PhatgooseLoader

    register_model_loader(LOAD_FORMAT)(PhatgooseLoader)
