"""/v1/experts: who may change the pool, from where, and what a change does to requests."""

import asyncio
import json
import logging
from types import SimpleNamespace

import pytest

from phatgoose.errors import ConfigError
from phatgoose.experts import hub
from phatgoose.serve.http import Access, access
from phatgoose.serve.http.recent import WINDOW, Recent, Totals
from tests.serve.http.fake import CAPACITY, FakeEngine, Server

ADMIN = "admin-key"

pytestmark = pytest.mark.anyio


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A root with the experts c and nan below it, a secret beside it, and a way around."""
    inside = tmp_path / "root"
    for name in ("c", "d", "nan", "deep/e"):
        (inside / name).mkdir(parents=True)
        (inside / name / "adapter_config.json").write_text("{}")
    (tmp_path / "secret").mkdir()
    (tmp_path / "root-too").mkdir()
    (tmp_path / "secret" / "adapter_config.json").write_text("{}")
    (inside / "link").symlink_to(tmp_path / "secret")
    (inside / "inner").symlink_to(inside / "c")
    (inside / "half").mkdir()
    (inside / "half" / "adapter_config.json").symlink_to(tmp_path / "secret/adapter_config.json")
    (inside / "loop").symlink_to(inside / "loop")
    (inside / "file").write_text("")
    monkeypatch.setenv(access.ADMIN_KEY, ADMIN)
    monkeypatch.setenv(access.EXPERTS_ROOT, str(inside))
    return inside


def add(server, source="c", key=ADMIN, **body):
    return server.call("POST", "/v1/experts", {"source": str(source), **body}, key=key)


def remove(server, name, key=ADMIN):
    return server.call("DELETE", f"/v1/experts/{name}", key=key)


async def names(server):
    return [entry["id"] for entry in (await server.call("GET", "/v1/experts")).json["data"]]


async def test_add_see_use_remove(root):
    async with Server() as server:
        before = (await server.call("GET", "/v1/experts")).json
        reply = await add(server)
        assert reply.status == 201
        assert reply.json["id"] == "c"
        assert reply.json["model"] == "pool/c"
        assert reply.json["generation"] == 1
        assert reply.json["fingerprint"] != before["fingerprint"]
        assert await names(server) == ["a", "b", "c"]
        assert "pool/c" in (await server.call("GET", "/v1/models")).body.decode()
        assert await server.text() == "a+b+c"
        assert await server.text(model="pool/c") == "c"
        reply = await remove(server, "c")
        assert reply.status == 200
        assert (reply.json["id"], reply.json["deleted"]) == ("c", True)
        assert reply.json["fingerprint"] == before["fingerprint"]
        assert await server.text() == "a+b"
        assert (await server.ask(model="pool/c")).status == 404
        assert not server.engine.paused


async def test_another_name(root):
    async with Server() as server:
        assert (await add(server, name="other")).json["id"] == "other"
        assert (await add(server, root / "deep" / "e")).json["id"] == "e"
        assert await names(server) == ["a", "b", "other", "e"]


@pytest.mark.parametrize("key", [None, "wrong", ADMIN + "x", ADMIN[:-1], "k\u00e9y"])
async def test_changes_want_the_admin_key(root, key):
    async with Server(api_key=["user"]) as server:
        for reply in (await add(server, key=key), await remove(server, "a", key=key)):
            assert reply.status == 401
            assert reply.json["error"]["type"] == "AuthenticationError"
            assert reply.headers["www-authenticate"] == "Bearer"
        assert (await add(server, key="user")).status == 401
        assert server.engine.workers[0].names == ["a", "b"]


async def test_other_schemes_are_no_key(root):
    async with Server() as server:
        for value in (f"Basic {ADMIN}", ADMIN, "Bearer", "Bearer "):
            headers = {"authorization": value}
            reply = await server.call("DELETE", "/v1/experts/a", headers=headers)
            assert reply.status == 401


async def test_without_an_admin_key_nobody_changes_anything():
    async with Server() as server:
        for reply in (await add(server, key="x"), await remove(server, "a", key=None)):
            assert reply.status == 403
        assert (await server.call("GET", "/v1/experts")).status == 200


async def test_readers_want_the_api_key_or_the_admin_key(root):
    async with Server(api_key=["user"]) as server:
        for key, status in ((None, 401), ("wrong", 401), ("user", 200), (ADMIN, 200)):
            assert (await server.call("GET", "/v1/experts", key=key)).status == status
            body = {"prompt": "hi"}
            asked = await server.call("POST", "/v1/completions", body, key=key)
            assert asked.status == (200 if key == "user" else 401)


async def test_the_key_comes_from_the_environment_too(monkeypatch):
    monkeypatch.setenv(access.API_KEY, "user")
    async with Server() as server:
        assert (await server.ask()).status == 401
        reply = await server.call("POST", "/v1/completions", {"prompt": "hi"}, key="user")
        assert reply.status == 200


async def test_where_experts_came_from_is_for_the_admin(root):
    async with Server() as server:
        assert "/secret/a" not in (await server.call("GET", "/v1/experts")).body.decode()
        assert "/secret/a" in (await server.call("GET", "/v1/experts", key=ADMIN)).body.decode()


@pytest.mark.parametrize(
    "source",
    [
        "../secret",
        "link",
        "half",
        "loop",
        "file",
        ".",
        "",
        "..",
        "../root-too",
        "/",
        "/etc",
        "c\0",
        "x" * 5000,
        "no/such",
        "owner/name",
        "file:///etc",
    ],
)
async def test_sources_that_are_refused(root, source):
    async with Server() as server:
        reply = await add(server, source)
        assert reply.status == (400 if source == "" else 403), reply.body
        assert reply.json["error"]["param"] == "source"
        assert "phatgoose_prepare" not in server.engine.calls


async def test_absolute_paths_and_inner_links_are_fine(root):
    async with Server() as server:
        assert (await add(server, root / "c")).status == 201
        assert (await add(server, "inner", name="again")).json["id"] == "again"


async def test_without_a_root_no_folder(root, monkeypatch):
    monkeypatch.delenv(access.EXPERTS_ROOT)
    async with Server() as server:
        reply = await add(server, root / "c")
        assert reply.status == 403
        assert "--experts-root" in reply.json["error"]["message"]


async def test_hub_ids_on_the_list(root, monkeypatch, tmp_path):
    monkeypatch.setenv(access.ALLOW_HUB, "friend someone/theirs")
    asked = []

    def download(source):
        asked.append(source)
        return tmp_path / "secret"  # where the Hub's files are is not below the root

    monkeypatch.setattr(access, "download", download)
    async with Server() as server:
        refused = ("friendly/x", "someone/other", "someone", "friend", "x/friend")
        folders = (
            "friendly/x/law",
            "someone/other/theirs",
            "x/someone/theirs",
            "x/friend/law@main",
        )
        for source in (*refused, *folders):
            assert (await add(server, source)).status == 403
        assert (await add(server, "friend/x@main")).json["id"] == "friend/x"
        assert (await add(server, "someone/theirs")).json["id"] == "someone/theirs"
        assert asked == ["friend/x@main", "someone/theirs"]
        for name in ("friend/x", "someone/theirs"):
            assert (await remove(server, name)).status == 200
        assert (await add(server, "friend/x/law@main")).json["id"] == "friend/x/law"
        code = await add(server, "someone/theirs/code/checkpoint-5")
        assert code.json["id"] == "someone/theirs/code"


NO_HUB_IDS = [
    "friend/../outside",
    "friend/mine/../../outside",
    "friend/mine/..",
    "friend/..",
    "friend/.",
    "friend//x",
    "friend/",
    "friend/x//y",
    "friend/x/y/",
    "friend/x/./y",
    "friend/x/y/..",
    "friend/x/y/../../../outside",
    "friend/x/../../outside@main",
    "friend/x/*",
    "friend/x/y=z",
    "friend/x/y@",
    "friend/x/y@../../refs",
    "friend/x@main/../y",
    "mine=friend/x",
    "mine=friend/x/y@main",
    "Friend/x/y",
    "x/friend/x",
    "/friend/x",
    "./friend/x",
    "../friend/x",
    "friend\\x",
    "friend/x\0",
    "friend/x\n",
    "friend/ x",
    "friend/x@",
    "friend/x@../../refs",
    "friend/x@/etc",
    "friend/x@a/../b",
    "friend/x@main@main",
    "friend/x@main\n",
    "friend/x.git",
    "Friend/x",
    "FRIEND/x",
    "friend/x?revision=main",
    "friend%2Fx",
    "https://huggingface.co/friend/x",
    "hf://friend/x",
    "friend@main/x",
    "friend",
    "friend/" + "x" * 97,
]


@pytest.fixture
def beside(root, tmp_path, monkeypatch):
    """The server's working directory has folders by the names of Hub ids, as a pull leaves them."""
    monkeypatch.setenv(access.ALLOW_HUB, "friend")
    monkeypatch.chdir(tmp_path)
    for folder in ("friend/mine", "outside", "Friend/x"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "adapter_config.json").write_text("{}")
    (tmp_path / "friend" / "linked").symlink_to(tmp_path / "outside")


