"""GET /pool, by hand and in a browser."""

import asyncio
import json
import threading

import pytest
from prometheus_client import CollectorRegistry

from phatgoose.serve.http import PoolMiddleware
from phatgoose.serve.http.metrics import Metrics
from phatgoose.serve.http.page import PAGE
from tests.serve.browser import PHONE, browsing, opened
from tests.serve.http.fake import FakeEngine, Server, fake_vllm

KEY = "user-key"
EVIL = '<img src="x" onerror="alert(1)"><script>alert(2)</script>'


class Behind:
    """The fake server behind our middleware, on a port of its own."""

    def __init__(self, names=("a", "b"), api_key=None):
        self.engine, registry = FakeEngine(names), CollectorRegistry()
        app = fake_vllm(self.engine, api_key=api_key, registry=registry)
        app.add_middleware(PoolMiddleware, metrics=Metrics(registry))
        uvicorn = pytest.importorskip("uvicorn", reason="uvicorn is not installed")
        settings = {"port": 0, "log_level": "error", "timeout_graceful_shutdown": 1}
        self.server = uvicorn.Server(uvicorn.Config(app, **settings))
        self.thread = threading.Thread(target=self.server.run)

    def __enter__(self):
        self.thread.start()
        while not self.server.started:
            assert self.thread.is_alive(), "it did not start"
            self.thread.join(0.01)
        (listening,) = self.server.servers[0].sockets
        self.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        return self

    def __exit__(self, *_):
        self.server.should_exit = True
        self.thread.join()


@pytest.fixture(scope="module")
def chromium():
    with browsing() as found:
        yield found


def experts_shown(page):
    return page.locator("#experts tbody tr td:nth-child(2)").all_inner_texts()


def ask(page, prompt="one two"):
    """By keys alone; returns once the answer is there."""
    page.locator("#prompt").focus()
    page.keyboard.type(prompt)
    page.keyboard.press("Control+Enter")
    page.locator("#legend li").first.wait_for()


def tokens(page, part):
    """What is coloured, without the marks, and who served it."""
    return page.locator(f"#{part} .token").evaluate_all(
        """all => all.map(token => {
            const bare = token.cloneNode(true);
            bare.querySelectorAll("[aria-hidden]").forEach(mark => mark.remove());
            return [bare.textContent, token.title];
        })"""
    )


@pytest.mark.anyio
@pytest.mark.parametrize("path", PAGE)
async def test_the_files_are_for_everyone_and_run_nothing_else(path):
    async with Server(api_key=[KEY]) as server:
        reply = await server.call("GET", path)
        assert reply.status == 200
        policy = reply.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy
        text = reply.body.decode()
        assert "http://" not in text and "https://" not in text  # no external hosts
        assert "innerHTML" not in text and "eval(" not in text
        assert (await server.call("POST", path)).status in (404, 405)


def test_experts_and_a_coloured_answer(chromium):
    with Behind() as server, opened(chromium, server.url) as page:
        page.locator("#experts").wait_for()
        assert experts_shown(page) == ["a", "b"]
        assert "2 of at most 4 experts · generation 0" in page.locator("#state").inner_text()
        assert "none yet" in page.locator("#window").inner_text()
        ask(page)
        last = "nobody: an answer’s last token is not read again"
        assert tokens(page, "asked") == [["one", "a"], [" two", "b"]]
        assert tokens(page, "answer") == [["a", "a"], ["+", "b"], ["b", last]]
        colours = page.locator(".tokens .token").evaluate_all(
            "all => all.map(token => getComputedStyle(token).backgroundColor)"
        )
        assert colours[:2] == colours[2:4] and len(set(colours)) == 3
        assert [mark.strip() for mark in page.locator("sub").all_inner_texts()] == list("1212")
        legend = page.locator("#legend li").all_inner_texts()
        assert [text.split() for text in legend] == [
            ["1", "a", "50.0%"],
            ["2", "b", "50.0%"],
        ]
        sent = server.engine.last
        assert sent["stream"] and json.loads(sent["vllm_xargs"]["phatgoose"]) == {
            "routing": "tokens"
        }


def test_keys_alone_reach_everything(chromium):
    with Behind() as server, opened(chromium, server.url) as page:
        page.locator("#experts").wait_for()
        seen = []
        for _ in range(5):
            page.keyboard.press("Tab")
            seen.append(page.evaluate("document.activeElement.id || document.activeElement.name"))
        assert seen == ["prompt", "way", "most", "stream", "send"]
        page.locator("#prompt").focus()
        page.keyboard.type("x")
        for _ in range(4):
            page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        page.locator("#legend li").first.wait_for()
        assert page.evaluate("document.activeElement.id") == "send"
        page.keyboard.press("Tab")  # to the answer's first token
        told = page.locator("#token")
        assert told.inner_text() == 'answer token 1, "a": b'
        page.keyboard.press("ArrowRight")
        assert told.inner_text() == 'answer token 2, "+": a'
        page.keyboard.press("Home")
        assert told.inner_text() == 'prompt token 1, "x": a'


