"""Clients that do not read their answers, and changes of the pool that do not wait for them."""

import asyncio

import pytest

from phatgoose.serve.http import access, outbox
from tests.serve.http.fake import Server

pytestmark = pytest.mark.anyio

ADMIN = "admin-key"


@pytest.fixture(autouse=True)
def admin(monkeypatch):
    monkeypatch.setenv(access.ADMIN_KEY, ADMIN)


class Client:
    """Takes a message when it is told to."""

    def __init__(self):
        self.reads, self.messages = asyncio.Event(), []

    async def send(self, message):
        await self.reads.wait()
        self.messages.append(message)

    @property
    def body(self):
        return b"".join(message.get("body", b"") for message in self.messages)


def remove(server, name):
    return server.call("DELETE", f"/v1/experts/{name}", key=ADMIN)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "hi"}),
        ("/v1/completions", {"prompt": "hi", "phatgoose": {"routing": "tokens"}}),
        ("/v1/chat/completions", {"prompt": "hi", "model": "pool/b"}),
        ("/v1/embeddings", {"input": "hi"}),
    ],
)
async def test_a_change_does_not_wait_for_a_client(path, body, stream):
    """Before, the change waited its whole drain, and all other requests with it."""
    async with Server() as server:
        clients = [Client(), Client()]
        body = {**body, "stream": stream}
        slow = [
            asyncio.create_task(server.call("POST", path, body, send=client.send))
            for client in clients
        ]
        await asyncio.sleep(0.02)
        reply = await asyncio.wait_for(remove(server, "a"), 2)
        assert reply.status == 200
        assert await server.text() == "b"
        assert not any(task.done() for task in slow)
        for client in clients:
            client.reads.set()
        await asyncio.gather(*slow)
        # The answer is whole, and of the pool that it began with.
        for client in clients:
            assert client.messages[0]["status"] == 200
            assert not client.messages[-1].get("more_body")
            told = "routing" in str(body)
            assert (b'"generation":0' in client.body.replace(b" ", b"")) == told


async def test_messages_come_in_their_order():
    client, sent = Client(), [{"type": "http.response.body", "body": b"%d" % n} for n in range(99)]
    async with outbox.Outbox(client.send) as post:
        for number, message in enumerate(sent):
            await post(message)
            if number == 50:
                client.reads.set()
    assert client.messages == sent


async def test_a_client_that_never_reads_is_given_up(monkeypatch, caplog):
    monkeypatch.setattr(outbox, "STALL", 0.05)
    async with Server() as server:
        client = Client()
        await server.call("POST", "/v1/completions", {"prompt": "x"}, send=client.send)
        assert not client.messages
        assert "client_given_up" in caplog.text
        assert (await remove(server, "a")).status == 200


async def test_a_client_for_which_too_much_waits_is_given_up(monkeypatch):
    """Its request ends, so that what is kept for it is bounded."""
    monkeypatch.setattr(outbox, "MOST", 1000)
    async with Server() as server:
        server.engine.says = "x" * 100_000
        client = Client()
        asked = server.call(
            "POST", "/v1/completions", {"prompt": "x", "stream": True}, send=client.send
        )
        await asyncio.wait_for(asked, 5)
        assert not client.messages
        assert await server.text("y") == server.engine.says  # one message may be as long as it is


async def test_a_client_that_is_gone_ends_its_request():
    async def send(message):
        raise OSError("the client is gone")

    async with Server() as server:
        with pytest.raises(OSError, match="gone"):
            await server.call("POST", "/v1/completions", {"prompt": "x", "stream": True}, send=send)
        assert (await remove(server, "a")).status == 200


async def test_a_request_that_is_cancelled_does_not_wait_for_its_client():
    async with Server() as server:
        asked = asyncio.create_task(
            server.call("POST", "/v1/completions", {"prompt": "x"}, send=Client().send)
        )
        await asyncio.sleep(0.02)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(asked, 2)


async def test_waiting_requests_go_on_when_a_change_gives_up(monkeypatch):
    monkeypatch.setenv(access.DRAIN_SECONDS, "0.1")
    async with Server() as server:
        hold = server.engine.hold = asyncio.Event()
        running = asyncio.create_task(server.text("one"))
        await asyncio.sleep(0.01)
        server.engine.hold = None  # for those after it
        change = asyncio.create_task(remove(server, "a"))
        await asyncio.sleep(0.01)
        waiting = [asyncio.create_task(server.text(str(number))) for number in range(3)]
        assert (await change).status == 503
        assert await asyncio.wait_for(asyncio.gather(*waiting), 2) == ["a+b"] * 3
        hold.set()
        assert await running == "a+b"


async def test_a_change_goes_on_without_whoever_asked_for_it():
    async with Server() as server:
        hold = server.engine.hold = asyncio.Event()
        running = asyncio.create_task(server.text("one"))
        await asyncio.sleep(0.01)
        change = asyncio.create_task(remove(server, "a"))
        await asyncio.sleep(0.01)
        change.cancel()
        with pytest.raises(asyncio.CancelledError):
            await change
        hold.set()
        assert await running == "a+b"
        assert await server.text("two") == "b"