@pytest.mark.parametrize("source", NO_HUB_IDS)
async def test_what_is_no_hub_id_is_not_taken_for_one(beside, monkeypatch, source):
    monkeypatch.setattr(access, "download", lambda source: pytest.fail("downloaded"))
    async with Server() as server:
        reply = await add(server, source, name="x")
        assert reply.status == 403, reply.body
        assert "phatgoose_prepare" not in server.engine.calls


@pytest.mark.parametrize(
    "source",
    [
        *("friend/mine", "friend/linked", "friend/mine@main"),
        *("friend/mine/sub", "friend/x/mine@main", "friend/x/mine/checkpoint-5"),
    ],
)
async def test_a_hub_id_is_never_a_folder(beside, monkeypatch, source):
    """Though there is one of that name: the Hub is asked."""
    asked = []

    def snapshot_download(repository, **more):
        asked.append((repository, more["revision"], more["allow_patterns"]))
        raise OSError("offline")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    async with Server() as server:
        reply = await add(server, source, name="x")
        assert reply.status == 404
        assert "phatgoose_prepare" not in server.engine.calls
    path, _, revision = source.partition("@")
    owner, name, *folder = path.split("/")
    prefix = "/".join([*folder, ""])
    patterns = [prefix + name for name in hub.files()]
    assert asked == [(f"{owner}/{name}", revision or None, patterns)]


