"""What our worker adds to vLLM's: requests choose experts, and the pool may change."""

import itertools
import logging
import traceback
from pkgutil import resolve_name
from typing import Any

import torch
from torch import nn

from phatgoose.errors import ConfigError, PhatgooseError, first_line
from phatgoose.experts import load_expert
from phatgoose.serve.pool.batch import Batch
from phatgoose.serve.pool.settings import ServeSettings, served_router
from phatgoose.serve.pool.slots import Slots
from phatgoose.serve.pool.usage import report
from phatgoose.text import visible

log = logging.getLogger(__name__)

HANDLE = "phatgoose_live"  # the model's attribute by which the loader tells the worker


class RoutedRunner:
    """A mixin in front of vLLM's model runner, which tells the layers who is in the batch.

    All of it happens outside of the model, and so outside of compiled code and CUDA graphs. vLLM
    has two kinds of runners. V1 says "override `_model_forward`". V2 puts the batch in order in a
    step of its own, `prepare_inputs`.
    """

    phatgoose_batch: Batch | None = None

    def execute_model(self, scheduler_output: Any, *arguments: Any, **more: Any) -> Any:
        run = super().execute_model  # type: ignore[misc]
        batch = self.phatgoose_batch
        if batch is None or more.get("dummy_run"):
            return run(scheduler_output, *arguments, **more)
        self._phatgoose_step = scheduler_output
        batch.begin(scheduler_output)
        result = run(scheduler_output, *arguments, **more)
        batch.end(scheduler_output)
        return result

    def _model_forward(self, *arguments: Any, **more: Any) -> Any:
        batch = self.phatgoose_batch
        if batch is not None:
            scheduled = self._phatgoose_step.num_scheduled_tokens
            requests = list(self.input_batch.req_ids)  # type: ignore[attr-defined]
            ids = more.get("input_ids", arguments[0] if arguments else None)
            batch.place(requests, [scheduled[request] for request in requests], ids)
        return super()._model_forward(*arguments, **more)  # type: ignore[misc]

    def prepare_inputs(self, *arguments: Any, **more: Any) -> Any:
        inputs = super().prepare_inputs(*arguments, **more)  # type: ignore[misc]
        batch = self.phatgoose_batch
        if batch is not None:
            ends = inputs.query_start_loc_np[: inputs.num_reqs + 1].tolist()
            counts = [end - start for start, end in itertools.pairwise(ends)]
            batch.place(inputs.req_ids[: inputs.num_reqs], counts, inputs.input_ids)
        return inputs


class LiveWorker:
    """A mixin in front of vLLM's worker. `collective_rpc` calls its methods by name.

    They take strings and return JSON. If something cannot be done, the answer has an "error" and
    nothing changes on this rank.
    """

    phatgoose_slots: Slots
    phatgoose_batch: Batch

    def load_model(self, *arguments: Any, **more: Any) -> None:
        super().load_model(*arguments, **more)  # type: ignore[misc]
        runner: Any = self.model_runner  # type: ignore[attr-defined]
        handle = getattr(runner.get_model(), HANDLE, None)
        if handle is None:
            raise ConfigError(
                'phatgoose: the worker is ours, and the model is not. Load it with load_format="'
                'phatgoose", or leave worker_cls out.'
            )
        self.phatgoose_slots, self.phatgoose_batch = handle
        kind = type(runner)
        runner.__class__ = type(f"Routed{kind.__name__}", (RoutedRunner, kind), {})
        runner.phatgoose_batch = self.phatgoose_batch

    def phatgoose_pool(self) -> dict[str, Any]:
        """Return the experts, and how many there may be. Every rank gives the same."""
        recorded = self.phatgoose_batch.usage is not None
        return {**self.phatgoose_slots.describe(), "routing": recorded}

    def phatgoose_prepare(self, name: str, source: str) -> dict[str, str | None]:
        """Check an expert and hold it ready under `name`; nothing that is served changes.

        It forgets one that it held before. The caller compares the hash of what was read, which
        must be the same on all ranks.
        """
        try:
            self.phatgoose_slots.abort()
            resident = self.phatgoose_slots.prepare(load_expert(source, name=name))
        except Exception as error:  # a rank that raised would leave the others waiting
            return _failed(error)
        return {"error": None, "sha256": resident.sha256}

    def phatgoose_commit(self) -> dict[str, str | None]:
        """Serve the expert that was prepared, from the next forward on."""
        return self._phatgoose_change(self.phatgoose_slots.commit)

    def phatgoose_abort(self) -> dict[str, str | None]:
        """Forget the expert that was prepared, if there is one."""
        return self._phatgoose_change(self.phatgoose_slots.abort)

    def phatgoose_remove(self, name: str) -> dict[str, str | None]:
        return self._phatgoose_change(lambda: self.phatgoose_slots.remove(name))

    def phatgoose_routing(self, request_id: str) -> dict[str, Any]:
        """Return which experts served a request that asked for it, once. See `Usage.take`."""
        usage = self.phatgoose_batch.usage
        found = [] if usage is None else usage.take(request_id)
        if not found:
            return {"error": f"{request_id}: no routing of such a request was recorded."}
        return report(found)

    def phatgoose_totals(self) -> dict[str, Any]:
        """Return counts since the start: tokens by expert, mean entropy of the shares in nats."""
        batch = self.phatgoose_batch
        if batch.usage is None:
            return {"error": 'phatgoose: not recorded. Set "routing": true.'}
        return batch.usage.totals(batch.names)

    def _phatgoose_change(self, change: Any) -> dict[str, str | None]:
        try:
            with torch.inference_mode():
                change()
        except Exception as error:
            return _failed(error)
        return {"error": None}


