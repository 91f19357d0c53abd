"""Adapter folders as they are found: made by PEFT, then changed as trainers, hubs and people do.

    PYTHONPATH=src python -m tests.experts.found --folders 200     (make found)

Folder N is always the same. It goes through `experts verify` and `route`, and must come out right
against PEFT's forward of the adapter as it was made, or be refused with the cause that it has.
"""

import argparse
import contextlib
import copy
import io
import json
import os
import re
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1"}

import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from torch import nn

from phatgoose import ExpertPool, route
from phatgoose.cli.main import main
from phatgoose.errors import PhatgooseError
from tests.models import LINEARS, VOCABULARY, make_batch, make_model

CLOSE = 1e-5  # of the largest logit: two orders of computing one product in float32
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
Change = Callable[[Path, Random], Path | str | None]  # a folder; what it is called from then on


@dataclass(frozen=True)
class Refused:
    """A change after which a folder is no adapter that can be computed, and the cause to tell."""

    change: Change
    cause: str  # a pattern


def keys(change: Callable[[str], str]) -> Change:
    return tensors(lambda found, _: {change(key): tensor for key, tensor in found.items()})


def tensors(change: Callable[[dict[str, Any], Random], Any]) -> Change:
    def run(folder: Path, random: Random) -> None:
        found = {key: tensor.clone() for key, tensor in load_file(folder / WEIGHTS).items()}
        changed = change(found, random)
        save_file(found if changed is None else changed, folder / WEIGHTS, {"format": "pt"})

    return run


def config(**fields: Any) -> Change:
    return edited(lambda said, _: said.update(fields))


def edited(change: Callable[[dict[str, Any], Random], Any]) -> Change:
    def run(folder: Path, random: Random) -> None:
        said = json.loads((folder / CONFIG).read_text())
        change(said, random)
        (folder / CONFIG).write_text(json.dumps(said))

    return run


def text(change: Callable[[str], str], name: str = CONFIG) -> Change:
    return lambda folder, _: (
        (folder / name).write_text(change((folder / name).read_text())) and None
    )


def moved(place: str) -> Change:
    def run(folder: Path, _: Random) -> Path:
        target = folder.parent / "moved" / place
        target.parent.mkdir(parents=True, exist_ok=True)
        return Path(shutil.move(folder, target))

    return run


def linked(folder: Path, _: Random) -> Path:
    link = folder.parent / f"link-{folder.name}"
    link.symlink_to(folder)
    return link


def beside(*names: str) -> Change:
    def run(folder: Path, _: Random) -> None:
        for name in names:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(b"\x80\x04.")

    return run


def pattern_of_targets(said: dict[str, Any], _: Random) -> None:
    if isinstance(said["target_modules"], list):
        said["target_modules"] = rf".*\.({'|'.join(said['target_modules'])})"


def without(*fields: str) -> Change:
    return edited(lambda said, _: [said.pop(field, None) for field in fields])


def a_key(found: dict[str, Any], random: Random, part: str = "lora_B") -> str:
    return random.choice(sorted(key for key in found if part in key))


def halved(found: dict[str, Any], random: Random) -> None:
    del found[a_key(found, random)]


def spoiled(value: float) -> Change:
    def run(found: dict[str, Any], random: Random) -> None:
        key = a_key(found, random)
        found[key] = found[key].float()  # for float8 has no infinity
        found[key].view(-1)[0] = value

    return tensors(run)


def emptied(found: dict[str, Any], random: Random) -> None:
    found[a_key(found, random)] = torch.zeros(0)


def cut(found: dict[str, Any], random: Random) -> None:
    key = a_key(found, random)
    found[key] = found[key][:-1].contiguous()


def as_integers(found: dict[str, Any], random: Random) -> None:
    found[a_key(found, random)] = torch.ones(2, 2, dtype=torch.int8)


def with_more(key: str, *shape: int) -> Change:
    return tensors(lambda found, _: found.update({PREFIX + key: torch.ones(*shape)}))


def only_a_pickle(folder: Path, _: Random) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04.")


