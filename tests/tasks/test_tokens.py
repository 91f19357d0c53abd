"""Examples as token ids, and batches of them."""

from typing import Any

from phatgoose.tasks import IGNORED, Encoded, batches, collate, encode


class Characters:
    """A tokenizer whose ids are code points; a prompt begins with 2, an answer ends with 1."""

    eos_token_id = 1

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [2] * add_special_tokens + [ord(c) for c in text]}


def test_prompt_and_target_are_encoded_apart() -> None:
    a, b, c = map(ord, "abc")
    tokenizer = Characters()
    assert encode(tokenizer, "ab", "c", max_length=9) == Encoded([2, a, b], [c, 1])
    assert encode(tokenizer, "ab", "c", max_length=4) == Encoded([a, b], [c, 1])
    assert encode(tokenizer, "ab", "c", max_length=2) == Encoded([], [c, 1])
    assert encode(tokenizer, "ab", "cc", max_length=2) == Encoded([], [c, c])
    assert encode(tokenizer, "", "c", max_length=9) == Encoded([], [c, 1])
    # The two stacks of an encoder-decoder each have the whole length.
    assert encode(tokenizer, "ab", "c", max_length=2, seq2seq=True) == Encoded([a, b], [c, 1])
    assert encode(tokenizer, "", "c", max_length=2, seq2seq=True) == Encoded([2], [c, 1])


def test_batches_have_their_loss_on_targets() -> None:
    rows = [Encoded([5, 6, 7], [8, 1]), Encoded([5], [1])]
    batch = {key: value.tolist() for key, value in collate(rows, pad=0).items()}
    x = IGNORED
    assert batch == {
        "input_ids": [[5, 6, 7, 8, 1], [5, 1, 0, 0, 0]],
        "attention_mask": [[1] * 5, [1, 1, 0, 0, 0]],
        "labels": [[x, x, x, 8, 1], [x, 1, x, x, x]],
    }
    batch = {key: value.tolist() for key, value in collate(rows, pad=0, seq2seq=True).items()}
    assert batch == {
        "input_ids": [[5, 6, 7], [5, 0, 0]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
        "labels": [[8, 1], [1, x]],
    }


def test_the_seed_alone_orders_training_batches() -> None:
    rows = [Encoded([i], [1]) for i in range(10)]

    def order(seed: int) -> list[Any]:
        return [b["input_ids"][:, 0].tolist() for b in batches(rows, 3, pad=0, seed=seed)]

    assert order(0) == order(0) != order(1)
    assert [len(batch) for batch in order(0)] == [3, 3, 3]
    assert len(list(batches(rows[:2], 3, pad=0))) == 1  # fewer rows than a batch are one batch
