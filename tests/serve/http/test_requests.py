"""What a request may ask for, and what it gets."""

import json

import pytest

from phatgoose.serve.http import rewrite
from phatgoose.serve.http.choice import choose, salt
from phatgoose.serve.http.refusal import Refusal
from phatgoose.serve.http.workers import Contents
from phatgoose.serve.pool.choice import Request
from tests.serve.http.fake import FakeEngine, Server

pytestmark = pytest.mark.anyio


async def test_every_way_to_choose():
    async with Server() as server:
        assert await server.text(model="pool") == "a+b"
        assert await server.text() == "a+b"  # as vLLM serves requests without a model
        assert await server.text(model="pool/a") == "a"
        assert await server.text(model="base") == "base"
        assert await server.text(model="pool", phatgoose={"allow": ["b"]}) == "b"
        assert await server.text(model="pool", phatgoose={"deny": ["b"]}) == "a"
        assert await server.text(model="pool", phatgoose={"base": True}) == "base"
        assert await server.text(model="pool", phatgoose={}) == "a+b"


async def test_mixtures():
    weights = {"a": 0.7, "b": 0.3}
    async with Server() as server:
        assert await server.text(phatgoose={"weights": {"b": 1}}) == "b"
        assert await server.text(phatgoose={"weights": weights, "scale": 0}) == "a+b"
        told = json.loads(server.engine.last["vllm_xargs"]["phatgoose"])
        assert told == {"weights": weights, "scale": 0.0}
        salts = {server.engine.last["cache_salt"]}
        for asked in ({"weights": weights}, {"top_k": 1}, {"temperature": 3}, {"scale": 2}, {}):
            await server.ask(phatgoose=asked)
            salts.add(server.engine.last["cache_salt"])
        assert len(salts) == 6
        assert await server.text(model="pool/a", phatgoose={"scale": 0.5}) == "a"
        told = json.loads(server.engine.last["vllm_xargs"]["phatgoose"])
        assert told == {"allow": ["a"], "scale": 0.5}


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"weights": {"a": 1, "c": 1}}, "c: no expert of this name"),
        ({"weights": {"a": -1}}, "at least 0 and finite"),
        ({"weights": {}}, "weights are empty"),
        ({"weights": {"a": 1}, "deny": ["b"]}, "deny has no meaning beside them"),
        ({"weights": {"a": 1}, "model": "pool/a"}, "says which experts to use"),
        ({"scale": 0.5, "model": "base"}, "scale has no meaning beside it"),
        ({"top_k": 3}, "room for 2 a request"),
        ({"temperature": "hot"}, "temperature must be a number"),
    ],
)
async def test_mixtures_that_are_refused(asked, says):
    model = asked.get("model", "pool")
    asked = {key: value for key, value in asked.items() if key != "model"}
    async with Server() as server:
        reply = await server.ask(model=model, phatgoose=asked)
        assert reply.status == 400 and says in reply.json["error"]["message"]
        assert "\n" not in reply.json["error"]["message"]
        assert not hasattr(server.engine, "last")


async def test_a_server_without_room_for_mixtures():
    engine = FakeEngine()
    for worker in engine.workers:
        worker.mixture = 0
    async with Server(engine) as server:
        reply = await server.ask(phatgoose={"weights": {"a": 1}})
        assert reply.status == 400 and "--max-mixture" in reply.json["error"]["message"]
        assert await server.text(phatgoose={"allow": ["a"]}) == "a"


async def test_the_answer_has_the_model_that_was_asked_for():
    async with Server() as server:
        for model in ("pool", "pool/a", "base"):
            assert (await server.ask(model=model)).json["model"] == model
            events = (await server.ask(model=model, stream=True)).events
            assert {event["model"] for event in events} == {model}
            assert events[-1]["choices"][0]["text"] == '"model":"pool" data: [DONE]'


@pytest.mark.parametrize("engines", [1, 2])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_routing_in_the_answer(path, engines):
    async with Server(FakeEngine(engines=engines)) as server:
        body = {"model": "pool", "prompt": "hi", "phatgoose": {"routing": "shares"}}
        reply = await server.call("POST", path, body)
        assert reply.json["phatgoose"] == {"generation": 0, "shares": {"a": 0.5, "b": 0.5}}
        reply = await server.call("POST", path, {**body, "stream": True, "model": "pool/b"})
        *events, last = reply.events
        assert last == {
            **{key: events[0][key] for key in ("id", "object", "created")},
            "model": "pool/b",
            "choices": [],
            "phatgoose": {"generation": 0, "shares": {"b": 1.0}},
        }
        assert all("phatgoose" not in event for event in events)


async def test_no_routing_unless_asked():
    async with Server() as server:
        assert "phatgoose" not in (await server.ask()).json
        assert "phatgoose_routing" not in server.engine.calls


