"""A tiny base with experts in a folder of its own, and the command run inside this process."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from phatgoose.cli import main
from phatgoose.experts.kinds import KINDS
from phatgoose.experts.lora import WEIGHTS_FILE
from tests.models import PAD, VOCABULARY, make_model, save_expert, save_gates

CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789 \n.,:?!-'"
EXAMPLES = [
    {"prompt": f"{word} becomes ", "completion": word[::-1]}
    for word in ("goose", "hat", "rank", "token", "layer", "site")
]


@dataclass(frozen=True)
class Result:
    """What a command gave back."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        """Our own lines on stderr; libraries print progress and notes there too."""
        return [line for line in self.err.splitlines() if line.startswith("phatgoose: ")]


@dataclass(frozen=True)
class World:
    """A folder with a base, another base, two experts (one, two), and a file of examples."""

    root: Path

    def __getattr__(self, name: str) -> Path:
        return self.root / name

    @property
    def data(self) -> Path:
        return self.root / "data.jsonl"

    def files(self) -> dict[str, str]:
        """The hash of every file under the root."""
        return {
            str(path.relative_to(self.root)): (
                hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
            )
            for path in self.root.rglob("*")
        }

    def edit(self, expert: str, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
        """Change an expert's adapter; its gates are made anew, so that they belong to it."""
        folder = self.ungated(expert)
        path = folder / WEIGHTS_FILE
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
        save_file(change(tensors), path, {"format": "pt"})
        save_gates(folder, AutoModelForCausalLM.from_pretrained(self.base), seed=0)
        return folder

    def ungated(self, expert: str) -> Path:
        """Take an expert's gates away."""
        folder = self.root / expert
        (folder / KINDS["gates"].file).unlink()
        return folder

    def foreign(self) -> Path:
        """An expert of the other base."""
        other = AutoModelForCausalLM.from_pretrained(self.other)
        return save_expert(self.root / "foreign", other, seed=9, targets=["q_proj", "up_proj"])

    def write_data(self, *rows: Any) -> Path:
        """Examples; a text stands as it is."""
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        self.data.write_text("\n".join(lines) + "\n")
        return self.data


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    model = make_model("llama")
    for name, base in (("base", model), ("other", make_model("llama", hidden=36))):
        base.save_pretrained(root / name)
        make_tokenizer().save_pretrained(root / name)
    for seed, name in enumerate(("one", "two")):
        save_expert(root / name, model, seed=seed, targets=["q_proj", "up_proj"])
    World(root).write_data(*EXAMPLES)
    return root


@pytest.fixture
def world(original: Path, tmp_path: Path) -> World:
    """A copy of the folder, to break."""
    return World(shutil.copytree(original, tmp_path / "world"))


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """run("generate", "hello", ...): the command in this process."""

    def call(*argv: Any) -> Result:
        capfd.readouterr()
        try:
            code = main([str(argument) for argument in argv])
        except SystemExit as stopped:  # how argparse ends
            code = int(stopped.code or 0)
        return Result(code, *capfd.readouterr())

    return call


@pytest.fixture
def refuses(run: Callable[..., Result], world: World) -> Callable[..., str]:
    """refuses(*argv, says=[...]): one line that says these words, exit code 1, nothing changed."""

    def call(*argv: Any, says: list[Any]) -> str:
        before = world.files()
        result = run(*argv)
        assert result.code == 1, result
        assert result.out == ""
        assert "Traceback" not in result.err, result.err
        (line,) = result.lines
        for word in says:
            assert str(word) in line, line
        assert world.files() == before
        return line

    return call


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<end>", *CHARACTERS])}
    assert len(vocabulary) <= VOCABULARY and vocabulary["<pad>"] == PAD
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    plain.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    plain.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", eos_token="<end>", padding_side="left"
    )


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
