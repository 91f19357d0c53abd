"""`phatgoose serve` on the default pool, spoken to by OpenAI's own client.

Answers are those of `phatgoose.route` on transformers, in float32.
"""

import json
import os
import shutil
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from phatgoose import Choice
from phatgoose.default import tiny
from phatgoose.experts.lora import WEIGHTS_FILE
from phatgoose.models import load_base
from phatgoose.serve.http.recent import EVERY
from phatgoose.serve.http.routes import CHOOSES, RULES, Rule
from tests.serve.browser import browsing, opened
from tests.serve.server import ADMIN_KEY, API_KEY, Server, runs
from tests.serve.test_offline import NEAR_TIE

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
NEW = "proc_pluralise"  # the expert that comes and goes
TOKENS = 16


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """What may be added: an expert, and the same with a NaN in it."""
    folder = tmp_path_factory.mktemp("root")
    shutil.copytree(tiny.EXPERTS / NEW, folder / NEW)
    shutil.copytree(tiny.EXPERTS / NEW, folder / "broken")
    tensors = load_file(folder / "broken" / WEIGHTS_FILE)
    next(iter(tensors.values())).fill_(float("nan"))
    save_file(tensors, folder / "broken" / WEIGHTS_FILE, {"format": "pt"})
    (folder / "cut").mkdir()
    shutil.copytree(tiny.EXPERTS / NEW, folder / "cut", dirs_exist_ok=True)
    weights = folder / "cut" / WEIGHTS_FILE
    weights.write_bytes(weights.read_bytes()[:1000])
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory, root):
    """All experts but one. The last test ends it."""
    experts = [path for path in tiny.expert_folders() if path.name != NEW]
    flags = ("--enforce-eager", "--max-mixture", 3)
    found = Server(tmp_path_factory.mktemp("server"), *flags, "--experts", *experts, root=root)
    try:
        yield found.wait()
    finally:
        found.kill()


@pytest.fixture
def client(server):
    return client_of(server)


def client_of(server):
    openai = pytest.importorskip("openai")
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=API_KEY, max_retries=0)


@pytest.fixture(scope="module")
def prompts():
    rows = [json.loads(line)["inputs"] for line in tiny.DEMO.read_text().splitlines()]
    return [f"{text}\n" for text in rows[:3]] + ["Give the plural of each word: ink, eruption\n"]


@pytest.fixture(scope="module")
def expected(reference, prompts):
    """expected(names): the right answers of a pool of these experts, as texts."""
    model, tokenizer = load_base(tiny.BASE, device="cpu")
    ids = [tokenizer(text).input_ids for text in prompts]
    known = {}

    def answer(names, **settings):
        key = (tuple(names), *settings.items())
        if key not in known:
            folders = [tiny.EXPERTS / name for name in names]
            settings = settings or {"top_k": min(2, len(names))}
            found = reference(model, folders, ids, tokens=TOKENS, **(settings if names else {}))
            assert all(one.get("gap", 1.0) >= NEAR_TIE for one in found)
            known[key] = [_text(tokenizer, one["tokens"]) for one in found]
        return known[key]

    return answer


def _text(tokenizer, tokens):
    end = tokenizer.eos_token_id
    return tokenizer.decode(tokens[: tokens.index(end)] if end in tokens else tokens)


def names_at_start():
    return [path.name for path in tiny.expert_folders() if path.name != NEW]


def complete(client, prompt, model="pool", **field):
    found = client.completions.create(
        model=model,
        prompt=prompt,
        max_tokens=TOKENS,
        temperature=0,
        extra_body={"phatgoose": field} if field else None,
    )
    assert found.model == model
    return found


def texts(client, prompts, model="pool", **field):
    return [complete(client, prompt, model, **field).choices[0].text for prompt in prompts]


@pytest.mark.parametrize(
    ("model", "field"),
    [
        ("pool", {"weights": {"snips": 0.7, "ud_pos": 0.6, "trec_question_type": 0.4}}),
        ("pool", {"top_k": 1, "scale": 0.5}),
        ("pool", {"deny": ["snips"], "temperature": 3.0, "top_k": 3}),
        ("pool/snips", {"scale": 1.5}),
    ],
    ids=str,
)
def test_requests_mix_experts(model, field, client, prompts, expected):
    asked = {"allow": ["snips"], **field} if model == "pool/snips" else field
    right = expected(names_at_start(), top_k=2, choice=Choice(**asked))
    assert texts(client, prompts, model, **field) == right
    assert right != expected(names_at_start())


