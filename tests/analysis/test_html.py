import json
import re
from collections.abc import Callable
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

import phatgoose
from phatgoose.analysis import render_html, save_html, token_table
from phatgoose.nn import Trace

EVIL = "</script><script>alert('x')</script><img src=//evil.example onerror=alert(1)>&amp;"


class Page(HTMLParser):
    """Tags opened, and the first token of each."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def tokens_of(page: str) -> list[str]:
    found = re.findall(r"<button [^>]*><span>(.*?)</span>", page)
    return [unescape(re.sub("</?s>", "", text)) for text in found]


def data_of(page: str) -> dict[str, list]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert found
    return json.loads(found[1])


def test_tokens_experts_and_layers_are_on_the_page(
    hand_made: Trace, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    page = render_html(hand_made, byte_tokenizer, labels=["one", "two"])
    assert not Page(page).open
    assert tokens_of(page) == ["x", "␣a", "↵"]
    assert 'title="red 62%"' in page and "1. one" in page
    data = data_of(page)
    assert data["layers"] == [["layer 0", "layer 1"]] * 2
    assert data["names"] == ["red", "green", "blue", "no expert"]
    assert data["passages"][1] == [[[2, 100], [3, 75, 0, 25]]]  # 3: no expert


def test_a_hostile_prompt_name_and_title_are_inert(
    routed: Callable[..., nn.Module], byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = routed("llama", [EVIL, "b"])
    with phatgoose.record(model) as trace:
        model(**byte_tokenizer(EVIL, return_tensors="pt"))
    page = render_html(trace, byte_tokenizer, title=EVIL, labels=[EVIL])
    parsed = Page(page)
    assert parsed.tags.count("script") == 2  # ours: the data and the code
    assert not {"img", "link", "iframe"} & set(parsed.tags)
    assert not {"onerror", "src", "href"} & parsed.attributes
    assert data_of(page)["names"][0] == EVIL
    assert "".join(tokens_of(page)).replace("␣", " ") == EVIL
    assert "default-src 'none'" in page


@pytest.mark.parametrize("count", [1, 2, 21, 22, 166])
def test_any_number_of_experts(
    count: int, hand_made: Trace, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    hand_made.names = [f"task{i}" for i in range(count)]
    for module in hand_made.experts:
        hand_made.experts[module] = torch.tensor([[0, count - 1]] * 3)
        hand_made.weights[module] = torch.full((3, 2), 0.5)
    page = render_html(hand_made, byte_tokenizer)
    rows = page.split("<h2>Text</h2>")[0].count('<th scope="row">') // 2  # two heat maps
    assert rows == (count if count <= 21 else 21)
    assert ("others (146)" in page) == (count == 166)


def test_sequences_keep_their_tokens_and_sides(
    routed: Callable[..., nn.Module], byte_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = routed("t5", ["a", "b"])
    with phatgoose.record(model) as trace:
        inputs = byte_tokenizer(["a cat", "dogs"], padding=True, return_tensors="pt")
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
    save_html(trace, byte_tokenizer, tmp_path / "new" / "page.html", title="T")
    page = (tmp_path / "new" / "page.html").read_text(encoding="utf-8")
    shown = [token for token in token_table(trace, byte_tokenizer) if token.stream != "cross"]
    assert len(tokens_of(page)) == len(shown)
    assert tokens_of(page)[:9] == ["a", "␣", "c", "a", "t", *"dogs"]
    data = data_of(page)
    assert data["layers"][0] == ["layer encoder 0", "layer encoder 1"]
    assert [len(passage) for passage in data["passages"]][:2] == [5, 4]
