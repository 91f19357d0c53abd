"""The pool that the engine serves: what it is made of, and how it changes while requests come."""

import asyncio
import json
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, fields
from typing import Any

from phatgoose.serve.http.metrics import Metrics
from phatgoose.serve.http.recent import EVERY, Recent, Totals
from phatgoose.serve.http.refusal import Refusal
from phatgoose.serve.http.turnstile import Turnstile

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Contents:
    """The pool between two changes, on which all workers agree."""

    generation: int
    fingerprint: str
    capacity: int
    max_rank: int
    experts: list[dict[str, Any]] = field(default_factory=list)
    routing: bool = True  # whether workers note which experts serve what
    mixture: int = 0  # the most experts that a request may mix; 0: requests have no knobs
    scale: str = "softmax"  # how the router's experts are weighed

    @property
    def names(self) -> list[str]:
        return [expert["name"] for expert in self.experts]


@dataclass(frozen=True)
class Took:
    """How long a change took, in seconds."""

    drain: float  # until no request was under way
    change: float  # from then on


class LivePool:
    """Speaks to the workers through vLLM's engine client, with `collective_rpc`.

    With data parallelism there are several engines, each with its workers and some of the requests.
    """

    def __init__(self, engine: Any, metrics: Metrics, *, drain: float) -> None:
        self._engine, self._metrics, self._drain = engine, metrics, drain
        self._changing = asyncio.Lock()
        self._turnstile = Turnstile()
        self._recent = Recent()
        self._contents: Contents | None = None
        self.broken: str | None = None  # why nothing can be served any more

    @property
    def contents(self) -> Contents:
        assert self._contents is not None, "start comes first"
        return self._contents

    @property
    def recent(self) -> Recent:
        return self._recent

    async def start(self) -> None:
        """Ask what is served. Raises if workers are not ours, do not agree, or cannot tell."""
        config = getattr(self._engine, "vllm_config", None)
        engines = config.parallel_config.data_parallel_size if config else 1
        if engines > 1 and self._ask_engines() is None:
            raise RuntimeError(
                "phatgoose: this vLLM does not tell what its other data-parallel engines answer. "
                "Serve without --data-parallel-size, or with vLLM 0.32."
            )
        await self._read()
        await self.sample()

    @asynccontextmanager
    async def request(self) -> AsyncIterator[Contents]:
        """The pool, which stays what it is until the request has ended. Raises Refusal."""
        async with self._turnstile.request():
            if self.broken:  # since it came to the turnstile
                raise Refusal(503, self.broken, reason="broken")
            yield self.contents

    async def add(self, name: str, folder: str) -> Contents:
        """Add an expert once all workers hold it and no request is under way. Raises Refusal."""
        async with self._changing:
            before = self.contents
            if name in before.names:
                raise Refusal(
                    409,
                    f"The pool has an expert {name!r}. Remove it first, or give another name.",
                    reason="exists",
                    param="name",
                )
            if len(before.experts) >= before.capacity:
                raise Refusal(
                    409,
                    f"The pool is full with {before.capacity} experts. Remove one, or start the "
                    "server with a larger --capacity.",
                    reason="full",
                )
            try:
                held = await self._ask_all("phatgoose_prepare", name, folder, param="source")
                if len({answer["sha256"] for answer in held}) > 1:
                    raise Refusal(
                        400,
                        f"{folder}: is not the same for all workers. Do they share its disk?",
                        reason="expert",
                        param="source",
                    )
                after, took = await self._change(lambda: self._ask_all("phatgoose_commit"))
            except BaseException:
                if not self.broken:
                    await self._rpc("phatgoose_abort")
                raise
            self._tell("added", name, after, took)
            return after

    async def remove(self, name: str) -> Contents:
        """Remove an expert once no request is under way. Raises Refusal."""
        async with self._changing:
            if name not in self.contents.names:
                raise Refusal(404, f"The pool has no expert {name!r}.", reason="unknown_expert")
            after, took = await self._change(lambda: self._ask_all("phatgoose_remove", name))
            self._metrics.forget(name)
            self._tell("removed", name, after, took)
            return after

    async def routing(self, request: str) -> dict[str, Any]:
        """Which experts served a request of the engine, now that it has ended."""
        answers = await self._rpc("phatgoose_routing", request)
        knowing = [answer for answer in answers if "shares" in answer]
        if not knowing:
            raise LookupError(answers[0].get("error", "no worker knows"))
        shares = [answer["shares"] for answer in knowing]
        names = {name for share in shares for name in share}
        # Tensor-parallel ranks say the same; pipeline stages speak of a part of the layers each.
        mean = {n: round(sum(s.get(n, 0.0) for s in shares) / len(shares), 6) for n in names}
        ordered = sorted(mean.items(), key=lambda item: (-item[1], item[0]))
        return {**knowing[0], "shares": dict(ordered)}

    async def sample(self) -> None:
        """Add what was routed since the last time to the metrics and the shares."""
        if not self.contents.routing:
            return
        tokens, entropy, count = Counter[str](), 0.0, 0.0
        for totals, *_ in await self._rpc_by_engine("phatgoose_totals"):
            # Of experts that are there now: counters of others have ended.
            present = self.contents.names
            tokens.update({n: count for n, count in totals["tokens"].items() if n in present})
            entropy += totals["entropy"] * totals["count"]
            count += totals["count"]
        grown = self._recent.add(Totals(tokens, entropy, count))
        over = self._recent.grown()
        self._metrics.routed(grown.tokens, over.entropy / over.count if over.count else None)

    def watch(self) -> "asyncio.Task[None]":
        """Sample every few seconds, until cancelled."""
        return asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(EVERY)
            try:
                await self.sample()
            except Exception as error:
                log.error("%s", json.dumps({"event": "totals_lost", "error": str(error)[:500]}))

    async def _change(self, act: Callable[[], Awaitable[Any]]) -> tuple[Contents, Took]:
        """Act while nothing runs and nothing is cached, and see that all workers agree."""
        start = time.monotonic()
        try:
            async with self._turnstile.change(self._drain):
                try:
                    # Requests whose clients went away may still be on their way out.
                    left = max(1.0, start + self._drain - time.monotonic())
                    await asyncio.wait_for(
                        self._engine.pause_generation(mode="wait", clear_cache=True), left
                    )
                    drained = time.monotonic()
                    # Before the change, so that a failure changes nothing; nothing runs between.
                    if not await self._engine.reset_prefix_cache():
                        raise Refusal(503, "The prefix cache is in use. Try again.", reason="busy")
                    after = await self._act(act)
                    return after, Took(drained - start, time.monotonic() - drained)
                finally:
                    if not self.broken:
                        await self._engine.resume_generation()
        except (TimeoutError, asyncio.TimeoutError):
            raise Refusal(
                503,
                f"Requests are still running after {self._drain:g} seconds, so nothing was "
                "changed. Try again.",
                reason="busy",
            ) from None

    async def _act(self, act: Callable[[], Awaitable[Any]]) -> Contents:
        before = self.contents
        try:
            await act()
        except Exception as error:
            # Refused by all workers alike, it is an answer; else some have changed and some not.
            if await self._read_or_break() == before:
                raise
            self._break(f"a change failed midway: {error}")
            raise Refusal(503, self.broken or "", reason="broken") from error
        if await self._read_or_break() is None:
            raise Refusal(503, self.broken or "", reason="broken")
        return self.contents

    async def _read_or_break(self) -> Contents | None:
        try:
            return await self._read()
        except Exception as error:
            self._break(str(error))
            return None

    def _break(self, why: str) -> None:
        if not self.broken:
            self.broken = f"The pool is no longer the same on all workers ({why}). Restart."
            log.critical("%s", json.dumps({"event": "pool_broken", "error": why[:500]}))

    async def _read(self) -> Contents:
        known = [field.name for field in fields(Contents)]
        answers = [
            Contents(**{name: answer[name] for name in known if name in answer})
            for answer in await self._rpc("phatgoose_pool")
        ]
        prints = sorted({answer.fingerprint for answer in answers})
        if len(prints) != 1:
            raise RuntimeError(f"phatgoose: the workers serve different pools: {prints}")
        self._contents = answers[0]
        self._metrics.pool(
            loaded=len(answers[0].experts),
            capacity=answers[0].capacity,
            generation=answers[0].generation,
        )
        return answers[0]

    async def _ask_all(
        self, method: str, *arguments: str, param: str | None = None
    ) -> list[dict[str, Any]]:
        """Take a step that every worker must agree to. Raises Refusal with the first no."""
        answers = await self._rpc(method, *arguments)
        for answer in answers:
            if answer["error"]:
                raise Refusal(400, str(answer["error"]), reason="expert", param=param)
        return answers

    async def _rpc(self, method: str, *arguments: str) -> list[Any]:
        answers = await self._rpc_by_engine(method, *arguments)
        return [answer for engine in answers for answer in engine]

    async def _rpc_by_engine(self, method: str, *arguments: str) -> list[list[Any]]:
        """What the workers of each engine say."""
        ask = self._ask_engines()
        if ask is None:
            return [list(await self._engine.collective_rpc(method, args=arguments))]
        return [list(found) for found in await ask("collective_rpc", method, None, arguments, None)]

    def _ask_engines(self) -> Callable[..., Awaitable[list[Any]]] | None:
        """Ask every engine. `collective_rpc` does too, but returns only what the first one says."""
        core = getattr(self._engine, "engine_core", None)
        return getattr(core, "call_utility_all_async", None)

    def _tell(self, action: str, name: str, after: Contents, took: Took) -> None:
        self._metrics.changes.labels("add" if action == "added" else "remove").inc()
        event = {
            "event": f"expert_{action}",
            "expert": name,
            "generation": after.generation,
            "fingerprint": after.fingerprint,
            "experts": len(after.experts),
            "drain_seconds": round(took.drain, 3),
            "change_seconds": round(took.change, 3),
        }
        log.info("%s", json.dumps(event))