def truncated(name: str, share: float) -> Change:
    def run(folder: Path, _: Random) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * share)])

    return run


def removed(name: str) -> Change:
    return lambda folder, _: (folder / name).unlink()


def a_folder(folder: Path, _: Random) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()


def two_in_one(found: dict[str, Any], _: Random) -> dict[str, Any]:
    halves = [key for key in found if "lora_" in key]
    odd = set(sorted(halves)[::2])
    return {
        re.sub(r"\.weight$", ".a.weight" if key in odd else ".b.weight", key): tensor
        for key, tensor in found.items()
    }


# After these a folder holds the adapter that it held before.
HARMLESS: dict[str, Change] = {
    "adapter's name in keys": keys(lambda key: re.sub(r"\.weight$", ".default.weight", key)),
    "another adapter's name": keys(lambda key: re.sub(r"\.weight$", ".my-law_2.weight", key)),
    "compiled": keys(lambda key: key.replace(PREFIX, PREFIX + "_orig_mod.")),
    "compiled around": keys(lambda key: "_orig_mod." + key),
    "distributed": keys(lambda key: "module." + key),
    "doubled prefix": keys(lambda key: PREFIX + key),
    "checkpointed": keys(lambda key: key.replace(".mlp", "._checkpoint_wrapped_module.mlp")),
    "sharded": keys(lambda key: key.replace("layers.0.", "layers.0._fsdp_wrapped_module.")),
    "pattern of targets": edited(pattern_of_targets),
    "all-linear": config(target_modules="all-linear"),
    "a mirror's name": config(base_model_name_or_path="unsloth/base-bnb-4bit"),
    "a path's name": config(base_model_name_or_path="/root/somewhere/base"),
    "no base named": config(base_model_name_or_path=None),
    "unknown fields": config(my_field={"x": [1, None]}, peft_version="99.0"),
    "older fields": without("peft_version", "corda_config", "qalora_group_size", "exclude_modules"),
    "trainable": config(inference_mode=False, lora_dropout=0.3),
    "task and auto mapping": config(task_type=None, auto_mapping=None, revision="main"),
    "lower case": edited(lambda said, _: said.update(peft_type=said["peft_type"])),
    "indented": text(lambda said: json.dumps(json.loads(said), indent=8, sort_keys=True)),
    "windows lines": text(lambda said: said.replace("\n", "\r\n")),
    "what trainers leave": beside("training_args.bin", "optimizer.pt", "rng_state.pth"),
    "a pickle beside": beside("adapter_model.bin"),
    "a checkpoint inside": beside("checkpoint-5/optimizer.pt"),
    "checkpoint folder": moved("run/checkpoint-500"),
    "spaces in the name": moved("my adapter (1)"),
    "other letters": moved("адаптер-法"),
    "an equals sign": moved("lr=1e-4,r=8"),
    "deep in a tree": moved("a/b/c/law"),
    "a link": linked,
    "named": lambda folder, _: f"my-name={folder}",
}
REFUSED: dict[str, Refused] = {
    "no prefix": Refused(keys(lambda key: key.removeprefix(PREFIX)), "does not begin with"),
    "half a module": Refused(tensors(halved), "has no lora_B"),
    "two adapters": Refused(tensors(two_in_one), "two adapters, a and b"),
    "sharded matrices": Refused(tensors(emptied), "ZeRO-3 or FSDP"),
    "shapes": Refused(tensors(cut), "maps .* features, the base maps"),
    "integers": Refused(tensors(as_integers), "floats are wanted"),
    "unknown tensor": Refused(with_more("model.norm.surprise", 3), "surprise"),
    "NaN": Refused(spoiled(float("nan")), "NaN or infinite"),
    "infinity": Refused(spoiled(float("inf")), "NaN or infinite"),
    "another base": Refused(keys(lambda key: key.replace(".layers", ".blocks")), "model.blocks"),
    "LoKr": Refused(config(peft_type="LOKR"), "peft_type is LOKR"),
    "no kind": Refused(without("peft_type"), "peft_type is None"),
    "another rank": Refused(config(r=77, rank_pattern={}), "77"),
    "alpha in words": Refused(config(lora_alpha="16", alpha_pattern={}), "lora_alpha is '16'"),
    "no alpha": Refused(config(lora_alpha=None, alpha_pattern={}), "lora_alpha is None"),
    "huge alpha": Refused(config(lora_alpha=10**39, alpha_pattern={}), "float32"),
    "rslora in words": Refused(config(use_rslora="yes"), "use_rslora is 'yes'"),
    "base of a number": Refused(config(base_model_name_or_path=7), "base_model_name_or_path is 7"),
    "targets elsewhere": Refused(config(target_modules=["nothing"]), "does not name as a target"),
    "excluded": Refused(config(exclude_modules=r".*"), "does not name as a target"),
    "targets of numbers": Refused(config(target_modules={"q_proj": 1}), "target_modules"),
    "moves the base": Refused(config(init_lora_weights="pissa_niter_4"), "init_lora_weights"),
    "layer replication": Refused(config(layer_replication=[[0, 1]]), "layer_replication"),
    "activated LoRA": Refused(config(alora_invocation_tokens=[1]), "alora_invocation_tokens"),
    "NaN in JSON": Refused(text(lambda said: '{"x": NaN, ' + said[1:]), "NaN is no number"),
    "twice in JSON": Refused(text(lambda said: '{"r": 1, ' + said[1:]), "'r' comes twice"),
    "byte order mark": Refused(text(lambda said: "\ufeff" + said), "byte order mark"),
    "a list": Refused(text(lambda said: "[]"), "holds list"),
    "half a config": Refused(truncated(CONFIG, 0.5), "not readable as JSON"),
    "empty config": Refused(truncated(CONFIG, 0), "not readable as JSON"),
    "half the weights": Refused(truncated(WEIGHTS, 0.5), "not a readable safetensors"),
    "empty weights": Refused(truncated(WEIGHTS, 0), "not a readable safetensors"),
    "a pointer of LFS": Refused(
        lambda folder, _: (folder / WEIGHTS).write_text("version https://git-lfs") and None,
        "not a readable safetensors",
    ),
    "no weights": Refused(removed(WEIGHTS), "no adapter_model.safetensors"),
    "no config": Refused(removed(CONFIG), "no adapter_config.json"),
    "pickled": Refused(only_a_pickle, "a pickle"),
    "a folder for a file": Refused(a_folder, "is a folder"),
    "a name that hides": Refused(moved("law\u202e"), "cannot be seen"),
}
DTYPES = (
    torch.float32,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.float8_e4m3fn,
)


