from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from torch import nn
from transformers import PreTrainedTokenizerFast

import phatgoose
from phatgoose.analysis import save_picture
from phatgoose.nn import Trace


def check(path: Path) -> tuple[int, int]:
    """A PNG with many colours in it; its size."""
    pixels = imread(path)
    assert len(np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0)) > 50
    height, width = pixels.shape[:2]
    assert 1000 < width < 2000 and 300 < height < 3000
    return height, width


def test_a_picture_of_a_batch(
    hand_made: Trace, byte_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = tmp_path / "new" / "trace.png"
    save_picture(hand_made, byte_tokenizer, path, title="$x_^$", labels=["$one", "two_{$"])
    check(path)
    assert [file.name for file in path.parent.iterdir()] == ["trace.png"]


def test_many_experts_and_tokens(
    hand_made: Trace, byte_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    hand_made.names = [f"a_long_task_name_{i}" for i in range(166)]
    count = 100
    for module in hand_made.experts:
        hand_made.experts[module] = torch.randint(-1, 166, (count, 2))
        hand_made.weights[module] = torch.full((count, 2), 0.5)
    table = hand_made.tokens["decoder"]
    hand_made.tokens["decoder"] = type(table)(
        table.ids[:1].repeat(count), torch.zeros(count).long(), torch.arange(count)
    )
    save_picture(hand_made, byte_tokenizer, tmp_path / "trace.png")
    check(tmp_path / "trace.png")


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_generation(
    kind: str,
    routed: Callable[..., nn.Module],
    byte_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    model = routed(kind, ["a", "b", "c"])
    inputs = byte_tokenizer(["a cat $x$", "dogs 犬"], padding=True, return_tensors="pt")
    with phatgoose.record(model) as trace:
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
    save_picture(trace, byte_tokenizer, tmp_path / "trace.png")
    check(tmp_path / "trace.png")
