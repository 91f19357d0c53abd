"""Clients that do not read, on real sockets and uvicorn, which vLLM serves by."""

import json
import socket
import threading
import time
import urllib.request

import pytest
from prometheus_client import CollectorRegistry

from phatgoose.serve.http import PoolMiddleware, access
from phatgoose.serve.http.metrics import Metrics
from tests.serve.http.fake import FakeEngine, fake_vllm

uvicorn = pytest.importorskip("uvicorn")

ADMIN = "admin-key"
LETTERS = 3000  # of an answer: as a stream, an event of 130 bytes for each


@pytest.fixture
def address(monkeypatch):
    """The address of a server, and its engine."""
    monkeypatch.setenv(access.ADMIN_KEY, ADMIN)
    engine, registry = FakeEngine(), CollectorRegistry()
    inner = fake_vllm(engine, registry=registry)
    app = PoolMiddleware(inner, Metrics(registry))

    async def with_app(scope, receive, send):
        await app({**scope, "app": inner}, receive, send)  # as FastAPI does before its middleware

    listening = socket.socket()
    # What the kernel holds for a client that does not read is little, here as at its end.
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
    listening.bind(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    running = uvicorn.Server(uvicorn.Config(with_app, log_level="error", lifespan="on"))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
    thread.start()
    end = time.monotonic() + 20
    while not running.started and time.monotonic() < end:
        time.sleep(0.02)
    yield port, engine
    running.should_exit = running.force_exit = True
    thread.join()


def ask(port, method, path, body=None, key=None):
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, headers, method=method)
    with urllib.request.urlopen(request, timeout=20) as answer:
        return json.loads(answer.read())


def begun(port, body):
    """A client that has asked and reads nothing."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.settimeout(20)
    client.connect(("127.0.0.1", port))
    raw = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += f"Connection: close\r\nContent-Length: {len(raw)}\r\n\r\n"
    client.sendall(head.encode() + raw)
    return client


@pytest.mark.parametrize("stream", [False, True])
def test_changes_and_requests_beside_clients_that_do_not_read(address, stream):
    """Without the outbox, each change waits its whole drain here, and all requests behind it."""
    port, engine = address
    engine.says = "x" * (LETTERS if stream else 1 << 20)
    clients = [begun(port, {"prompt": str(n), "stream": stream}) for n in range(2)]
    end = time.monotonic() + 10
    while len(engine.cache) < 2 and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(0.3)
    engine.says = None
    start = time.monotonic()
    assert ask(port, "DELETE", "/v1/experts/a", key=ADMIN)["deleted"]
    assert ask(port, "POST", "/v1/completions", {"prompt": "hi"})["choices"][0]["text"] == "b"
    assert time.monotonic() - start < 2
    for client in clients:
        whole = b""
        while piece := client.recv(1 << 16):
            whole += piece
        assert whole.count(b"x") >= (LETTERS if stream else 1 << 20)
        assert not stream or b"data: [DONE]" in whole
        client.close()


def test_a_client_that_leaves_midway_ends_its_request(address):
    port, engine = address
    engine.says = "x" * 20_000
    client = begun(port, {"prompt": "x", "stream": True})
    assert client.recv(100)
    client.close()
    engine.says = None
    assert ask(port, "DELETE", "/v1/experts/a", key=ADMIN)["deleted"]
    assert not engine.running


def test_a_large_body_without_a_key_is_not_waited_for(address, monkeypatch):
    """The answer comes while most of the body is still on its way."""
    port, _ = address
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        head = "POST /v1/experts HTTP/1.1\r\nHost: x\r\nContent-Length: 60000000\r\n\r\n"
        client.sendall(head.encode() + b"[" * 1000)
        assert b"401" in client.recv(100)


def test_the_loop_is_awake(address):
    """Bodies of many values, sent at once, leave room for others: a parse is bounded."""
    port, _ = address
    body = b'{"prompt": [' + b"{}," * 990_000 + b"{}]}"
    done = []

    def send():
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/tokenize", body, {"Content-Type": "application/json"}
        )
        try:
            urllib.request.urlopen(request, timeout=60)
        except urllib.error.HTTPError as error:
            done.append(error.code)

    thread = threading.Thread(target=send)
    thread.start()
    worst = 0.0
    while thread.is_alive():
        start = time.monotonic()
        ask(port, "GET", "/v1/models")
        worst = max(worst, time.monotonic() - start)
    assert done == [404]  # the fake has no such route; ours let it pass
    assert worst < 2, worst
