"""An engine and an OpenAI server in the place of vLLM's, and a client that speaks ASGI to them."""

import asyncio
import hashlib
import json
import re
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from starlette.applications import Starlette
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from phatgoose.serve.http import PoolMiddleware
from phatgoose.serve.http.metrics import Metrics

CAPACITY = 4


class FakeWorker:
    """A rank: the RPCs of `phatgoose.serve.worker.Worker`, on names alone."""

    def __init__(self, names, bad=()):
        self.names, self.prepared, self.generation = list(names), None, 0
        self.bad = set(bad)  # folders that this rank refuses
        self.mixture = 2  # experts that a request may mix
        self.breaks = False  # midway
        self.reads = ""  # what it finds on its disk
        self.tokens = dict.fromkeys(names, 0.0)

    def phatgoose_pool(self):
        return {
            "generation": self.generation,
            "fingerprint": hashlib.sha256(json.dumps(sorted(self.names)).encode()).hexdigest(),
            "capacity": CAPACITY,
            "max_rank": 8,
            "mixture": self.mixture,
            "scale": "softmax",
            "experts": [
                {"name": n, "source": f"/secret/{n}", "sha256": n * 2, "rank": 4, "modules": 7}
                for n in self.names
            ],
        }

    def phatgoose_prepare(self, name, folder):
        if any(bad in folder for bad in self.bad):
            return {"error": f"{name}: holds NaN"}
        self.prepared = name
        return {"error": None, "sha256": name * 2 + self.reads}

    def phatgoose_commit(self):
        if self.breaks:
            raise RuntimeError("out of memory")
        self.names.append(self.prepared)
        self.prepared = None
        self.generation += 1
        return {"error": None}

    def phatgoose_abort(self):
        self.prepared = None
        return {"error": None}

    def phatgoose_remove(self, name):
        self.names.remove(name)
        self.generation += 1
        return {"error": None}

    def phatgoose_totals(self):
        count = sum(self.tokens.values())
        tokens = {name: count for name, count in self.tokens.items() if name in self.names}
        return {"tokens": tokens, "entropy": 0.5, "count": count, "base": 0.0}


class FakeEngine:
    """Answers with the experts that served, so a wrong pool shows. Its cache is like vLLM's."""

    def __init__(self, names=("a", "b"), ranks=2, engines=1):
        self.engines = [[FakeWorker(names) for _ in range(ranks)] for _ in range(engines)]
        self.workers = [worker for ranks in self.engines for worker in ranks]
        if engines > 1:
            self.engine_core = SimpleNamespace(call_utility_all_async=self.ask_engines)
        self.paused, self.running, self.calls = False, 0, []
        self.cache = {}  # by salt and prompt: what was computed
        self.routings, self.turn = {}, 0  # by request: its engine, and what that knows
        self.resets = True
        self.hold = None  # an event that answers wait for
        self.says = None  # the answer, unless it is to be the experts
        self.ours = True
        self.notes = True

    async def collective_rpc(self, method, timeout=None, args=(), kwargs=None):
        return (await self.ask_engines("collective_rpc", method, timeout, args, kwargs))[0]

    async def ask_engines(self, utility, method, timeout, args, kwargs):
        assert utility == "collective_rpc"
        self.calls.append(method)
        return [self.ask(number, method, args) for number in range(len(self.engines))]

    def ask(self, number, method, args):
        workers = self.engines[number]
        if not self.ours:
            raise AttributeError(f"no method {method}")
        if method == "phatgoose_routing":
            engine, known = self.routings.get(*args, (None, None))
            none = {"error": f"{args[0]}: no routing of such a request was recorded."}
            return [known if engine == number else none for _ in workers]
        if method in ("phatgoose_commit", "phatgoose_remove"):
            assert self.paused and not self.running and not self.cache, "changed under requests"
        if method == "phatgoose_totals" and not self.notes:
            return [{"error": "not recorded"} for _ in workers]
        answers = [getattr(worker, method)(*args) for worker in workers]
        if method == "phatgoose_pool":
            answers = [{**answer, "routing": self.notes} for answer in answers]
        return answers

    async def pause_generation(self, *, mode, clear_cache):
        assert mode == "wait"
        self.paused = True
        while self.running:
            await asyncio.sleep(0)

    async def resume_generation(self):
        self.paused = False

    async def reset_prefix_cache(self):
        if self.resets:
            self.cache.clear()
        return self.resets

    async def generate(self, request, prompt, salt, extra):
        while self.paused:
            await asyncio.sleep(0)
        self.running += 1
        try:
            names = self.workers[0].names
            wanted = json.loads(extra) if extra else {}
            served = (
                []
                if wanted.get("base")
                else sorted(wanted.get("weights") or wanted.get("allow", names))
            )
            assert set(served) <= set(names), "an expert that is gone"
            await asyncio.sleep(0)
            if self.hold is not None:
                await self.hold.wait()
            assert set(served) <= set(names), "an expert that went while it served"
            engine, self.turn = self.turn % len(self.engines), self.turn + 1
            if wanted.get("routing"):
                whose = served or [""]  # the base alone
                known = {"shares": dict.fromkeys(whose, 1 / len(whose))}
                self.routings[request] = engine, known
            for worker in self.engines[engine]:
                for name in served:
                    worker.tokens[name] = worker.tokens.get(name, 0.0) + 1 / len(served)
            text = "+".join(served) or "base"
            return self.cache.setdefault((salt, prompt), self.says or text)
        finally:
            self.running -= 1


