"""Bodies: whose key is looked at first, how long, how deep, how slow they may be."""

import asyncio
import json
import time

import pytest

from phatgoose.serve.http import bodies
from phatgoose.serve.http.refusal import Refusal
from phatgoose.serve.http.routes import RULES, Rule
from tests.serve.http.fake import Server

pytestmark = pytest.mark.anyio

POSTS = [
    line.removeprefix("POST ").replace("{response_id}", "r")
    for rule in (Rule.KEY, Rule.CHOOSES, Rule.WHOLE)
    for line in RULES[rule]
    if line.startswith("POST ")
]


class Reads:
    """A request whose body nobody may read."""

    def __init__(self):
        self.read = 0

    async def __call__(self):
        self.read += 1
        return {"type": "http.request", "body": b"[" * 1000, "more_body": True}


@pytest.mark.parametrize("path", [*POSTS, "/v1/experts"])
@pytest.mark.parametrize("key", [None, "wrong"])
async def test_without_the_key_no_byte_is_read(monkeypatch, path, key):
    monkeypatch.setenv("PHATGOOSE_ADMIN_KEY", "admin")
    async with Server(api_key=["user"]) as server:
        receive = Reads()
        reply = await server.call("POST", path, key=key, receive=receive)
        assert (reply.status, receive.read) == (401, 0)


async def test_a_large_body_without_the_key_costs_nothing():
    raw = b"[" + b"{}," * ((16 << 20) // 3) + b"0]"
    async with Server(api_key=["user"]) as server:
        start = time.process_time()
        assert (await server.call("POST", "/v1/embeddings", raw=raw)).status == 401
        assert time.process_time() - start < 0.5


def nested(depth, kind="list"):
    start, end = ("[", "]") if kind == "list" else ('{"a":', "}")
    return '{"prompt":' + start * depth + "1" + end * depth + "}"


REFUSED = [
    '{"prompt": "\\ud800"}',
    '{"prompt": "\\uDFFF\\uD800"}',
    '{"\\ud800": 1}',
    '{"prompt": ["a", {"b": "x\\ud83d"}]}',
    '{"phatgoose": {"allow": ["\\udc00"]}}',
    '{"phatgoose": "' + "[" * 200_000 + '"}',
    '{"phatgoose": "{\\"allow\\":' + "[" * 5000 + '"}',
    json.dumps({"phatgoose": '{"allow": ["\\ud800"]}'}),
    nested(bodies.DEEPEST),
    nested(bodies.DEEPEST, "object"),
    nested(5000),
    nested(200_000, "object"),
    "[" * 1_000_000,
    '{"max_tokens": 1e400}',
    '{"max_tokens": -1e400}',
    '{"max_tokens": NaN}',
    '{"temperature": Infinity}',
    '{"temperature": -Infinity}',
    '{"seed": 18446744073709551616}',
    '{"seed": -9223372036854775809}',
    '{"seed": ' + "9" * 5000 + "}",
    '{"prompt": [' + "9" * 50 + "]}",
    '{"a": 1',
    "1",
    '"text"',
    "null",
    b'{"prompt": "\xed\xa0\x80"}',  # a surrogate as it stands
    b'{"prompt": "\xff"}',
    '{"prompt": "x"}'.encode("utf-16"),
    '{"prompt": "x"}'.encode("utf-32"),
]


@pytest.mark.parametrize("raw", REFUSED, ids=range(len(REFUSED)))
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/embeddings", "/tokenize", "/v1/experts"])
async def test_bodies_that_vllm_could_not_serve(monkeypatch, raw, path):
    monkeypatch.setenv("PHATGOOSE_ADMIN_KEY", "admin")
    async with Server() as server:
        raw = raw if isinstance(raw, bytes) else raw.encode()
        reply = await server.call("POST", path, raw=raw, key="admin")
        assert reply.status == 400, reply.body
        assert reply.json["error"]["message"]
        assert not server.engine.cache


TAKEN = [
    '{"prompt": "\\ud83e\\udd86"}',  # a goose-like bird, as a pair of escapes
    '{"prompt": "\\\\ud800"}',  # a backslash, and then text
    '{"prompt": "' + "[" * 200_000 + '"}',  # in a text they nest nothing
    nested(bodies.DEEPEST - 1),
    '{"prompt": "x", "seed": 9223372036854775807, "temperature": 1e-30}',
    '\ufeff{"prompt": "x"}',
]


@pytest.mark.parametrize("raw", TAKEN, ids=range(len(TAKEN)))
async def test_bodies_that_are_odd_and_right(raw):
    async with Server() as server:
        reply = await server.call("POST", "/v1/completions", raw=raw.encode())
        assert reply.status == 200, reply.body


def test_what_is_parsed_is_what_was_written():
    given = {"prompt": [1, 2**63], "a": {"b": [None, True, 1.5e-7, "ü\ud83e\udd86"]}}
    given["a"]["b"][3] = "ü\U0001f986"
    assert bodies.parse(json.dumps(given).encode()) == given
    assert bodies.parse(json.dumps(given, ensure_ascii=False).encode()) == given


@pytest.mark.parametrize("declared", [bodies.LONGEST + 1, 10**30])
async def test_a_body_that_says_it_is_too_long_is_not_read(declared):
    async with Server() as server:
        receive, headers = Reads(), {"content-length": str(declared)}
        reply = await server.call("POST", "/v1/completions", receive=receive, headers=headers)
        assert (reply.status, receive.read) == (413, 0)


async def test_a_body_that_is_too_long_and_does_not_say_so(monkeypatch):
    monkeypatch.setattr(bodies, "LONGEST", 100_000)
    async with Server() as server:
        receive = Reads()
        reply = await server.call("POST", "/v1/completions", receive=receive)
        assert (reply.status, receive.read) == (413, 101)


def test_more_values_than_are_parsed(monkeypatch):
    monkeypatch.setattr(bodies, "MOST", 100)
    assert bodies.parse(b'{"prompt": [' + b"1," * 97 + b"1]}")
    with pytest.raises(Refusal) as caught:
        bodies.parse(b'{"prompt": [' + b"1," * 100 + b"1]}")
    assert caught.value.status == 413


async def test_a_slow_body(monkeypatch):
    monkeypatch.setattr(bodies, "GRACE", 0.1)

    async def receive():
        await asyncio.sleep(0.03)
        return {"type": "http.request", "body": b" ", "more_body": True}

    async with Server() as server:
        reply = await server.call("POST", "/v1/completions", receive=receive)
        assert reply.status == 408
        assert await server.text() == "a+b"


async def test_a_slow_body_holds_nobody_up(monkeypatch):
    monkeypatch.setenv("PHATGOOSE_ADMIN_KEY", "admin")
    never = asyncio.Event().wait
    async with Server() as server:
        slow = asyncio.create_task(server.call("POST", "/v1/completions", receive=never))
        await asyncio.sleep(0.01)
        assert (await server.call("DELETE", "/v1/experts/a", key="admin")).status == 200
        assert await server.text() == "b"
        slow.cancel()


async def test_large_bodies_are_parsed_off_the_event_loop(monkeypatch):
    """A stand-in for the parser that takes its time: the loop turns meanwhile."""
    right = bodies.parse
    monkeypatch.setattr(bodies, "parse", lambda body: (time.sleep(0.3), right(body))[1])
    async with Server() as server:
        asked = asyncio.create_task(server.text("x" * bodies.INLINE))
        turns = 0
        while not asked.done():
            await asyncio.sleep(0.01)
            turns += 1
        assert await asked == "a+b"
        assert turns > 5
