"""The routed pool as a model of EleutherAI's lm-evaluation-harness (`lm_eval`).

lm_eval --model phatgoose --model_args experts=EXPERTS,top_k=2 --tasks hellaswag

lm_eval.simple_evaluate(model=PhatgooseLM(experts="EXPERTS"), tasks=["hellaswag"])
"""

import inspect
import logging
import os
from collections.abc import Sequence
from typing import Any

import torch

import phatgoose
from phatgoose.errors import ConfigError
from phatgoose.experts import expert_sources
from phatgoose.models import DEFAULT as DEFAULT_BASE
from phatgoose.models import best_device, load_base
from phatgoose.nn.settings import KNOBS
from phatgoose.pool import ExpertPool

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
    from lm_eval.utils import simple_parse_args_string
except ImportError as error:
    raise ConfigError(
        f"phatgoose as a model of lm_eval needs the lm_eval package ({error}): "
        "pip install 'phatgoose[eval]'"
    ) from error

log = logging.getLogger(__name__)

DEFAULT = "default"  # the base, or the experts, in the package
SEPARATOR = ";"  # between experts: lm_eval has taken the comma
# What HFLM understands and a model that is loaded already leaves it to do.
HARNESS = (
    "add_bos_token",
    "chat_template_args",
    "enable_thinking",
    "logits_cache",
    "max_batch_size",
    "max_length",
    "prefix_token_id",
    "softmax_dtype",
    "think_end_token",
    "truncation",
)


@register_model("phatgoose")
class PhatgooseLM(HFLM):
    """lm_eval's own Hugging Face model, on a base that `phatgoose.route` has changed.

    Prompts, tokens, truncation, batches and scores are those of `--model hf`, so its numbers and
    ours compare. Each continuation is scored in a forward of its own and so under its own routing;
    answers of one token to one prompt share it, since no token of theirs is read (`logits_cache`).

    Args:
        base: folder, Hub id or "tiny" ("default": that of commands without a base).
        experts: expert folders, folders of them, and Hub ids, several separated by ";" or as a
            list ("default": those in the package; "none": no experts, so the bare base).
        router: a router's name; "base" leaves the base as it is.
        device: as of `load_base`. lm_eval's command line says cuda:0 unless told another; without
            CUDA that means the default here too.
        dtype: "float32", "bfloat16", ... ("auto": fp32 on a CPU, bf16 elsewhere).
        batch_size: a number or "auto", see lm_eval.
        more: the knobs of `phatgoose.route` (`KNOBS`), which has the defaults, and arguments of
            HFLM, those in `HARNESS`.

    Raises:
        ConfigError: an argument that does not exist or cannot be; several processes.
        PhatgooseError: what `load_base`, `ExpertPool.load` and `route` raise.
    """

    def __init__(
        self,
        *,
        base: str = DEFAULT,
        experts: str | Sequence[str] | None = DEFAULT,
        router: str = "phatgoose",
        device: str | None = None,
        dtype: str | torch.dtype | None = None,
        batch_size: int | str = 1,
        **more: Any,
    ) -> None:
        knobs = {name: more.pop(name) for name in KNOBS if name in more}
        _check_arguments(more)
        _check_alone()
        options = {name: value for name, value in knobs.items() if not _is_none(value)}
        source = DEFAULT_BASE if base == DEFAULT else base
        sources = [] if router == "base" else _expert_sources(experts, source)
        pool = ExpertPool.load(sources)
        model, tokenizer = load_base(source, device=_device(device), dtype=_dtype(dtype))
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, **more)
        self.pretrained = str(source)  # what lm_eval looks up for its report
        if sources:
            phatgoose.route(model, pool, router, **options)
        self._made_of = {
            "version": phatgoose.__version__,
            "base": base,
            "router": router if sources else "base",
            "experts": pool.names,
            **(options if sources else {}),
        }

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> "PhatgooseLM":
        """Made from `--model_args`, which go before `--device` and `--batch_size`."""
        flags = {k: v for k, v in (additional_config or {}).items() if v is not None}
        return cls(**{**flags, **arg_dict})

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> "PhatgooseLM":
        """As `create_from_arg_obj`, from "name=value,name=value"."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    def get_model_info(self) -> dict[str, Any]:
        """What lm_eval writes into its results: HFLM's facts, and ours under "phatgoose"."""
        return {**super().get_model_info(), "phatgoose": self._made_of}

    def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
        for text, _, answer in requests:
            if not 0 < len(answer) <= self.max_length:
                raise ConfigError(
                    f"{text and text[1][:40]!r}: an answer of {len(answer)} tokens cannot be "
                    f"scored, the model reads 1 to {self.max_length}. Correct the task."
                )
        return super()._loglikelihood_tokens(requests, *args, **kwargs)


def _check_arguments(harness: dict[str, Any]) -> None:
    unknown = sorted(set(harness) - set(HARNESS))
    if unknown:
        ours = ("base", "experts", "router", *KNOBS, "device", "dtype", "batch_size")
        raise ConfigError(
            f"model_args: there is no {', '.join(unknown)}. Choose from: "
            f"{', '.join([*ours, *HARNESS])}."
        )
    known = inspect.signature(HFLM.__init__).parameters
    unknown = sorted(set(harness) - set(known))
    if unknown:  # it would take them into its **kwargs, and ignore them
        raise ConfigError(
            f"model_args: this version of lm_eval has no {', '.join(unknown)}. Leave it out, or "
            "pip install -U lm_eval."
        )
    if "_loglikelihood_tokens" not in vars(HFLM):  # where we look at the answers' lengths
        raise ConfigError(
            "this version of lm_eval scores answers in a way that phatgoose does not know: pip "
            "install lm_eval==0.4.13"
        )


def _check_alone() -> None:
    # With a model made by us HFLM does not share the work out: each process would do all of it.
    count = os.environ.get("WORLD_SIZE", "1")
    if count != "1":
        raise ConfigError(
            f"lm_eval runs in {count} processes, phatgoose in one only. Start it without "
            "accelerate or torchrun."
        )


def _is_none(value: Any) -> bool:
    return value is None or (isinstance(value, str) and value.lower() == "none")


def _expert_sources(experts: str | Sequence[str] | None, base: str) -> list[Any]:
    if experts is None or _is_none(experts):
        return []
    if experts == DEFAULT:
        return expert_sources(None, base)
    names = experts.split(SEPARATOR) if isinstance(experts, str) else experts
    given = [str(name).strip() for name in names]
    if not given or not all(given):
        raise ConfigError(
            f"experts: {experts!r} has an empty name. Separate names by {SEPARATOR!r}; "
            "experts=none is the bare base."
        )
    return expert_sources(given)


def _device(device: str | None) -> str | None:
    if device == "cuda:0" and not torch.cuda.is_available():
        log.warning("no CUDA here, so the device is %s", best_device())
        return None
    return device


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype == "auto" or _is_none(dtype):
        return None
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ConfigError(f"dtype: {dtype!r} is none. Give float32, bfloat16, float16 or auto.")
    return found