def test_it_streams_completions_and_chats(client, prompts, expected):
    right = expected(names_at_start())
    for prompt, text in zip(prompts, right, strict=True):
        stream = client.completions.create(
            model="pool", prompt=prompt, max_tokens=TOKENS, temperature=0, stream=True
        )
        assert "".join(event.choices[0].text for event in stream) == text
        stream = client.chat.completions.create(
            model="pool",
            messages=[{"role": "user", "content": prompt.removesuffix("\n")}],
            max_tokens=TOKENS,
            temperature=0,
            stream=True,
            extra_body={"phatgoose": {"routing": "shares"}},
        )
        *events, last = stream
        assert "".join(event.choices[0].delta.content or "" for event in events) == text
        assert last.choices == []
        shares = last.phatgoose["shares"]
        assert set(shares) <= set(names_at_start())
        assert sum(shares.values()) == pytest.approx(1, abs=1e-4)


def test_models_and_experts(client, server):
    experts = names_at_start()
    assert [m.id for m in client.models.list()] == [
        "pool",
        "base",
        *(f"pool/{name}" for name in experts),
    ]
    status, found = server.call("GET", "/v1/experts", key=API_KEY)
    assert status == 200
    assert [entry["id"] for entry in found["data"]] == experts
    assert found["capacity"] == len(experts) + 8
    assert all(entry["rank"] == 8 and len(entry["sha256"]) == 64 for entry in found["data"])


def test_every_choice_is_right_on_a_warm_cache(client, prompts, expected):
    """Asked twice, in turns: were the cache's key without the choice, the next one were wrong."""
    all_names = names_at_start()
    few = ["snips", "ud_pos", "wiki_split"]
    ways = [
        ({}, expected(all_names)),
        ({"model": "base"}, expected([])),
        ({"base": True}, expected([])),
        ({"model": "pool/snips"}, expected(["snips"])),
        ({"allow": few}, expected(few)),
        ({"deny": [name for name in all_names if name not in few]}, expected(few)),
        ({}, expected(all_names)),
    ]
    assert len({tuple(right) for _, right in ways}) == 4  # they can be told apart
    for _ in range(2):
        for how, right in ways:
            assert texts(client, prompts, **how) == right, how


def test_shares_and_tokens_of_an_answer(client, prompts):
    found = complete(client, prompts[0], "pool/snips", routing="shares")
    assert found.phatgoose["shares"] == {"snips": 1.0}
    found = complete(client, prompts[0], allow=["snips", "ud_pos"], routing="tokens")
    (tokens,) = found.phatgoose["tokens"]
    # The last token of the answer is not read again.
    length = found.usage.prompt_tokens + found.usage.completion_tokens - 1
    assert len(tokens) == length
    assert set(tokens) == {"snips", "ud_pos"}
    again = complete(client, prompts[0], allow=["snips", "ud_pos"], routing="tokens")
    assert again.phatgoose == found.phatgoose  # nothing of it came from the cache


def test_an_expert_comes_is_used_and_goes(client, server, prompts, expected):
    before, after = names_at_start(), [*names_at_start(), NEW]
    assert texts(client, prompts) == expected(before)
    status, added = server.call("POST", "/v1/experts", {"source": NEW}, ADMIN_KEY)
    assert (status, added["id"]) == (201, NEW)
    assert texts(client, prompts) == expected(after) != expected(before)
    assert texts(client, prompts, f"pool/{NEW}") == expected([NEW])
    assert texts(client, prompts, deny=[NEW]) == expected(before)
    shares = complete(client, prompts[-1], routing="shares").phatgoose["shares"]
    assert next(iter(shares)) == NEW  # on its own task it has most
    assert f"pool/{NEW}" in [model.id for model in client.models.list()]
    status, _ = server.call("DELETE", f"/v1/experts/{NEW}", key=ADMIN_KEY)
    assert status == 200
    assert texts(client, prompts) == expected(before)
    status, error = server.call(
        "POST", "/v1/completions", {"model": f"pool/{NEW}", "prompt": "x"}, API_KEY
    )
    assert (status, error["error"]["type"]) == (404, "NotFoundError")