@pytest.mark.parametrize(
    "body", [{}, {"source": 3}, {"source": "c", "folder": "x"}, {"source": "c", "name": ""}]
)
async def test_bad_bodies(root, body):
    async with Server() as server:
        assert (await server.call("POST", "/v1/experts", body, key=ADMIN)).status == 400


@pytest.mark.parametrize("name", ["a\nb", " a", "x" * 201, 5, ["a"]])
async def test_bad_names(root, name):
    async with Server() as server:
        assert (await add(server, name=name)).status == 400


async def test_wrong_methods(root):
    async with Server() as server:
        for method, path in (
            ("PUT", "/v1/experts"),
            ("DELETE", "/v1/experts"),
            ("POST", "/v1/experts/a"),
        ):
            assert (await server.call(method, path, {}, key=ADMIN)).status == 405


async def test_one_expert(root):
    async with Server() as server:
        assert (await server.call("GET", "/v1/experts/a")).json["rank"] == 4
        assert (await server.call("GET", "/v1/experts/c")).status == 404


async def test_taken_names_unknown_names_and_a_full_pool(root):
    async with Server() as server:
        assert (await add(server, name="a")).status == 409
        assert (await remove(server, "z")).status == 404
        for name in "cd":
            assert (await add(server, name)).status == 201
        assert len(await names(server)) == CAPACITY
        reply = await add(server, "deep/e")
        assert reply.status == 409
        assert "--capacity" in reply.json["error"]["message"]


@pytest.mark.parametrize("rank", [0, 1, 3])
async def test_what_one_rank_refuses_no_rank_has(root, rank):
    """Also a rank of another data-parallel engine, of which `collective_rpc` tells nothing."""
    engine = FakeEngine(engines=2)
    engine.workers[rank].bad.add("nan")
    async with Server(engine) as server:
        before = (await server.call("GET", "/v1/experts")).json
        reply = await add(server, "nan")
        assert reply.status == 400
        assert "holds NaN" in reply.json["error"]["message"]
        assert (await server.call("GET", "/v1/experts")).json == before
        assert not any(worker.prepared for worker in engine.workers)
        assert "phatgoose_commit" not in engine.calls
        assert await server.text() == "a+b"


@pytest.mark.parametrize("rank", [1, 2])
async def test_what_is_not_the_same_on_all_ranks_is_refused(root, rank):
    engine = FakeEngine(engines=2)
    engine.workers[rank].reads = "other"
    async with Server(engine) as server:
        reply = await add(server)
        assert reply.status == 400
        assert "not the same for all workers" in reply.json["error"]["message"]
        assert not any(worker.prepared for worker in engine.workers)


