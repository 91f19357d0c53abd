"""Routed pools inside vLLM: a plugin that adds the load format "phatgoose".

Three storeys. `engine` works inside vLLM and alone imports it; `pool` keeps what is served, in
which slot and for which request, and needs torch only; `http` is what the server adds to vLLM's
routes, and speaks to the engine by messages. `offline` is the pool of a `vllm.LLM`.

vLLM finds `register` by the entry point in the group "vllm.general_plugins" and calls it in every
process it starts. A plugin that fails leaves the load format unknown, and vLLM refuses to start.
"""


def register() -> None:
    """Tell vLLM of our load format; may be called more than once."""
    from phatgoose.serve.engine.loader import register  # vLLM may not be installed

    register()
