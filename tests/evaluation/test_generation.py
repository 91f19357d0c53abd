"""Batched greedy answers against one prompt at a time, token by token."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import phatgoose
from phatgoose.errors import ConfigError
from phatgoose.evaluation import generate_answers, generate_text, generation
from phatgoose.routers import EvidenceRouter, PhatgooseRouter, PromptEvidenceRouter
from phatgoose.tasks import Example, encode
from tests.evaluation.conftest import EOS
from tests.models import PAD, make_model, mixed_targets, save_experts
from tests.routers.test_evidence import with_prompts

NEW = 7


def naive_answer(model: nn.Module, tokenizer: Any, prompt: str, new: int) -> str:
    """The likeliest token, again and again, with the whole sequence read anew each time."""
    seq2seq = model.config.is_encoder_decoder
    room = 64 if seq2seq else 64 - new + 1
    ids = torch.tensor([encode(tokenizer, prompt, "", max_length=room, seq2seq=seq2seq).prompt])
    answer: list[int] = []
    while len(answer) < new:
        tail = torch.tensor([answer], dtype=torch.long)
        with torch.no_grad():
            if seq2seq:
                start = torch.cat([torch.tensor([[PAD]]), tail], dim=1)
                logits = model(input_ids=ids, decoder_input_ids=start).logits
            else:
                logits = model(input_ids=torch.cat([ids, tail], dim=1)).logits
        answer.append(int(logits[0, -1].argmax()))
        if answer[-1] == EOS:
            break
    return tokenizer.decode(answer, skip_special_tokens=True).strip()


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("routed", [False, True], ids=["plain", "routed"])
def test_answers_are_those_of_one_prompt_at_a_time(
    family: str,
    routed: bool,
    make_routed: Callable[..., nn.Module],
    tokenizer: Any,
    text_examples: list[Example],
) -> None:
    model = make_routed(family, routed)
    wanted = [naive_answer(model, tokenizer, e.prompt, NEW) for e in text_examples]
    for batch_size in (1, 4, 100):
        found = generate_answers(
            model, tokenizer, text_examples, max_new_tokens=NEW, batch_size=batch_size
        )
        assert found == wanted
    prompts = [example.prompt for example in text_examples]
    assert generate_text(model, tokenizer, prompts, max_new_tokens=NEW) == wanted


def test_each_example_keeps_its_own_bound(
    make_routed: Callable[..., nn.Module], tokenizer: Any, text_examples: list[Example]
) -> None:
    model = make_routed("llama")
    examples, bounds = [*text_examples[:4], text_examples[5]], [1, 7, 3, 5, 7]
    found = generate_answers(model, tokenizer, examples, max_new_tokens=bounds, batch_size=3)
    for example, bound, answer in zip(examples, bounds, found, strict=True):
        assert answer == naive_answer(model, tokenizer, example.prompt, bound)


def test_generation_stops_at_end_of_sequence(
    make_routed: Callable[..., nn.Module], tokenizer: Any
) -> None:
    """What follows the first end-of-sequence is no part of the answer, in any row of a batch."""
    model = make_routed("llama", False)
    free = generate_text(model, tokenizer, ["abc", "some text"], max_new_tokens=NEW)
    inside = tokenizer(free[0], add_special_tokens=False)["input_ids"]
    weights = model.lm_head.weight.data
    # The token the first prompt's answer has in the middle becomes end-of-sequence.
    cut = next(i for i, token in enumerate(inside) if i > 1 and token not in inside[:i])
    weights[[EOS, inside[cut]]] = weights[[inside[cut], EOS]]
    examples = [Example(p, "x") for p in ("abc", "some text")]
    found = generate_answers(model, tokenizer, examples, max_new_tokens=NEW)
    assert found == [naive_answer(model, tokenizer, e.prompt, NEW) for e in examples]
    assert found[0] == tokenizer.decode(inside[:cut]).strip()


@pytest.fixture
def rows_read(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Rows and width of what each call of `generate` is given."""
    found: list[tuple[int, int]] = []
    plain = generation._generate

    def watched(model: Any, tokenizer: Any, ids: torch.Tensor, *rest: Any) -> Any:
        found.append(tuple(ids.shape))
        return plain(model, tokenizer, ids, *rest)

    monkeypatch.setattr(generation, "_generate", watched)
    return found