async def test_a_cache_that_cannot_be_reset_stops_the_change(root):
    async with Server() as server:
        server.engine.resets = False
        assert (await add(server)).status == 503
        assert await names(server) == ["a", "b"]
        assert await server.text() == "a+b"
        server.engine.resets = True
        assert (await add(server)).status == 201


async def test_a_change_that_fails_midway_stops_the_server(root):
    async with Server() as server:
        server.engine.workers[1].breaks = True
        assert (await add(server)).status == 503
        assert (await server.ask()).status == 503
        assert (await server.call("GET", "/health")).status == 503
        assert (await server.call("POST", "/v1/embeddings", {})).status == 503
        assert (await add(server, "d")).status == 503
        assert server.engine.paused  # what other routes wait for


async def test_requests_in_flight_finish_under_their_pool(root):
    async with Server() as server:
        server.engine.hold = asyncio.Event()
        early = [asyncio.create_task(server.text(str(i))) for i in range(3)]
        early.append(asyncio.create_task(server.text("named", model="pool/a")))
        await asyncio.sleep(0.01)
        change = asyncio.create_task(remove(server, "a"))
        await asyncio.sleep(0.01)
        late = [asyncio.create_task(server.text(str(i))) for i in range(3)]
        gone = asyncio.create_task(server.ask("named", model="pool/a"))
        await asyncio.sleep(0.01)
        assert not change.done() and not any(task.done() for task in (*early, *late))
        server.engine.hold.set()
        assert await asyncio.gather(*early) == ["a+b"] * 3 + ["a"]
        assert (await change).status == 200
        assert await asyncio.gather(*late) == ["b"] * 3
        assert (await gone).status == 404


async def test_changes_wait_for_each_other(root):
    async with Server() as server:
        replies = await asyncio.gather(*(add(server, "c", name=f"n{i % 2}") for i in range(6)))
        assert sorted(reply.status for reply in replies) == [201, 201, 409, 409, 409, 409]
        assert sorted(await names(server)) == ["a", "b", "n0", "n1"]


async def test_a_change_does_not_wait_for_ever(root, monkeypatch):
    monkeypatch.setenv(access.DRAIN_SECONDS, "0.05")
    async with Server() as server:
        server.engine.hold = asyncio.Event()
        slow = asyncio.create_task(server.text())
        await asyncio.sleep(0.01)
        reply = await add(server)
        assert reply.status == 503
        assert "still running" in reply.json["error"]["message"]
        server.engine.hold.set()
        assert await slow == "a+b"
        assert await server.text() == "a+b"
        assert (await add(server)).status == 201


async def test_metrics(root):
    async with Server() as server:
        await server.text()
        await add(server)
        await remove(server, "a")
        await add(server, "../secret")
        await server.app.pool.sample()
        lines = (await server.call("GET", "/metrics")).body.decode().splitlines()
        for line in (
            "phatgoose_experts_loaded 2.0",
            f"phatgoose_experts_capacity {CAPACITY}.0",
            "phatgoose_pool_generation 2.0",
            'phatgoose_pool_changes_total{action="add"} 1.0',
            'phatgoose_pool_changes_total{action="remove"} 1.0',
            'phatgoose_refusals_total{reason="source"} 1.0',
            'phatgoose_expert_tokens_total{expert="b"} 0.5',
            "phatgoose_routing_entropy 0.5",
        ):
            assert line in lines


async def test_counters_of_experts_that_are_gone_end(root):
    """Else whoever adds experts under new names adds lines to /metrics without end."""
    async with Server() as server:
        for number in range(5):
            assert (await add(server, name=f"n{number}")).status == 201
            await server.text(str(number))
            await server.app.pool.sample()
            assert f'expert="n{number}"' in (await server.call("GET", "/metrics")).body.decode()
            early = server.engine.workers[0].phatgoose_totals()
            assert (await remove(server, f"n{number}")).status == 200
            # A worker's answer of before the change, read after it, brings nothing back.
            server.engine.workers[0].phatgoose_totals = lambda early=early: early
            await server.app.pool.sample()
            assert 'expert="n' not in (await server.call("GET", "/metrics")).body.decode()
            del server.engine.workers[0].phatgoose_totals