@dataclass(frozen=True)
class Verdict:
    number: int
    changes: tuple[str, ...]
    wanted: str | None  # the cause to be refused for; None: to be right
    difference: float | None  # from PEFT, of the largest logit; None: refused
    said: str


class World:
    """A base on the disk, and folders of adapters of it."""

    def __init__(self, folder: Path) -> None:
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self.folder = folder
        self.base = make_model("llama")
        self.base.save_pretrained(folder / "base")
        words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0")
        tokenizer.save_pretrained(folder / "base")
        self.batch = make_batch(self.base, [7, 4])
        with torch.no_grad():
            self.plain = self.base(**self.batch).logits

    def judge(self, number: int) -> Verdict:
        """Make folder `number`, and see what becomes of it. Warnings are no verdict."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self._judge(number)

    def _judge(self, number: int) -> Verdict:
        random = Random(number)
        folder = self.folder / f"found{number}" / "adapter"
        wanted = self._adapter(folder, random)
        names = random.sample(sorted(HARMLESS), 1 + number % 2)
        names[0] = sorted(HARMLESS)[number // 2 % len(HARMLESS)]
        refused = None
        if number % 2:
            names = names[:1] if number % 4 == 1 else []
            last = sorted(REFUSED)[number // 2 % len(REFUSED)]
            refused = REFUSED[last]
        assert float((wanted - self.plain).abs().max()) > 1e-3, "the adapter does nothing"
        place = self._change(folder, names, random)
        if refused:
            place, names = refused.change(Path(_path(place)), random) or place, [*names, last]
        try:
            verified, said = self._verify(place)
            difference = None if verified else self._difference(place, wanted)
        finally:
            shutil.rmtree(folder.parent)
        return Verdict(number, tuple(names), refused and refused.cause, difference, said)

    def _adapter(self, folder: Path, random: Random) -> torch.Tensor:
        """Save an adapter by PEFT; the logits that PEFT itself computes with it."""
        leaves = random.sample(LINEARS["llama"], random.randint(1, 7))
        patterns = {leaves[0]: random.randint(1, 5)} if random.random() < 0.4 else {}
        settings = LoraConfig(
            r=random.randint(1, 8),
            lora_alpha=random.choice([1, 4, 16, 7.5]),
            target_modules=leaves,
            rank_pattern=patterns if random.random() < 0.7 else {},
            alpha_pattern=patterns if random.random() < 0.7 else {},
            use_rslora=random.random() < 0.3,
            base_model_name_or_path="owner/base",
        )
        tuned: Any = get_peft_model(copy.deepcopy(self.base), settings).eval()
        noise, dtype = (
            torch.Generator().manual_seed(random.randrange(1 << 30)),
            random.choice(DTYPES),
        )
        for key, weight in tuned.named_parameters():
            if "lora_" in key:
                value = torch.randn(weight.shape, generator=noise) * 0.2
                weight.data = value.to(dtype).to(weight.dtype)
        tuned.save_pretrained(folder)
        tensors(lambda found, _: {k: v.to(dtype) for k, v in found.items()})(folder, random)
        with torch.no_grad():
            logits: torch.Tensor = tuned(**self.batch).logits
        return logits

    def _change(self, folder: Path, names: list[str], random: Random) -> Path | str:
        """Make the changes; a name comes last, for it stands before the path."""
        place: Path | str = folder
        for name in sorted(names, key=lambda name: name == "named"):
            place = HARMLESS[name](Path(_path(place)), random) or place
        return place

    def _verify(self, place: Path | str) -> tuple[list[str], str]:
        """The problems that `experts verify` finds, but for missing gates; what it printed."""
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()) as err:
            code = main(
                ["experts", "verify", str(place), "--base", str(self.folder / "base"), "--json"]
            )
        if code not in (0, 3):
            return [err.getvalue()], err.getvalue()
        (problems,) = json.loads(out.getvalue()).values()
        real = [problem for problem in problems if "has no gates" not in problem]
        if real:
            try:
                self._difference(place, torch.zeros(()))
            except PhatgooseError as error:
                return real, f"{real[0]} | {error}"
            raise AssertionError(f"verify says {real[0]}, and it is routed")
        return [], ""

    def _difference(self, place: Path | str, wanted: torch.Tensor) -> float:
        mine: nn.Module = copy.deepcopy(self.base)
        route(mine, ExpertPool.load([place]), "arrow", top_k=1)
        with torch.no_grad():
            found = mine(**self.batch).logits
        return float((found - wanted).abs().max() / wanted.abs().max())


def _path(place: Path | str) -> str:
    return str(place).partition("my-name=")[2] or str(place)


def is_right(verdict: Verdict) -> bool:
    if verdict.wanted is None:
        return verdict.difference is not None and verdict.difference <= CLOSE
    causes = verdict.said.split(" | ")
    return verdict.difference is None and all(re.search(verdict.wanted, said) for said in causes)


def run() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folders", type=int, default=200)
    wanted = parser.parse_args().folders
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder))
        verdicts = [world.judge(number) for number in range(wanted)]
    wrong = [verdict for verdict in verdicts if not is_right(verdict)]
    for verdict in wrong:
        print(verdict, file=sys.stderr)
    right = [v.difference for v in verdicts if v.difference is not None]
    counts = Counter("refused" if v.difference is None else "routed" for v in verdicts)
    print(
        json.dumps(
            {
                "folders": wanted,
                **counts,
                "wrong": len(wrong),
                "largest difference": max(right, default=None),
                "changes": len(HARMLESS) + len(REFUSED),
            }
        )
    )
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(run())
