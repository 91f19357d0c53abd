"""Writes what each request of a batch wants of the pool to where the layers read it."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from phatgoose.errors import ConfigError, RoutingError
from phatgoose.serve.names import REQUEST
from phatgoose.serve.pool.choice import Request
from phatgoose.serve.pool.evidence import Evidence
from phatgoose.serve.pool.rows import RowTable
from phatgoose.serve.pool.usage import Usage
from phatgoose.text import visible

log = logging.getLogger(__name__)


class Batch:
    """The prior of a running model: a row for each token of a forward, where -inf closes a slot.

    It is one fp32 buffer [N, C] that every layer reads, also within a CUDA graph. While no request
    wants anything, it is all zeros and nobody writes to it. A router with evidence has `evidence`,
    whose priors are written for every forward.
    """

    def __init__(self, tokens: int, capacity: int, device: torch.device, *, routing: bool) -> None:
        self.prior = torch.zeros(tokens, capacity, device=device)
        self.usage = Usage(tokens, capacity, device) if routing else None
        self.evidence: Evidence | None = None
        self.own: RowTable | None = None  # what requests ask for themselves
        self.names: list[str | None] = [None] * capacity  # by slot
        self._choices: dict[str, Request] = {}  # of running requests that want something
        self._lost: set[str] = set()  # those whose experts are gone
        self._rows: dict[str, Tensor] = {}  # and their priors [C], on the host
        self._written = 0  # rows of `prior` that may be other than zero
        self._first: dict[str, int] = {}  # positions at which requests go on
        self._known: dict[str, Sequence[int]] = {}  # ids of those that were interrupted
        self._placed: tuple[Sequence[str], Sequence[int]] | None = None

    def rename(self, names: Sequence[str | None]) -> None:
        """The pool has changed: these are the experts now, by slot."""
        if self.usage is not None:
            self.usage.settle(self.names)
            self.usage.keep(names)
        self.names = list(names)
        self._lost.clear()
        for request, choice in self._choices.items():
            try:
                self._rows[request] = self._row(choice)
            except ConfigError as error:
                why = visible(f"{request} goes on with the base alone: {error}")
                log.error("request %s", why)
                self._rows[request] = torch.full((len(self.names),), -torch.inf)
                self._lost.add(request)

    def begin(self, step: Any) -> None:
        """Take note of the requests in vLLM's `SchedulerOutput` for the next forward."""
        self._placed = None
        for request in step.finished_req_ids:
            self._forget(request)
            if self.usage is not None:
                self.usage.finish(request)
            if self.evidence is not None:
                self.evidence.finish(request)
        for new in step.scheduled_new_reqs:
            self._forget(new.req_id)
            wanted = (getattr(new.sampling_params, "extra_args", None) or {}).get(REQUEST)
            if self.evidence is not None:
                self.evidence.start(new.req_id, new.prompt_token_ids)
            if wanted is not None:
                self._start(new, wanted)
        again = step.scheduled_cached_reqs
        if self.usage is not None or self.evidence is not None:
            self._first = {new.req_id: new.num_computed_tokens for new in step.scheduled_new_reqs}
            self._first |= dict(zip(again.req_ids, again.num_computed_tokens, strict=True))
        if self.evidence is not None:
            # V1 says so of requests that go on, V2 has them come as new ones.
            coming = {new.req_id: new for new in step.scheduled_new_reqs}
            found = {name: getattr(new, "prefill_token_ids", None) for name, new in coming.items()}
            self._known = {n: ids for n, ids in found.items() if ids} | again.all_token_ids

    def place(
        self, requests: Sequence[str], counts: Sequence[int], ids: Tensor | None = None
    ) -> None:
        """Write the prior of the next forward.

        Give the requests in the order of their tokens, how many tokens each has, and the ids [T].
        Raises RoutingError if a router with evidence gets no ids.
        """
        self._placed = requests, counts
        tokens = sum(counts)
        if self.usage is not None:
            self.usage.clear(tokens)
        parts = []
        if self.evidence is not None:
            if ids is None:
                raise RoutingError("phatgoose: a forward of embeddings, evidence needs token ids.")
            read = self.evidence.read(
                requests, counts, ids[:tokens].long(), first=self._first, known=self._known
            )
            parts.append(read)
        if self._rows and any(request in self._rows for request in requests):
            everything = torch.zeros(len(self.names))
            rows = torch.stack([self._rows.get(request, everything) for request in requests])
            which = torch.arange(len(requests)).repeat_interleave(torch.tensor(counts))
            parts.append(self.there(rows)[self.there(which)])
        if self.own is not None:
            choices = [
                None if request in self._lost else self._choices.get(request)
                for request in requests
            ]
            self.own.place(choices, counts, self.names, self.there)
        if parts:
            self.prior[:tokens] = sum(parts)
            self.prior[tokens : max(tokens, self._written)].zero_()
            self._written = tokens
        elif self._written:
            self.prior[: self._written].zero_()
            self._written = 0

    def end(self, step: Any) -> None:
        """Take note of what the forward did. Raises RoutingError if vLLM never called `place`."""
        if self._placed is not None:
            if self.usage is not None:
                self.usage.add(*self._placed, self._first)
        elif step.num_scheduled_tokens and (
            self.evidence is not None
            or any(request in self._rows for request in step.num_scheduled_tokens)
        ):
            raise RoutingError(
                "phatgoose: this vLLM runs models in a way that neither evidence nor the settings "
                "of requests reach. Serve without worker_cls, or with a version of vLLM that was "
                "tested."
            )

    def there(self, table: Tensor) -> Tensor:
        """Copy to the model's device without waiting for the GPU's queued work."""
        table = table.pin_memory() if self.prior.is_cuda else table
        return table.to(self.prior.device, non_blocking=True)

    def _start(self, new: Any, wanted: Any) -> None:
        try:
            choice = Request.read(wanted)
            row = self._row(choice)
            choice.check_room(self._room())
            if choice.routing and self.usage is None:
                raise ConfigError(
                    "phatgoose: a request wants its routing, which is not recorded. Set "
                    '"routing": true in additional_config["phatgoose"].'
                )
        except ConfigError as error:
            # Whoever sends requests is to check them; one that slips through must neither be served
            # by other experts nor stop the engine.
            why = visible(f"{new.req_id} is refused, its answer is left empty: {error}")
            log.error("request %s", why)
            new.sampling_params = _silent(new.sampling_params)
            return
        self._choices[new.req_id], self._rows[new.req_id] = choice, row
        if self.usage is not None and choice.routing:
            self.usage.start(new.req_id, self.names, with_tokens=choice.routing == "tokens")

    def _forget(self, request: str) -> None:
        self._choices.pop(request, None)
        self._rows.pop(request, None)
        self._lost.discard(request)

    def _room(self) -> dict[str, Any]:
        """What a request may ask for, as `phatgoose_pool` tells it."""
        places, scale = (self.own.places, self.own.routing.scale) if self.own else (0, "softmax")
        return {"mixture": places, "scale": scale, "capacity": len(self.names)}

    def _row(self, choice: Request) -> Tensor:
        routed = choice.routed([name for name in self.names if name is not None])
        closed = [name not in routed for name in self.names]
        return torch.zeros(len(closed)).masked_fill_(torch.tensor(closed), -torch.inf)


def _silent(params: Any) -> Any:
    """Sampling that can only stop, because vLLM has no way for a worker to refuse a request."""
    params = params.clone()
    params.allowed_token_ids = [min(params.all_stop_token_ids, default=0)]
    params.min_tokens = 0
    return params