def words(text):
    """The fake's tokens."""
    return re.findall(r"\s?[^\s]+|\s", text)


def by_token(routing, prompt, answer):
    """The routing that a worker would tell: of all tokens but the last, experts taking turns."""
    names = list(routing["shares"]) or [""]
    length = len(words(prompt)) + len(answer) - 1
    return {**routing, "tokens": [[names[at % len(names)] for at in range(length)]]}


def fake_vllm(engine, *, served="pool", api_key=None, registry=None, host="127.0.0.1", more=()):
    """The routes of vLLM's server that matter, with state as it has it."""

    async def answer(request):
        body = await request.json()
        chat = request.url.path.endswith("chat/completions")
        given = request.headers.get("x-request-id", "own")
        name = f"chatcmpl-{given}" if chat else f"cmpl-{given}"
        if body.get("model", served) != served:
            return JSONResponse({"error": {"message": "no such model"}}, 404)
        if "phatgoose" in body:
            return JSONResponse({"error": {"message": "not rewritten"}}, 500)
        extra = (body.get("vllm_xargs") or {}).get("phatgoose")
        prompt = json.dumps(body.get("prompt", body.get("messages")))
        head = {"id": name, "object": "text_completion", "created": 1, "model": served}
        engine.last = body
        echoed = words(body["prompt"]) if body.get("echo") else []

        async def tokens():
            text = await engine.generate(name, prompt, body.get("cache_salt"), extra)
            if json.loads(extra or "{}").get("routing") == "tokens":
                number, found = engine.routings[name]
                names, length = list(found["shares"]), len(echoed) + len(text) - 1
                turns = [names[at % len(names)] for at in range(length)]
                engine.routings[name] = number, {**found, "tokens": [turns]}
            return list(text)

        def choice(new):
            told = {} if body.get("logprobs") is None else {"logprobs": {"tokens": new}}
            return {"index": 0, "text": "".join(new), **told}

        usage = {"usage": {"prompt_tokens": len(echoed)}}
        if not body.get("stream"):
            return JSONResponse({**head, "choices": [choice(echoed + await tokens())], **usage})

        async def events():
            last = [] if echoed else ['"model":"pool" data: [DONE]']
            for piece in [*([echoed] if echoed else []), *await tokens(), *last]:
                event = {**head, "choices": [choice(list(piece) if echoed else [piece])]}
                yield f"data: {json.dumps(event, separators=(',', ':'))}\n\n"
            if body.get("stream_options"):
                yield f"data: {json.dumps({**head, 'choices': [], **usage})}\n\n"
            yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    async def models(request):
        data = [{"id": served, "object": "model", "parent": None}]
        return JSONResponse({"object": "list", "data": data})

    async def other(request):
        return JSONResponse({"seen": (await request.body()).decode()})

    async def health(request):
        return Response()

    async def metrics(request):
        return Response(generate_latest(registry))

    app = Starlette(
        routes=[
            Route("/v1/completions", answer, methods=["POST"]),
            Route("/v1/chat/completions", answer, methods=["POST"]),
            Route("/v1/responses", answer, methods=["POST"]),
            Route("/v1/models", models),
            Route("/v1/embeddings", other, methods=["POST"]),
            Route("/health", health),
            Route("/metrics", metrics),
            *more,
        ]
    )
    app.state.engine_client = engine
    app.state.args = SimpleNamespace(
        api_key=api_key, served_model_name=[served], model="base", host=host, uds=None
    )
    return app


