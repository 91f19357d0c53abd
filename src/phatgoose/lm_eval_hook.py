"""Makes `lm_eval --model phatgoose` work where lm_eval itself looks for no plugins.

Later versions find our model by the entry point in the group "lm_eval.models". Up to 0.4.13
lm_eval resolves `--model` against its own list, before any code of ours could run. But it imports
torch, and torch calls every entry point in the group "torch.backends", which is meant for the
libraries of other devices. Ours does nothing unless lm_eval was imported before. Whoever sets
TORCH_DEVICE_BACKEND_AUTOLOAD=0 turns it off, and imports `phatgoose.evaluation.harness` instead.
"""

import sys

NAME = "phatgoose"
MODEL = "phatgoose.evaluation.harness:PhatgooseLM"  # loaded when it is asked for


def register() -> None:
    """Add our model to lm_eval's list, if this process has imported lm_eval."""
    if "lm_eval" not in sys.modules:
        return
    try:
        import lm_eval.models  # noqa: F401  # first its own: it adds them only to an empty list
        from lm_eval.api.registry import model_registry
    except ImportError:  # another version; an error here would break `import torch`
        return
    if NAME not in model_registry:
        model_registry.register(NAME, target=MODEL)
