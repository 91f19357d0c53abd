"""The middleware in front of all routes of vLLM's own server, which adds the pool."""

import asyncio
import json
import logging
import os
import secrets
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from phatgoose.errors import first_line
from phatgoose.serve.http import signals
from phatgoose.serve.http.access import Access
from phatgoose.serve.http.admin import Experts
from phatgoose.serve.http.answers import Relay, Routing, send_json
from phatgoose.serve.http.bodies import by_size, read_body, read_object, replay, resized, written
from phatgoose.serve.http.choice import BASE, choose
from phatgoose.serve.http.metrics import Metrics
from phatgoose.serve.http.outbox import Outbox
from phatgoose.serve.http.page import PAGE
from phatgoose.serve.http.refusal import Refusal
from phatgoose.serve.http.rewrite import check, check_no_choice, check_whole, rewritten
from phatgoose.serve.http.routes import CHOOSES, Rule, path_of, rule_of, unknown
from phatgoose.serve.http.workers import Contents, LivePool
from phatgoose.serve.pool.choice import Request

log = logging.getLogger(__name__)

EXPERTS = "/v1/experts"
Handler = Callable[[Scope, Receive, Send], Awaitable[None]]


class PoolMiddleware:
    """The class for vLLM's flag --middleware, which `phatgoose serve` sets.

    It needs our workers, and refuses to start with others.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics | None = None) -> None:
        self.app = app
        self._metrics = metrics or Metrics()
        self._pool: LivePool | None = None
        self._access = Access()
        self._served = ""
        self._watching: asyncio.Task[None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            try:
                await self.app(scope, receive, self._starting(scope, send))
            finally:
                if self._watching is not None:
                    self._watching.cancel()
            return
        if scope["type"] == "websocket":
            log.warning("%s", json.dumps({"event": "websocket_closed", "path": scope["path"]}))
            await send({"type": "websocket.close", "code": 1008})
            return
        try:
            await self._handler(scope)(scope, receive, send)
        except Refusal as refusal:
            self._refused(refusal, scope)
            await refusal.response()(scope, receive, send)

    def _handler(self, scope: Scope) -> Handler:
        """Find who answers a request. Keys are checked before anything of the body is read."""
        path, method = path_of(scope), scope["method"]
        headers = Headers(scope=scope)
        broken = self._pool.broken if self._pool else None
        if broken and (method != "GET" or path == "/health"):
            raise Refusal(503, broken, reason="broken")
        if method == "OPTIONS" and "access-control-request-method" in headers:
            return self.app  # a browser asks vLLM's middleware who may ask
        if method in ("GET", "HEAD") and path in PAGE:
            return PAGE[path]
        if path == EXPERTS or path.startswith(EXPERTS + "/"):
            name = path.removeprefix(EXPERTS).removeprefix("/")
            return Experts(self.pool, self._access, served=self._served, name=name)
        rule = rule_of(method, path)
        if rule is Rule.OPEN:
            return self.app
        if self._pool is None:
            raise _not_started()
        self._access.check_user(headers)
        if rule is Rule.CHOOSES:
            return self._answer
        if rule is Rule.WHOLE:
            return self._whole
        if path == "/v1/models":
            return self._models
        return self._checked if method == "POST" else self.app

    @property
    def pool(self) -> LivePool:
        if self._pool is None:
            raise _not_started()
        return self._pool

    # -- start ---------------------------------------------------------------------------------

    def _starting(self, scope: Scope, send: Send) -> Send:
        async def wrapped(message: Message) -> None:
            if message["type"] == "lifespan.startup.complete":
                try:
                    await self._start(scope["app"])
                except Exception as error:
                    text = f"phatgoose: the pool cannot be served: {first_line(error)}"
                    log.critical("%s", text)
                    message = {"type": "lifespan.startup.failed", "message": text}
            await send(message)

        return wrapped

    async def _start(self, app: Any) -> None:
        state = app.state
        self._access = Access.read(os.environ, state.args.api_key)
        self._access.check_address(state.args.host, uds=getattr(state.args, "uds", None))
        self._served = (state.args.served_model_name or [state.args.model])[0]
        if self._served == BASE:
            raise ValueError(f"{BASE!r} is the name of the bare base, not of the pool")
        for route in unknown(app.routes):
            # A newer vLLM's, or a plugin's: what it does with a pool nobody has looked at.
            log.warning("%s", json.dumps({"event": "route_closed", "route": route}))
        pool = LivePool(state.engine_client, self._metrics, drain=self._access.drain)
        await pool.start()
        self._pool = pool
        self._watching = pool.watch()
        signals.listen()

    # -- requests ------------------------------------------------------------------------------

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """A request that the pool serves, told to the workers in vLLM's own fields."""
        raw = await read_body(scope, receive)
        body = await read_object(raw)
        async with Outbox(send) as outbox, self.pool.request() as contents:
            choice = choose(body, served=self._served, names=contents.names)
            check(body, choice, contents, path=path_of(scope))
            asked = body.get("model") or self._served
            scope, routing = self._asking(scope, choice, contents)
            wanted = rewritten(body, choice, contents, served=self._served)
            new = await by_size(len(raw), written, wanted)
            to_client: Send = outbox
            if routing is not None or asked != self._served:
                to_client = Relay(outbox, served=self._served, asked=asked, routing=routing)
            await self.app(resized(scope, len(new)), replay(new, receive), to_client)

    def _asking(
        self, scope: Scope, choice: Request, contents: Contents
    ) -> tuple[Scope, Routing | None]:
        """Give the request an id of its own, by which its routing is found afterwards."""
        form = CHOOSES[path_of(scope)]
        if choice.routing is None or form is None:
            return scope, None
        headers = MutableHeaders(raw=list(scope["headers"]))
        name = "-".join(filter(None, [headers.get("x-request-id"), secrets.token_hex(8)]))
        headers["x-request-id"] = name

        async def routing() -> dict[str, Any]:
            found = await self.pool.routing(form.format(name))
            return {"generation": contents.generation, **found}

        return {**scope, "headers": headers.raw}, routing

    async def _whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        """A request of a route that serves by the whole pool, and can do nothing else."""
        raw = await read_body(scope, receive)
        body = await read_object(raw)
        await by_size(len(raw), check_whole, body, served=self._served)
        # What we have checked, however else it could be read.
        new = await by_size(len(raw), written, body)
        async with Outbox(send) as outbox, self.pool.request():
            await self.app(resized(scope, len(new)), replay(new, receive), outbox)

    async def _checked(self, scope: Scope, receive: Receive, send: Send) -> None:
        """A request that runs no model: its body, if there is one, is looked at all the same."""
        raw = await read_body(scope, receive)
        if raw:
            await by_size(len(raw), check_no_choice, await read_object(raw))
        await self.app(scope, replay(raw, receive), send)

    async def _models(self, scope: Scope, receive: Receive, send: Send) -> None:
        """vLLM's list, in which the pool's experts and the bare base are models too."""
        found: list[Message] = []

        async def keep(message: Message) -> None:
            found.append(message)

        await self.app(scope, receive, keep)
        start = next(m for m in found if m["type"] == "http.response.start")
        body = b"".join(m.get("body", b"") for m in found if m["type"] == "http.response.body")
        if start["status"] != 200:
            for message in found:
                await send(message)
            return
        listing = json.loads(body)
        (pool, *_) = listing["data"]
        names = [BASE, *(f"{self._served}/{name}" for name in self.pool.contents.names)]
        for name in names:
            listing["data"].append({**pool, "id": name, "parent": pool["id"]})
        await send_json(listing, start, send)

    def _refused(self, refusal: Refusal, scope: Scope) -> None:
        self._metrics.refusals.labels(refusal.reason).inc()
        event = {
            "event": "refused",
            "reason": refusal.reason,
            "status": refusal.status,
            "method": scope["method"],
            "path": scope["path"],
            "client": (scope.get("client") or [None])[0],
            "message": refusal.message[:500],
        }
        log.warning("%s", json.dumps(event))


def _not_started() -> Refusal:
    return Refusal(503, "The server has not started yet.", reason="starting")
