"""Every route of vLLM's is behind our rules or closed."""

import json
import logging

import pytest
from starlette.responses import JSONResponse
from starlette.routing import Mount, Route, WebSocketRoute

from phatgoose.serve.http.routes import RULES, Rule, path_of, unknown
from tests.serve.http.fake import Server

pytestmark = pytest.mark.anyio


async def reached(request):
    return JSONResponse({"reached": True})


def filled(line):
    method, path = line.split(" ")
    for name in ("{response_id}", "{adapter_name}", "{path:path}"):
        path = path.replace(name, "x")
    return method, path


def everything():
    """A stand-in for each route of the list, so that what gets through shows."""
    lines = [line for lines in RULES.values() for line in lines if "WEBSOCKET" not in line]
    return [Route(line.split(" ")[1], reached, methods=[line.split(" ")[0]]) for line in lines]


def lines_of(rule):
    return [line for line in RULES[rule] if "WEBSOCKET" not in line]


@pytest.mark.parametrize("key", [None, "wrong", "user"])
async def test_closed_routes_are_closed_with_any_key(key):
    async with Server(api_key=["user"], more=everything()) as server:
        for line in lines_of(Rule.CLOSED):
            reply = await server.call(*filled(line), {"model": "pool"}, key=key)
            assert reply.status == 403, line
            assert "is closed" in reply.json["error"]["message"]


async def test_open_routes_need_no_key():
    async with Server(api_key=["user"], more=everything()) as server:
        for line in lines_of(Rule.OPEN):
            assert (await server.call(*filled(line))).status == 200, line


@pytest.mark.parametrize("rule", [Rule.KEY, Rule.CHOOSES, Rule.WHOLE])
async def test_all_others_need_the_key(rule):
    async with Server(api_key=["user"], more=everything()) as server:
        for line in lines_of(rule):
            for key in (None, "wrong"):
                reply = await server.call(*filled(line), {"model": "pool"}, key=key)
                assert reply.status == 401, line
            reply = await server.call(*filled(line), {"model": "pool"}, key="user")
            assert reply.status == 200, line


@pytest.mark.parametrize("model", ["base", "pool/a", "nobody", "", 3, ["pool"], {"a": 1}, True])
async def test_what_serves_by_the_whole_pool_serves_by_nothing_else(model):
    async with Server(more=everything()) as server:
        for line in lines_of(Rule.WHOLE):
            reply = await server.call(*filled(line), {"model": model, "input": "x"})
            assert reply.status == 404, line
            assert reply.json["error"]["param"] == "model"
            assert (await server.call(*filled(line), {"input": "x"})).status == 200


async def test_a_key_that_is_there_twice_means_what_was_checked():
    """Parsers differ in which of two keys they take, so vLLM gets one."""
    async with Server() as server:
        reply = await server.call(
            "POST", "/v1/embeddings", raw=b'{"model": "base", "model": "pool", "input": "x"}'
        )
        assert json.loads(reply.json["seen"]) == {"model": "pool", "input": "x"}


@pytest.mark.parametrize(
    "path",
    [
        "/v1/new",
        "/invocations/",
        "/V1/completions",
        "/v1/completions/",
        "//v1/completions",
        "/v1//completions",
        "/v1/completions/x",
        "/metricsx",
        "/healthz",
        "",
        "/" + "x" * 5000,
    ],
)
async def test_a_route_that_nobody_has_looked_at_is_closed(path):
    async with Server(api_key=["user"], more=[Route(path or "/", reached)]) as server:
        for method in ("GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "TRACE"):
            reply = await server.call(method, path, {}, key="user")
            assert reply.status == 404, method
            assert "no such route" in reply.json["error"]["message"]


async def test_other_methods_than_a_routes_own():
    async with Server() as server:
        reply = await server.call("GET", "/v1/completions")
        assert (reply.status, reply.headers["allow"]) == (405, "POST")
        assert (await server.call("OPTIONS", "/v1/completions")).status == 405
        assert (await server.call("HEAD", "/health")).status == 200
        assert (await server.call("POST", "/health", {})).status == 405


async def test_new_routes_are_named_at_the_start(caplog):
    async def socket(websocket):
        raise AssertionError("reached")

    more = [
        Route("/v1/new", reached, methods=["POST"]),
        Mount("/inner", routes=[Route("/deep", reached)]),
        Mount("/app", app=reached),
        WebSocketRoute("/v2/realtime", socket),
        *everything(),
    ]
    caplog.set_level(logging.WARNING, logger="phatgoose")
    async with Server(more=more) as server:
        events = [json.loads(record.message) for record in caplog.records]
        named = [event["route"] for event in events if event["event"] == "route_closed"]
        assert named == [
            "POST /v1/new",
            "GET /inner/deep",
            "GET /app/{path:path}",
            "WEBSOCKET /v2/realtime",
        ]
        assert (await server.call("POST", "/v1/new", {})).status == 404
        for path in ("/v1/realtime", "/v2/realtime", "/v1/completions"):
            sent = []

            async def send(message, sent=sent):
                sent.append(message)

            scope = {"type": "websocket", "path": path, "headers": [], "app": server.inner}
            await server.app(scope, None, send)
            assert sent == [{"type": "websocket.close", "code": 1008}]


def test_no_route_is_in_the_list_twice():
    lines = [line for lines in RULES.values() for line in lines]
    assert len(lines) == len(set(lines))
    assert unknown([]) == []


@pytest.mark.parametrize(
    ("path", "root", "below"),
    [
        ("/v1/completions", "", "/v1/completions"),
        ("/api/v1/completions", "/api", "/v1/completions"),
        ("/v1/completions", "/api", "/v1/completions"),
        ("/apiv1/completions", "/api", "/apiv1/completions"),
        ("/api", "/api", ""),
    ],
)
def test_below_a_root(path, root, below):
    """As starlette takes it, which decides what answers."""
    from starlette._utils import get_route_path

    scope = {"type": "http", "path": path, "root_path": root}
    assert path_of(scope) == below == get_route_path(scope)