@pytest.mark.parametrize("router", [None, EvidenceRouter, PromptEvidenceRouter])
def test_rows_leave_the_batch_when_they_have_ended(
    router: Any,
    tmp_path: Path,
    tokenizer: Any,
    text_examples: list[Example],
    rows_read: list[tuple[int, int]],
) -> None:
    """The others go on as if alone, by routers too that read the whole context."""
    model, bounds = make_model("llama"), [3, 25, 5, 9, 25, 17]
    folders = save_experts(tmp_path, model, mixed_targets("llama", 3))
    pool = with_prompts(model, phatgoose.ExpertPool.load(folders))
    background = torch.arange(40).reshape(4, 10)
    made = router and router(PhatgooseRouter(), strength=9.0, background=background)
    phatgoose.route(model, pool, made or "phatgoose")
    alone = [
        generate_text(model, tokenizer, [e.prompt], max_new_tokens=bound)[0]
        for e, bound in zip(text_examples, bounds, strict=True)
    ]
    rows_read.clear()
    assert generate_answers(model, tokenizer, text_examples, max_new_tokens=bounds) == alone
    counts = [rows for rows, _ in rows_read]
    assert counts == sorted(counts, reverse=True) and counts[0] == 6 > counts[-1]


def test_each_row_keeps_its_expert_when_others_leave(
    make_routed: Callable[..., nn.Module], tokenizer: Any, text_examples: list[Example]
) -> None:
    model, bounds = make_routed("llama"), [4, 20, 9, 20, 5, 13]
    names: list[str | None] = ["e0", "e1", None, "e2", "e0", "e1"]
    found = generate_answers(model, tokenizer, text_examples, max_new_tokens=bounds, experts=names)
    for example, bound, name, answer in zip(text_examples, bounds, names, found, strict=True):
        [alone] = generate_answers(
            model, tokenizer, [example], max_new_tokens=bound, experts=[name]
        )
        assert answer == alone


@pytest.mark.parametrize("why", ["no rows can be chosen of its cache", "settings by place"])
def test_models_whose_generation_cannot_be_cut(
    why: str,
    make_routed: Callable[..., nn.Module],
    tokenizer: Any,
    text_examples: list[Example],
    monkeypatch: pytest.MonkeyPatch,
    rows_read: list[tuple[int, int]],
) -> None:
    model, bounds = make_routed("llama"), [3, 12, 5, 9, 12, 7]
    if why == "settings by place":
        model.generation_config.begin_suppress_tokens = [5, 6, 7]
        wanted = [
            generate_text(model, tokenizer, [e.prompt], max_new_tokens=bound)[0]
            for e, bound in zip(text_examples, bounds, strict=True)
        ]
    else:
        monkeypatch.setattr(generation, "_of_rows", lambda *_: None)
        wanted = [
            naive_answer(model, tokenizer, e.prompt, bound)
            for e, bound in zip(text_examples, bounds, strict=True)
        ]
    rows_read.clear()
    assert generate_answers(model, tokenizer, text_examples, max_new_tokens=bounds) == wanted
    assert len(rows_read) == 1 if why == "settings by place" else len(rows_read) > 1


def test_text_is_recorded_in_the_order_given(
    make_routed: Callable[..., nn.Module], tokenizer: Any
) -> None:
    model = make_routed("llama")
    prompts = ["a", "a longer prompt", "bc"]
    with phatgoose.record(model) as trace:
        generate_text(model, tokenizer, prompts, max_new_tokens=1)
    table = trace.tokens["decoder"]
    read = [tokenizer.decode(table.ids[table.sequence == row]) for row in range(3)]
    assert read == prompts


def test_settings_out_of_range(make_routed: Callable[..., nn.Module], tokenizer: Any) -> None:
    model, examples = make_routed("llama", False), [Example("a", "b")]
    assert generate_answers(model, tokenizer, []) == []
    assert generate_text(model, tokenizer, [], max_new_tokens=1) == []
    for settings, words in (
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"max_new_tokens": 64}, "leaves no room"),
        ({"batch_size": 0}, "batch_size"),
    ):
        with pytest.raises(ConfigError, match=words):
            generate_answers(model, tokenizer, examples, **settings)
    with pytest.raises(ConfigError, match="nothing of the prompt"):
        generate_answers(model, tokenizer, [Example("", "b")], max_new_tokens=1)
