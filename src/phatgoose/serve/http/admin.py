"""GET, POST and DELETE /v1/experts."""

import asyncio
from collections.abc import Coroutine
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from phatgoose.serve.http.access import Access
from phatgoose.serve.http.bodies import read_body, read_object
from phatgoose.serve.http.recent import WINDOW
from phatgoose.serve.http.refusal import Refusal
from phatgoose.serve.http.workers import Contents, LivePool

LONGEST_NAME = 200


class Experts:
    """The handler of one request about the experts, or about the one called `name`."""

    def __init__(self, pool: LivePool, access: Access, *, served: str, name: str) -> None:
        self._pool, self._access, self._served, self._name = pool, access, served, name

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        method = scope["method"]
        if method == "GET":
            self._access.check_reader(headers)
            answer = self._list(admin=self._access.is_admin(headers))
        elif method == "POST" and not self._name:
            self._access.check_admin(headers)
            answer = await self._add(scope, receive)
        elif method == "DELETE" and self._name:
            self._access.check_admin(headers)
            answer = await self._remove()
        else:
            raise Refusal(
                405,
                "There are GET and POST /v1/experts, GET and DELETE /v1/experts/NAME.",
                reason="bad_request",
                headers={"Allow": "GET, DELETE" if self._name else "GET, POST"},
            )
        await answer(scope, receive, send)

    def _list(self, *, admin: bool) -> JSONResponse:
        contents, recent = self._pool.contents, self._pool.recent
        shares, grown = recent.shares(), recent.grown()
        data = [self._told(expert, admin=admin) for expert in contents.experts]
        for entry in data:
            entry["tokens"] = round(grown.tokens.get(entry["id"], 0.0), 3)
            entry["share"] = round(shares.get(entry["id"], 0.0), 6)
        if self._name:
            found = [entry for entry in data if entry["id"] == self._name]
            if not found:
                raise Refusal(
                    404, f"The pool has no expert {self._name!r}.", reason="unknown_expert"
                )
            return JSONResponse(found[0])
        return JSONResponse(
            {
                "object": "list",
                "model": self._served,
                **_state(contents),
                "capacity": contents.capacity,
                "max_rank": contents.max_rank,
                "window_seconds": WINDOW,
                "entropy": round(grown.entropy / grown.count, 6) if grown.count else None,
                "data": data,
            }
        )

    async def _add(self, scope: Scope, receive: Receive) -> JSONResponse:
        body = await read_object(await read_body(scope, receive))
        unknown = sorted(set(body) - {"source", "name"})
        source, name = body.get("source"), body.get("name")
        if unknown or not isinstance(source, str) or not source:
            raise Refusal(
                400,
                'The body is {"source": folder or Hub id, "name": name in the pool (optional)}'
                + (f", not {unknown[0]!r}." if unknown else "."),
                reason="bad_request",
                param=unknown[0] if unknown else "source",
            )
        # The Hub may take its time, and so may a disk.
        own, folder = await asyncio.to_thread(self._access.find, source)
        name = own if name is None else name
        if not isinstance(name, str) or not _is_name(name):
            raise Refusal(
                400,
                f"name is 1 to {LONGEST_NAME} visible characters, got {str(name)[:50]!r}.",
                reason="bad_request",
                param="name",
            )
        contents = await _to_the_end(self._pool.add(name, str(folder)))
        (expert,) = (e for e in contents.experts if e["name"] == name)
        return JSONResponse({**self._told(expert, admin=True), **_state(contents)}, 201)

    async def _remove(self) -> JSONResponse:
        contents = await _to_the_end(self._pool.remove(self._name))
        told = {"id": self._name, "object": "expert", "deleted": True}
        return JSONResponse({**told, **_state(contents)})

    def _told(self, expert: dict[str, Any], *, admin: bool) -> dict[str, Any]:
        """Where an expert came from is a path of this machine, so only the admin hears of it."""
        rest = {k: v for k, v in expert.items() if k != "name" and (admin or k != "source")}
        model = f"{self._served}/{expert['name']}"
        return {"id": expert["name"], "object": "expert", "model": model, **rest}


async def _to_the_end(change: Coroutine[Any, Any, Contents]) -> Contents:
    """A change of the pool goes on although whoever asked for it went away."""
    return await asyncio.shield(asyncio.create_task(change))


def _state(contents: Contents) -> dict[str, Any]:
    return {"generation": contents.generation, "fingerprint": contents.fingerprint}


def _is_name(name: str) -> bool:
    return name.isprintable() and name.strip() == name and 0 < len(name) <= LONGEST_NAME