async def test_requests_of_one_id_are_told_apart():
    async with Server() as server:
        for allow in (["a"], ["b"]):
            body = {"prompt": "hi", "phatgoose": {"allow": allow, "routing": "shares"}}
            headers = {"x-request-id": "mine"}
            reply = await server.call("POST", "/v1/completions", body, headers=headers)
            assert reply.json["phatgoose"]["shares"] == {allow[0]: 1.0}
            assert reply.json["id"].startswith("cmpl-mine-")


async def test_an_answer_outlives_its_routing():
    async with Server() as server:
        server.engine.routings = _Forgetful()
        reply = await server.ask(phatgoose={"routing": "shares"})
        assert reply.json["choices"][0]["text"] == "a+b"
        assert "no routing of such" in reply.json["phatgoose"]["error"]


class _Forgetful(dict):
    def get(self, key, default=None):
        return default


async def test_a_server_that_does_not_note_routing():
    engine = FakeEngine()
    engine.notes = False
    async with Server(engine) as server:
        assert await server.text() == "a+b"
        assert (await server.ask(phatgoose={"routing": "shares"})).status == 400
        assert (await server.call("GET", "/v1/experts")).json["entropy"] is None


async def test_what_vllm_gets():
    async with Server() as server:
        await server.ask(model="pool/a", vllm_xargs={"mine": 1}, logit_bias={"3": 1})
        body = server.engine.last
        assert json.loads(body["vllm_xargs"].pop("phatgoose")) == {"allow": ["a"]}
        assert body["vllm_xargs"] == {"mine": 1}
        assert body["logit_bias"] == {"3": 1}
        assert len(body["cache_salt"]) == 64
        await server.ask()
        assert "vllm_xargs" not in server.engine.last


async def test_cached_prompts_are_those_of_the_same_experts():
    async with Server() as server:
        asked = [
            ({}, "a+b"),
            ({"model": "pool/a"}, "a"),
            ({"phatgoose": {"base": True}}, "base"),
            ({"phatgoose": {"allow": ["b"]}}, "b"),
            ({"cache_salt": "mine"}, "a+b"),
        ]
        for _ in range(2):
            for body, text in asked:
                assert await server.text(**body) == text
        assert len(server.engine.cache) == len(asked)
        # Said in another way, they are the same experts.
        assert await server.text(phatgoose={"allow": ["a"]}) == "a"
        assert await server.text(phatgoose={"allow": ["b", "a"]}) == "a+b"
        assert await server.text(phatgoose={"deny": []}) == "a+b"
        assert await server.text(phatgoose={"routing": "shares"}) == "a+b"
        assert len(server.engine.cache) == len(asked)
        await server.text(phatgoose={"routing": "tokens"})  # wants all of them computed
        assert len(server.engine.cache) == len(asked) + 1


async def test_without_the_salt_the_cache_would_be_stale(monkeypatch):
    """The control: the fake cache finds a missing salt out."""
    monkeypatch.setattr(rewrite, "salt", lambda *_: "x")
    async with Server() as server:
        assert await server.text() == "a+b"
        assert await server.text(model="pool/a") == "a+b"


BAD = [
    ({"phatgoose": ["a"]}, "a JSON object, got list"),
    ({"phatgoose": {"allowed": ["a"]}}, "no setting 'allowed'"),
    ({"phatgoose": {"allow": "a"}}, "a list of experts' names"),
    ({"phatgoose": {"allow": [1]}}, "a list of experts' names"),
    ({"phatgoose": {"allow": ["c"]}}, "c: no expert of this name"),
    ({"phatgoose": {"deny": ["c"]}}, "c: no expert of this name"),
    ({"phatgoose": {"allow": []}}, '"allow" is empty'),
    ({"phatgoose": {"deny": ["a", "b"]}}, "leaves no expert"),
    ({"phatgoose": {"allow": ["a"], "deny": ["a"]}}, "leaves no expert"),
    ({"phatgoose": {"base": 1}}, "true or false"),
    ({"phatgoose": {"base": True, "allow": ["a"]}}, "leaves out every expert"),
    ({"phatgoose": {"routing": "all"}}, "one of shares, tokens"),
    ({"model": "pool/a", "phatgoose": {"allow": ["b"]}}, "says which experts"),
    ({"model": "base", "phatgoose": {"deny": ["b"]}}, "says which experts"),
    ({"vllm_xargs": {"phatgoose": "{}"}}, "beside vllm_xargs"),
    ({"vllm_xargs": 3}, "vllm_xargs is an object"),
    ({"vllm_xargs": {"kv_transfer_params": 1}}, "no extra argument"),
    ({"vllm_xargs": {"mine": 1, "ec_transfer_params": "x"}}, "no extra argument"),
    ({"cache_salt": ""}, "cache_salt"),
    ({"cache_salt": 3}, "cache_salt"),
    ({"model": "pool/a", "use_beam_search": True}, "Beam search"),
]