def test_a_request_under_way_ends_under_its_pool(client, server):
    """A long answer while an expert is added, and the same one after it has gone."""

    def long():
        return client.completions.create(
            model="pool",
            prompt="The plural of each word:",
            max_tokens=300,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True},
        )

    alone = "".join(event.choices[0].text for event in long())
    stream = iter(long())
    first = next(stream).choices[0].text
    done = {}

    def add():
        done["add"] = server.call("POST", "/v1/experts", {"source": NEW}, ADMIN_KEY)[0]

    change = threading.Thread(target=add)
    change.start()
    assert first + "".join(event.choices[0].text for event in stream) == alone
    change.join()
    assert done["add"] == 201
    assert "".join(event.choices[0].text for event in long()) != alone
    assert server.call("DELETE", f"/v1/experts/{NEW}", key=ADMIN_KEY)[0] == 200


@pytest.mark.parametrize("folder", ["broken", "cut", "no-such"])
def test_a_bad_adapter_changes_nothing(client, server, prompts, expected, folder):
    before = server.call("GET", "/v1/experts", key=ADMIN_KEY)[1]
    status, answer = server.call("POST", "/v1/experts", {"source": folder}, ADMIN_KEY)
    assert status in (400, 403)
    assert folder in answer["error"]["message"]
    after = server.call("GET", "/v1/experts", key=ADMIN_KEY)[1]
    for key in ("generation", "fingerprint"):
        assert after[key] == before[key]
    assert texts(client, prompts[:2]) == expected(names_at_start())[:2]


def test_keys(server):
    body = {"model": "pool", "prompt": "x", "max_tokens": 1}
    for key in (None, "wrong", ADMIN_KEY):
        assert server.call("POST", "/v1/completions", body, key)[0] == 401
        assert server.call("GET", "/v1/models", key=key)[0] == 401
    for key in (None, "wrong", API_KEY):
        assert server.call("POST", "/v1/experts", {"source": NEW}, key)[0] == 401
        assert server.call("DELETE", "/v1/experts/snips", key=key)[0] == 401
    for key, status in ((None, 401), ("wrong", 401), (API_KEY, 200), (ADMIN_KEY, 200)):
        assert server.call("GET", "/v1/experts", key=key)[0] == status
    assert server.call("POST", "/v1/completions", body, API_KEY)[0] == 200


def routes_of(server):
    """The routes that the running server itself says it has, each as (method, path)."""
    found = server.call("GET", "/openapi.json")[1]["paths"]
    for path, methods in sorted(found.items()):
        for method in sorted(methods):
            yield method.upper(), path.replace("{response_id}", "resp_1")