def hand_over(model: nn.Module, slots: Slots, batch: Batch) -> None:
    object.__setattr__(model, HANDLE, (slots, batch))


def is_ours(worker_cls: Any) -> bool:
    """Whether the engine's workers are ours, so that requests may choose."""
    return isinstance(worker_cls, str) and issubclass(resolve_name(worker_cls), LiveWorker)


def check_ways(config: Any, settings: ServeSettings, *, chooses: bool) -> None:
    """Raise ConfigError if a row of the batch may be anything but a token whose request we know.

    `config` is vLLM's.
    """
    if settings.record_routing and not chooses:
        raise ConfigError('phatgoose: "routing" wants worker_cls="phatgoose.serve.worker.Worker".')
    if settings.max_mixture and not chooses:
        raise ConfigError(
            'phatgoose: max_mixture wants worker_cls="phatgoose.serve.worker.Worker".'
        )
    if not settings.experts and not chooses:
        raise ConfigError(
            "phatgoose: experts is empty, and only worker_cls="
            '"phatgoose.serve.worker.Worker" can add some.'
        )
    router = served_router(settings.router)
    evidence = router.weighs_ids
    if evidence and not chooses:
        raise ConfigError(
            f"phatgoose: the router {settings.router!r} wants "
            'worker_cls="phatgoose.serve.worker.Worker".'
        )
    if not chooses:
        return
    parallel, cache = config.parallel_config, config.cache_config
    if evidence and router.ahead and cache.enable_prefix_caching:
        raise ConfigError(
            f"phatgoose: with the router {settings.router!r} what a token does depends on the rest "
            "of its prompt, so prompts cannot share a prefix. Turn prefix caching off "
            "(--no-enable-prefix-caching), or use evidence."
        )
    ways = {
        "microbatches (dbo)": getattr(parallel, "use_ubatching", False),
        "prefill context parallelism": getattr(parallel, "prefill_context_parallel_size", 1) > 1,
        "sequence parallel mixtures": getattr(parallel, "use_sequence_parallel_moe", False),
        "kv_sharing_fast_prefill": getattr(cache, "kv_sharing_fast_prefill", False),
        "encoder-decoder models": config.model_config.is_encoder_decoder,
        "routing with pipeline parallelism": settings.record_routing
        and parallel.pipeline_parallel_size > 1,
        "evidence with pipeline parallelism": evidence and parallel.pipeline_parallel_size > 1,
        "evidence with inputs other than token ids": evidence
        and (config.model_config.enable_prompt_embeds or config.model_config.is_multimodal_model),
        "evidence with speculative decoding": evidence and config.speculative_config is not None,
    }
    for way, is_on in ways.items():
        if is_on:
            raise ConfigError(
                f"phatgoose: with {way} requests cannot choose experts. Serve without it, or "
                "without worker_cls."
            )


def _failed(error: Exception) -> dict[str, str | None]:
    """The answer about an error. A stranger's file may have put anything into the error's text."""
    log.warning("refused: %s", visible(str(error)))
    if not isinstance(error, PhatgooseError):
        log.warning("raised here:\n%s", "".join(traceback.format_tb(error.__traceback__)))
    return {"error": f"{type(error).__name__}: {visible(first_line(error))}"}