@dataclass
class Reply:
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    chunks: list[bytes] = field(default_factory=list)

    @property
    def body(self) -> bytes:
        return b"".join(self.chunks)

    @property
    def json(self) -> Any:
        assert int(self.headers["content-length"]) == len(self.body)
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        lines = [line[6:] for line in self.body.decode().split("\n") if line.startswith("data: ")]
        assert lines.pop() == "[DONE]"
        return [json.loads(line) for line in lines]


class Server:
    """The middleware before the fake server, started; `async with Server(engine) as server`."""

    def __init__(self, engine=None, **settings):
        self.engine = engine or FakeEngine()
        registry = CollectorRegistry()
        self.app = PoolMiddleware(
            fake_vllm(self.engine, registry=registry, **settings), Metrics(registry)
        )
        self.inner = self.app.app
        self.started: dict[str, Any] = {}

    async def __aenter__(self):
        self._messages: asyncio.Queue = asyncio.Queue()
        up = asyncio.Event()

        async def send(message):
            self.started = self.started or message
            up.set()

        scope = {"type": "lifespan", "app": self.inner, "state": {}, "asgi": {"version": "3.0"}}
        self._life = asyncio.create_task(self.app(scope, self._messages.get, send))
        await self._messages.put({"type": "lifespan.startup"})
        await up.wait()
        return self

    async def __aexit__(self, *_):
        await self._messages.put({"type": "lifespan.shutdown"})
        await self._life

    async def call(
        self,
        method,
        path,
        body=None,
        *,
        key=None,
        raw=None,
        headers=None,
        receive=None,
        send=None,
    ) -> Reply:
        content = raw if raw is not None else (b"" if body is None else json.dumps(body).encode())
        given = {"content-type": "application/json", "content-length": str(len(content))}
        given |= {"authorization": f"Bearer {key}"} if key else {}
        given |= headers or {}
        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "scheme": "http",
            "http_version": "1.1",
            "headers": [(name.encode(), value.encode()) for name, value in given.items()],
            "client": ("10.0.0.1", 1),
            "server": ("server", 80),
            "app": self.inner,
            "state": {},
        }
        parts = [content[: len(content) // 2], content[len(content) // 2 :]]
        reply = Reply()

        async def given_receive():
            if parts:
                more = len(parts) > 1
                return {"type": "http.request", "body": parts.pop(0), "more_body": more}
            await asyncio.Event().wait()

        async def given_send(message):
            if message["type"] == "http.response.start":
                reply.status = message["status"]
                reply.headers = {k.decode(): v.decode() for k, v in message["headers"]}
            else:
                reply.chunks.append(message.get("body", b""))

        app = self.app(scope, receive or given_receive, send or given_send)
        await asyncio.wait_for(app, 10)
        return reply

    async def ask(self, prompt="hi", **body) -> Reply:
        return await self.call("POST", "/v1/completions", {"prompt": prompt, **body})

    async def text(self, prompt="hi", **body) -> str:
        reply = await self.ask(prompt, **body)
        assert reply.status == 200, reply.body
        return reply.json["choices"][0]["text"]