def test_every_route_with_every_kind_of_key_and_model(server):
    """None answers by the model without a key, nor by the whole pool where another was asked."""
    body = {"prompt": "x", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    seen = Counter()
    for method, path in routes_of(server):
        for key in (None, "wrong", ADMIN_KEY):
            status, answer = server.call(method, path, body, key)
            seen[status] += 1
            if status == 200:
                assert f"{method} {path}" in RULES[Rule.OPEN], (method, path, key)
                assert "choices" not in str(answer), (method, path)
            else:
                assert status in (401, 403, 404), (method, path, key, status)
        for model in ("nobody", "pool/nobody", "", 3, ["pool"]):
            status, answer = server.call(method, path, {**body, "model": model}, API_KEY)
            assert "choices" not in str(answer), (method, path, model)
            assert status < 500, (method, path, model, answer)
        if path not in CHOOSES:
            for model in ("base", "pool/snips"):
                status, answer = server.call(method, path, {**body, "model": model}, API_KEY)
                assert "choices" not in str(answer), (method, path, model)
    assert seen[401] > 10 and seen[403] > 2


ODD = [
    {"prompt": "\ud800"},
    {"prompt": ["x", "\udfff"]},
    {"prompt": [2**70]},
    {"prompt": [2**40]},
    {"prompt": [-1]},
    {"prompt": [[]]},
    {"prompt": []},
    {"prompt": ""},
    {"prompt": None},
    {"prompt": "x\0y"},
    {"prompt": "x", "seed": 2**63},
    {"prompt": "x", "seed": 2**64},
    {"prompt": "x", "max_tokens": 10**30},
    {"prompt": "x", "max_tokens": -(2**63)},
    {"prompt": "x", "temperature": 1e308},
    {"prompt": "x", "temperature": float("nan")},
    {"prompt": "x", "temperature": float("inf")},
    {"prompt": "x", "top_k": 2**63 - 1},
    {"prompt": "x", "logit_bias": {"9" * 30: 1}},
    {"prompt": "x", "logit_bias": {"x": 1}},
    {"prompt": "x", "stop": ["\ud800"]},
    {"prompt": "x", "stop": [""]},
    {"prompt": "x", "stop_token_ids": [2**62]},
    {"prompt": "x", "n": 2**62},
    {"prompt": "x", "logprobs": 2**62},
    {"prompt": "x", "vllm_xargs": {"a": {"b": [1]}}},
    {"prompt": "x", "vllm_xargs": {"kv_transfer_params": 1}},
    {"prompt": "x", "phatgoose": "[" * 100_000},
    {"prompt": "x", "phatgoose": {"allow": ["\ud800"]}},
    {"prompt": "x", "cache_salt": "x" * 1000},
    {"prompt": "x", "response_format": {"type": "json_schema", "json_schema": {"schema": 3}}},
    {"prompt": "x", "stream": True, "stream_options": {"include_usage": 3}},
]


@pytest.mark.parametrize("odd", ODD, ids=range(len(ODD)))
def test_no_body_ends_in_a_500(client, server, prompts, odd):
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize"):
        body = {"max_tokens": 1, **odd}
        if "chat" in path:
            prompt = body.pop("prompt")
            body["messages"] = [{"role": "user", "content": prompt}]
        status, answer = server.call("POST", path, body, API_KEY)
        assert status in (200, 400, 404, 422), (path, status, answer)
    assert server.call("GET", "/health")[0] == 200


def test_health_and_metrics(client, server, prompts):
    complete(client, prompts[0], "pool/snips")
    assert server.call("GET", "/health")[0] == 200
    end = time.monotonic() + 20  # sampled every few seconds
    line = 'phatgoose_expert_tokens_total{expert="snips"}'
    while line not in (text := server.call("GET", "/metrics")[1]) and time.monotonic() < end:
        time.sleep(0.5)
    assert line in text
    assert f"phatgoose_experts_loaded {len(names_at_start())}.0" in text
    assert "phatgoose_refusals_total" in text
    assert "vllm:num_requests_running" in text
    listed = server.call("GET", "/v1/experts", key=API_KEY)[1]["data"]
    shares = {entry["id"]: entry["share"] for entry in listed}
    assert shares["snips"] > 0
    assert sum(shares.values()) <= 1.001  # those of experts that went meanwhile are missing


def test_the_page_in_a_browser(server, prompts, expected):
    """By keys alone: the key, a prompt, its coloured answer. `docs/pool-page.png` is the
    screenshot, with fewer colours."""
    shot = ROOT / "out" / "pool-page.png"
    with browsing() as chromium, opened(chromium, server.url, device_scale_factor=1.5) as page:
        page.set_default_timeout(60_000)
        page.get_by_label("API key").wait_for()
        page.keyboard.type(API_KEY)
        page.keyboard.press("Enter")
        page.locator("#experts").wait_for()
        page.keyboard.type(prompts[0])  # Enter is a line break here
        page.keyboard.press("Control+Enter")
        page.locator("#legend li").first.wait_for()
        seen = "all => all.map(token => [token.lastChild.textContent, token.title])"
        pieces = page.locator("#answer .token").evaluate_all(seen)
        asked = page.locator("#asked .token").evaluate_all(seen)
        for _ in range(4):
            page.keyboard.press("Tab")
        page.keyboard.press("Tab")  # to the answer's first token
        told = page.locator("#token").inner_text()
        # Shares are sampled every five seconds and asked for every five.
        page.wait_for_function("!document.querySelector('#window').textContent.includes('none')")
        shot.parent.mkdir(exist_ok=True)
        page.screenshot(path=shot, full_page=True)
    text = "".join(piece for piece, _ in pieces)
    assert text.startswith(expected(names_at_start())[0])
    assert {name for _, name in pieces[:-1]} == {"snips"}  # whose task it is
    assert len({name for _, name in asked}) > 1
    assert {name for _, name in asked} <= set(names_at_start())
    assert told == f"answer token 1, {json.dumps(pieces[0][0])}: snips"


def test_without_its_worker_the_server_ends(client, server):
    """The last one: a request under way gets an error, and the exit code is not 0."""
    openai = pytest.importorskip("openai")
    stream = client.completions.create(
        model="pool",
        prompt="The",
        max_tokens=900,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    (worker, *_) = server.workers()
    os.kill(worker, signal.SIGKILL)
    with pytest.raises(openai.APIError):
        for _ in stream:
            pass
    assert server.process.wait(60) == 1
    assert "ended without being told to" in server.tail()


@pytest.fixture
def starts(tmp_path):
    """starts(word, ...): a server that was started, and is gone afterwards."""
    mine = []

    def start(*words, **more):
        mine.append(Server(tmp_path, *words, **more))
        return mine[-1]

    yield start
    for found in mine:
        found.kill()


def test_it_ends_well_when_told_to(starts):
    """Once the request under way has its answer, with nothing left behind."""
    found = starts("--enforce-eager").wait()
    body = {"model": "pool", "prompt": "The", "max_tokens": 100, "ignore_eos": True}
    answers = []
    ask = threading.Thread(
        target=lambda: answers.append(found.call("POST", "/v1/completions", body, API_KEY))
    )
    ask.start()
    time.sleep(1)
    started = set(found.processes())
    assert found.end(signal.SIGTERM) == 0
    ask.join()
    ((status, answer),) = answers
    assert (status, answer["usage"]["completion_tokens"]) == (200, 100)
    end = time.monotonic() + 20
    while (left := [pid for pid in started if runs(pid)]) and time.monotonic() < end:
        time.sleep(0.2)
    assert not left


@pytest.mark.thorough
def test_two_engines_beside_each_other(starts, root, prompts, expected):
    """Data parallelism: both serve, both change, and both are counted."""
    experts = [path for path in tiny.expert_folders() if path.name != NEW]
    found = starts(
        *("--enforce-eager", "--data-parallel-size", 2, "--experts", *experts),
        root=root,
        environment={"VLLM_CPU_OMP_THREADS_BIND": "auto"},
    ).wait()
    client = client_of(found)
    before, after = names_at_start(), [*names_at_start(), NEW]
    twice = [prompt for prompt in prompts for _ in range(2)]  # engines take turns

    def right(names):
        return [text for text in expected(names) for _ in range(2)]

    def counted():
        time.sleep(EVERY + 1)  # until the server has asked them
        experts = found.call("GET", "/v1/experts", key=API_KEY)[1]["data"]
        return sum(expert["tokens"] for expert in experts)

    assert texts(client, twice) == right(before)
    start = counted()
    answers = [complete(client, prompt, routing="shares") for prompt in twice]
    told = [answer.phatgoose for answer in answers]
    assert told[::2] == told[1::2]
    assert all(sum(one["shares"].values()) == pytest.approx(1, abs=1e-4) for one in told)
    # The last token of an answer is read by nobody.
    read = sum(answer.usage.total_tokens - 1 for answer in answers)
    assert counted() - start == pytest.approx(read, abs=0.1)
    assert found.call("POST", "/v1/experts", {"source": "broken"}, ADMIN_KEY)[0] == 400
    assert found.call("POST", "/v1/experts", {"source": NEW}, ADMIN_KEY)[0] == 201
    assert texts(client, twice) == right(after)
    assert found.call("DELETE", f"/v1/experts/{NEW}", key=ADMIN_KEY)[0] == 200
    assert texts(client, twice) == right(before)
    assert found.end() == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--experts", "/no/such/folder"], "/no/such/folder"),
        (["--base", "/no/such/base", "--experts", str(tiny.EXPERTS)], "/no/such/base"),
    ],
)
def test_it_does_not_start_on_what_is_not_there(starts, words, message):
    found = starts(*words)
    assert found.process.wait(120) != 0
    assert message in found.log.read_text()