def test_every_way_to_choose(chromium):
    with Behind() as server, opened(chromium, server.url) as page:
        page.locator("#experts").wait_for()
        page.get_by_label("stream").uncheck()
        page.get_by_label("Most tokens").fill("5")
        page.locator("#prompt").fill("x")
        send, answers = page.get_by_role("button", name="Send"), {}
        for way in ("all experts", "the base only", "one expert", "some experts"):
            page.get_by_label(way).check()
            if way == "one expert":
                page.get_by_label("Expert", exact=True).select_option("b")
            if way == "some experts":
                send.click()
                page.get_by_text("Tick at least one expert.").wait_for()
                page.locator("#some-box").get_by_label("1 a").check()
            with page.expect_response("**/v1/completions"):
                send.click()
            page.locator("#legend li").first.wait_for()
            answers[way] = "".join(text for text, _ in tokens(page, "answer"))
            assert server.engine.last["max_tokens"] == 5
            assert "stream" not in server.engine.last
        assert list(answers.values()) == ["a+b", "base", "b", "a"]


def test_texts_stay_texts(chromium):
    """Names, prompts, answers and errors that are markup."""
    with Behind(names=(EVIL, "b")) as server, opened(chromium, server.url) as page:
        server.engine.says = EVIL
        page.locator("#experts").wait_for()
        assert EVIL in experts_shown(page)
        page.get_by_label("some experts").check()
        page.get_by_label("all experts").check()
        ask(page, EVIL)
        assert "".join(text for text, _ in tokens(page, "answer")) == EVIL
        assert "".join(text for text, _ in tokens(page, "asked")) == EVIL
        page.locator("#answer .token").first.hover()
        page.route(
            "**/v1/completions",
            lambda route: route.fulfill(status=400, json={"error": {"message": EVIL}}),
        )
        page.get_by_role("button", name="Send").click()
        page.locator("#failure").wait_for()
        assert page.locator("#failure").inner_text() == f"Error 400: {EVIL}"
        assert page.locator("img, body script").count() == 0


def test_a_key_is_asked_for(chromium):
    with Behind(api_key=[KEY]) as server, opened(chromium, server.url) as page:
        field = page.get_by_label("API key")
        field.wait_for()
        assert experts_shown(page) == []
        for key, trouble in (("wrong", "The server does not take this API key."), (KEY, "")):
            field.wait_for()
            page.keyboard.type(key)  # it has the focus
            page.keyboard.press("Enter")
            if trouble:
                page.get_by_text(trouble).wait_for()
        page.locator("#experts").wait_for()
        ask(page)
        page.reload()
        page.locator("#experts").wait_for()  # the tab remembers
        assert page.evaluate("localStorage.length + document.cookie.length") == 0


def test_it_tells_of_empty_pools_and_servers_gone(chromium):
    with Behind(names=()) as server, opened(chromium, server.url) as page:
        page.get_by_text("The pool is empty: the base answers alone.").wait_for()
        ask(page)
        assert {name for _, name in tokens(page, "asked")} == {"the base alone"}
        server.__exit__()
        page.get_by_role("button", name="Send").click()
        page.locator("#failure").get_by_text("The server cannot be reached.").wait_for()
        page.locator("#trouble").get_by_text("The server cannot be reached.").wait_for()


def test_parts_of_letters(chromium):
    """What vLLM tells of tokens that are bytes of a letter: nothing, but for the first of all."""
    told = {"tokens": ["\ufffd", "", "n", "", "ï"]}
    answer = {
        "choices": [{"index": 0, "text": "Ünï", "logprobs": told}],
        "usage": {"prompt_tokens": 3},
        "phatgoose": {"shares": {"a": 1.0}, "tokens": [["a"] * 4]},
    }
    with Behind() as server, opened(chromium, server.url) as page:
        page.route("**/v1/completions", lambda route: route.fulfill(json=answer))
        page.get_by_label("stream").uncheck()
        ask(page, "Ün")
        assert [text for text, _ in tokens(page, "asked")] == ["Ü", "", "n"]
        assert [text for text, _ in tokens(page, "answer")] == ["", "ï"]
        assert page.locator("#asked").inner_text().replace("\n", "") == "1Ü·n"


def test_errors_in_a_stream_and_a_stop(chromium):
    with Behind() as server, opened(chromium, server.url) as page:
        page.locator("#experts").wait_for()
        server.engine.hold = asyncio.Event()
        page.locator("#prompt").fill("x")
        page.keyboard.press("Control+Enter")
        page.get_by_role("button", name="Stop").click()
        page.get_by_text("Stopped.").wait_for()
        server.engine.hold = None
        body = 'data: {"error": {"message": "the engine died"}}\n\ndata: [DONE]\n\n'
        page.route(
            "**/v1/completions",
            lambda route: route.fulfill(body=body, content_type="text/event-stream"),
        )
        page.get_by_role("button", name="Send").click()
        page.locator("#failure").get_by_text("the engine died").wait_for()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_legible_on_a_phone(chromium, scheme):
    """Nothing is wider than the screen, and texts stand out from what is behind them."""
    names = ("a" * 60, "long_name_of_an_expert")
    settings = {"viewport": PHONE, "color_scheme": scheme}
    with Behind(names=names) as server, opened(chromium, server.url, **settings) as page:
        ask(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
        for where in ("body", "#asked .token", ".number", "#send", "#token"):
            assert page.evaluate(CONTRAST, where) >= 4.5, where


# As WCAG 2 defines it, of a text to the nearest background that is there.
CONTRAST = """where => {
    const parse = colour => colour.match(/[\\d.]+/g).map(Number);
    const light = colour => {
        const [r, g, b] = parse(colour).map(c => c / 255)
            .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    let element = document.querySelector(where), behind = "";
    const ink = light(getComputedStyle(element).color);
    do {
        behind = getComputedStyle(element).backgroundColor;
        element = element.parentElement;
    } while (element && parse(behind)[3] === 0);
    const [low, high] = [ink, light(behind)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
}"""