@pytest.mark.parametrize(("body", "message"), BAD)
async def test_bad_requests(body, message):
    async with Server() as server:
        reply = await server.ask(**body)
        assert reply.status == 400
        error = reply.json["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert message in error["message"]
        assert error["code"] == 400
        assert not server.engine.cache


@pytest.mark.parametrize("model", ["pool/c", "pool/", "other", "a", "base/a", 3, ["pool"]])
async def test_unknown_models(model):
    async with Server() as server:
        reply = await server.ask(model=model)
        assert reply.status == 404
        assert reply.json["error"]["param"] == "model"
        assert "'pool/' with the name of an expert: a, b" in reply.json["error"]["message"]


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"\xff"])
async def test_bodies_that_are_none(raw):
    async with Server() as server:
        assert (await server.call("POST", "/v1/completions", raw=raw)).status == 400


async def test_responses_have_choices_and_no_routing():
    async with Server() as server:
        body = {"model": "pool/a", "prompt": "hi"}
        reply = await server.call("POST", "/v1/responses", body)
        assert reply.json["choices"][0]["text"] == "a"
        for more in ({"phatgoose": {"routing": "shares"}}, {"background": True}):
            reply = await server.call("POST", "/v1/responses", {**body, **more})
            assert reply.status == 400


@pytest.mark.parametrize(
    "body",
    [
        {"phatgoose": {"base": True}},
        {"vllm_xargs": {"phatgoose": "{}"}},
        {"sampling_params": {"extra_args": {"phatgoose": "{}"}}},
        {"requests": [{"vllm_xargs": {"phatgoose": "{}"}}]},
    ],
)
async def test_no_choice_slips_past_the_salt(body):
    async with Server() as server:
        assert (await server.call("POST", "/v1/embeddings", body)).status == 400
        raw = json.dumps(body).replace("p", "\\u0070", 1).encode()
        assert (await server.call("POST", "/v1/embeddings", raw=raw)).status == 400


async def test_other_routes_pass():
    async with Server() as server:
        body = {"input": "what is phatgoose?"}
        reply = await server.call("POST", "/v1/embeddings", body)
        assert json.loads(reply.json["seen"]) == body
        assert (await server.call("GET", "/health")).status == 200
        # What a browser asks first goes to vLLM's middleware; the fake has none.
        asking = {"access-control-request-method": "POST"}
        reply = await server.call("OPTIONS", "/v1/experts", headers=asking)
        assert reply.body == b"Not Found"


async def test_models():
    async with Server() as server:
        listed = (await server.call("GET", "/v1/models")).json["data"]
        names = {model["id"]: model["parent"] for model in listed}
        assert names == {"pool": None, "base": "pool", "pool/a": "pool", "pool/b": "pool"}


async def test_a_name_with_slashes():
    """Experts from the Hub are called owner/name."""
    async with Server(FakeEngine(["owner/x", "b"]), served="mine/pool") as server:
        assert await server.text(model="mine/pool/owner/x") == "owner/x"


async def test_the_server_does_not_start_on_other_workers():
    engine = FakeEngine()
    engine.ours = False
    async with Server(engine) as server:
        assert server.started["type"] == "lifespan.startup.failed"
        assert "no method phatgoose_pool" in server.started["message"]
        assert (await server.ask()).status == 503


async def test_the_server_does_not_start_where_workers_differ():
    engine = FakeEngine()
    engine.workers[1].names.append("c")
    async with Server(engine) as server:
        assert server.started["type"] == "lifespan.startup.failed"


async def test_the_pool_cannot_have_the_name_of_the_base():
    async with Server(served="base") as server:
        assert server.started["type"] == "lifespan.startup.failed"


def test_the_salt_depends_on_all_that_matters():
    names = ["a", "b"]
    kinds = [
        choose(body, served="pool", names=names)
        for body in ({}, {"model": "base"}, {"model": "pool/a"}, {"model": "pool/b"})
    ]
    experts = [{"name": name} for name in names]
    salts = {
        salt(kind, Contents(0, fingerprint, 2, 8, experts), given)
        for kind in kinds
        for fingerprint in ("1", "2")
        for given in (None, "mine", "yours")
    }
    assert len(salts) == len(kinds) * 2 * 3
    assert all(salt.isalnum() and len(salt) <= 128 for salt in salts)  # as vLLM wants them


def test_the_last_expert_gone_leaves_the_base():
    assert choose({}, served="pool", names=[]) == Request()
    with pytest.raises(Refusal):
        choose({"model": "pool/a"}, served="pool", names=[])