@pytest.mark.parametrize("engines", [1, 2])
async def test_shares_of_the_last_minutes(root, engines):
    async with Server(FakeEngine(engines=engines)) as server:
        await server.app.pool.sample()
        await server.text("one", model="pool/a")
        await server.text("two")
        await server.app.pool.sample()
        found = (await server.call("GET", "/v1/experts")).json
        assert found["window_seconds"] == WINDOW
        assert found["entropy"] == 0.5
        assert {e["id"]: (e["tokens"], e["share"]) for e in found["data"]} == {
            "a": (1.5, 0.75),
            "b": (0.5, 0.25),
        }


async def test_an_engine_that_cannot_be_asked_is_not_served():
    """Of several data-parallel ones; some versions of vLLM tell what the first one says, alone."""
    engine = FakeEngine()
    parallel = SimpleNamespace(data_parallel_size=2)
    engine.vllm_config = SimpleNamespace(parallel_config=parallel)
    async with Server(engine) as server:
        assert server.started["type"] == "lifespan.startup.failed"
        assert "data-parallel" in server.started["message"]


async def test_the_log_tells_changes_and_refusals_and_no_keys(root, caplog):
    caplog.set_level(logging.INFO, logger="phatgoose")
    async with Server(api_key=["user-key"]) as server:
        await add(server)
        await add(server, key="guessed-key")
        await remove(server, "a")
    events = [json.loads(r.message) for r in caplog.records if r.message.startswith("{")]
    assert [e["event"] for e in events] == ["expert_added", "refused", "expert_removed"]
    assert events[0]["expert"] == "c" and events[0]["generation"] == 1
    assert events[1]["client"] == "10.0.0.1" and events[1]["status"] == 401
    for key in (ADMIN, "guessed-key", "user-key"):
        assert key not in caplog.text


def test_shares_forget_what_is_older_than_the_window():
    recent = Recent()
    recent.add(Totals({"a": 10.0}, 1.0, 10.0), now=0.0)
    recent.add(Totals({"a": 10.0, "b": 30.0}, 3.0, 40.0), now=WINDOW / 2)
    assert recent.shares() == {"b": 1.0}
    recent.add(Totals({"a": 20.0, "b": 30.0}, 4.0, 50.0), now=WINDOW)
    assert recent.shares() == {"a": 0.25, "b": 0.75}
    recent.add(Totals({"a": 20.0, "b": 30.0}, 4.0, 50.0), now=WINDOW * 1.6)
    assert recent.shares() == {"a": 1.0}
    assert recent.grown().count == 10.0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({access.ADMIN_KEY: "x", access.API_KEY: "x"}, "an API key too"),
        ({access.EXPERTS_ROOT: "/no/such/root"}, "not a folder"),
        ({access.ALLOW_HUB: "friend .."}, "allow an owner"),
        ({access.ALLOW_HUB: "friend/"}, "allow an owner"),
        ({access.ALLOW_HUB: "friend/../x"}, "allow an owner"),
        ({access.ALLOW_HUB: "a/b/c"}, "owner/name"),
        ({access.ALLOW_HUB: "/"}, "owner/name"),
        ({access.DRAIN_SECONDS: "0"}, "above 0"),
        ({access.DRAIN_SECONDS: "soon"}, "no number"),
    ],
)
def test_settings_that_are_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        Access.read(given, None)


@pytest.mark.parametrize(
    "host", [None, "", "0.0.0.0", "::", "0", "10.0.0.1", "::ffff:10.0.0.1", "no.such.host.invalid"]
)
async def test_other_machines_need_a_key(host, monkeypatch):
    with pytest.raises(ConfigError, match="--allow-no-key"):
        Access().check_address(host)
    Access().check_address(host, uds="/run/phatgoose.sock")
    Access(api_keys=("k",)).check_address(host)
    Access(allow_no_key=True).check_address(host)
    # However the server was started, `vllm serve` with our middleware, say.
    async with Server(host=host) as server:
        assert server.started["type"] == "lifespan.startup.failed"
        assert "--allow-no-key" in server.started["message"]
    async with Server(host=host, api_key=["k"]) as server:
        assert server.started["type"] == "lifespan.startup.complete"
    monkeypatch.setenv(access.ALLOW_NO_KEY, "1")
    async with Server(host=host) as server:
        assert server.started["type"] == "lifespan.startup.complete"


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_this_machine_needs_none(host):
    Access().check_address(host)


def test_keys_are_not_shown():
    assert "secret" not in repr(Access(admin_key="secret", api_keys=("secret2",)))
