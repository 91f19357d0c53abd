"""The readers of strangers' files, good files for each, and what may become of a bad one."""

import contextlib
import copy
import hashlib
import io
import json
import math
import re
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from phatgoose.cli.analysis import _read_oracles
from phatgoose.errors import LONGEST
from phatgoose.evaluation.eval_tasks import INDEX, _record
from phatgoose.experts import Expert, adapter_hash, identify_base, load_expert, released
from phatgoose.experts.kinds import KINDS
from phatgoose.experts.lora import CONFIG_FILE, PREFIX, WEIGHTS_FILE, read_adapter
from phatgoose.experts.signatures import HEADER, GateRecord, Gates, Signatures
from phatgoose.experts.tensors import largest
from phatgoose.tasks import read_examples
from phatgoose.text import is_hidden
from tests.fuzz import mutations

CONFIG_FIELDS = (
    "r lora_alpha rank_pattern alpha_pattern target_modules exclude_modules use_rslora peft_type "
    "use_dora modules_to_save base_model_name_or_path init_lora_weights bias layers_to_transform"
).split()
RAN = Path("/tmp/phatgoose-fuzz-ran")  # made only if a pickle ran
COMPARED = 0.1  # of the accepted adapters are read by PEFT too
ROWS: list[Any] = [
    {"inputs": "Is it?", "targets": "yes", "choices": ["yes", "no"]},
    {"prompt": "a", "completion": "b"},
    {"text": "\U0001f600 text"},
]
RECORDS = [
    {"name": "task", "split": "heldout", "metric": "accuracy", "near_task": ["one"]},
    {"name": "x"},
]


class Hung(BaseException):
    """Too long; no handler of Exception stops it."""


class Wrong(AssertionError):
    """What was accepted, or said, is wrong."""


def base() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "vocab_size": 20}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval()


def t5() -> nn.Module:
    torch.manual_seed(0)
    return T5ForConditionalGeneration(
        T5Config(vocab_size=20, d_model=12, d_kv=5, d_ff=20, num_layers=1, num_heads=2)
    )


class World:
    """Good files, made once, and a folder for bad ones."""

    def __init__(self, folder: Path) -> None:
        transformers.utils.logging.set_verbosity_error()
        warnings.simplefilter("ignore")
        self.folder = folder
        self.base = base()
        self.experts = [self._expert(folder / f"expert{seed}", seed) for seed in (0, 1)]
        self._t5 = folder / "t5"
        model = t5()
        model.config.save_pretrained(self._t5)
        self.pool: dict[str, torch.Tensor] = {}
        for name in (
            "encoder.block.0.layer.0.SelfAttention.q",
            "decoder.block.0.layer.2.DenseReluDense.wo",
        ):
            module = model.get_submodule(name)
            sizes = (module.in_features, 2), (2, module.out_features), (module.in_features,)
            parts = ("expert_lora.layer1", "expert_lora.layer2", "router.expert_embeddings")
            for index in range(3):
                for part, size in zip(parts, sizes, strict=True):
                    self.pool[f"{name}._addons.{part}__{index}"] = torch.randn(size)
        released._open_base = cache(released._open_base)  # the base is no input here

    def _expert(self, folder: Path, seed: int) -> dict[str, bytes]:
        """The files of an expert of `base`, with signatures of every kind, by name."""
        settings = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"]}
        tuned = get_peft_model(copy.deepcopy(self.base), LoraConfig(**settings))
        noise = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for key, weight in tuned.named_parameters():
                if "lora_" in key:
                    weight.copy_(torch.randn(weight.shape, generator=noise) * 0.3)
        tuned.save_pretrained(folder)
        _, modules = read_adapter(folder)
        identity, content = identify_base(self.base), adapter_hash(modules)
        vectors = {n: torch.randn(m.in_features, generator=noise) for n, m in modules.items()}
        for kind in KINDS.values():
            if kind.name == "gates":
                Gates(vectors, GateRecord(identity, content, {"lr": 0.1}, 1, 2, 3, 2.0, 1.0)).save(
                    folder
                )
            else:
                Signatures(kind.name, vectors, identity, content, 3, 9).save(folder)
        (folder / "README.md").unlink(missing_ok=True)
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    def fresh(self, number: int) -> Path:
        """An empty folder for a case."""
        folder = self.folder / f"case{number}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder


def run(world: World, number: int, seed: int) -> tuple[str, str]:
    """One case: which reader it was, and "accepted" or "refused: ...". Raises what goes wrong."""
    random = Random(f"{seed} {number}")
    (reader,) = random.choices([r.name for r in READERS], [r.weight for r in READERS])
    folder = world.fresh(number)
    try:
        with contextlib.chdir(folder) if hasattr(contextlib, "chdir") else contextlib.nullcontext():
            return reader, BY_NAME[reader].run(world, random, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if RAN.exists():
            RAN.rmdir()
            raise Wrong("a pickle ran")


def refuses(read: Callable[[], Any]) -> tuple[Any, str]:
    """What a reader gave, and its verdict; the text of a refusal is looked at."""
    from phatgoose.errors import PhatgooseError

    try:
        found = read()
    except PhatgooseError as error:
        text = str(error)
        if not text or any(map(is_hidden, text)) or len(text) > LONGEST:
            raise Wrong(f"a refusal that cannot be shown: {text[:300]!r}") from error
        return None, f"refused: {type(error).__name__}: {text}"
    return found, "accepted"


def expert_case(world: World, random: Random, folder: Path, name: str) -> str:
    """An expert, the file `name` of which is bad."""
    files = dict(world.experts[0])
    if name in (CONFIG_FILE, WEIGHTS_FILE) and random.random() < 0.8:
        files = {n: files[n] for n in (CONFIG_FILE, WEIGHTS_FILE)}  # no hash is in the way
    kind = random.random()
    if kind < 0.2:
        files[name] = mutations.raw(random, files[name])
    elif kind < 0.9 and name == CONFIG_FILE:
        config = json.loads(files[name])
        for _ in range(random.choice([1, 1, 2])):
            config = mutations.tree(random, config, tuple(CONFIG_FIELDS))
        files[name] = mutations.dump(random, config)
    elif kind < 0.88:
        files[name] = mutations.tensors(random, files[name], HEADER)
    elif kind < 0.9 and name not in (CONFIG_FILE, WEIGHTS_FILE):
        files[name] = mutations.as_before(files[name], HEADER)
    elif kind < 0.95:  # of another expert, or of another kind
        files[name] = random.choice([world.experts[1][name], files[random.choice(list(files))]])
    for file, data in files.items():
        (folder / file).write_bytes(data)
    if kind >= 0.95:
        mutations.no_file(random, folder / name)
    if random.random() < 0.01:
        strange = folder / random.choice(["a\nb", "\x1b[2K", "\u202ex", "é"])
        strange.mkdir()
        for path in [path for path in folder.iterdir() if path != strange]:
            path.rename(strange / path.name)
        folder = strange
    expert, verdict = refuses(lambda: load_expert(folder))
    if expert is not None:
        check_expert(expert, folder)
        if random.random() < COMPARED:
            compare(world, expert, folder)
    return verdict


def check_expert(expert: Expert, folder: Path) -> None:
    """Raise Wrong for values that nobody can compute with, or that no hash covers."""
    names = [expert.name, expert.base_name or "", *expert.modules]
    if any(is_hidden(c) for name in names for c in name):
        raise Wrong(f"accepted a name that cannot be seen: {names!r}")
    for name, lora in expert.modules.items():
        if not all(math.isfinite(v) for v in (largest(lora.a), largest(lora.b), lora.scale)):
            raise Wrong(f"accepted values at {name} that are not finite")
        ones = torch.full((lora.in_features,), 65504.0)
        if not (lora.scale * (lora.b.float() @ (lora.a.float() @ ones))).isfinite().all():
            raise Wrong(f"accepted matrices at {name} whose product overflows")
    for kind, signatures in expert.signatures.items():
        path = folder / KINDS[kind].file
        header, _ = mutations.split(path.read_bytes())
        record = json.loads(header.get("__metadata__", {}).get(HEADER, "{}"))
        digest = hashlib.sha256()
        for name, vector in sorted(load_file(path).items()):
            digest.update(name.encode() + vector.float().contiguous().numpy().tobytes())
            if not vector.float().isfinite().all():
                raise Wrong(f"accepted {kind} that are not finite")
        if record.get("vectors") != digest.hexdigest():
            raise Wrong(f"accepted {kind} that no hash covers")
        if (
            record["adapter"] != adapter_hash(expert.modules)
            or signatures.adapter != record["adapter"]
        ):
            raise Wrong(f"accepted {kind} of another adapter")


def compare(world: World, expert: Expert, folder: Path) -> None:
    """Raise Wrong where PEFT reads the same folder as something else."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            tuned = PeftModel.from_pretrained(copy.deepcopy(world.base), folder)
    except (Exception, Hung):  # PEFT has its own reasons to refuse, and patterns that hang it
        return
    for name, lora in expert.modules.items():
        try:
            layer = world.base.get_submodule(name) and tuned.get_submodule(PREFIX + name)
        except AttributeError:
            continue  # not of this base, which `verify_expert` says
        if "default" not in getattr(layer, "lora_A", {}):
            targets = json.loads((folder / CONFIG_FILE).read_bytes()).get("target_modules")
            if not targets or not isinstance(targets, str | list) or "(?" in targets:
                continue  # PEFT's own choice, or a pattern beyond ours: nothing is told by it
            raise Wrong(f"PEFT leaves {name} out")
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        same = torch.equal(a, lora.a.float()) and torch.equal(b, lora.b.float())
        if not same or not math.isclose(layer.scaling["default"], lora.scale, rel_tol=1e-9):
            raise Wrong(f"PEFT reads {name} as something else")


def task_case(world: World, random: Random, folder: Path) -> str:
    suffix, data = mutations.packed(random, mutations.lines(random, ROWS))
    path = folder / f"a.jsonl{suffix}"
    path.write_bytes(data)
    if random.random() < 0.05:
        mutations.no_file(random, path)
    examples, verdict = refuses(lambda: read_examples(path))
    for example in examples or ():
        (example.prompt + example.target).encode()
        if example.choices is not None and example.target not in example.choices:
            raise Wrong("accepted a target that is not among its choices")
    return verdict


def published_case(world: World, random: Random, folder: Path) -> str:
    path = folder / "best.pt"
    path.write_bytes(mutations.published(random, world.pool))
    if random.random() < 0.05:
        mutations.no_file(random, path)
    out = folder / "out"
    found, verdict = refuses(
        lambda: released.import_released(path, str(world._t5), out, progress=False)
    )
    for expert in map(load_expert, found or ()):
        check_expert(expert, out / expert.name)
    return verdict


def json_case(world: World, random: Random, folder: Path, name: str) -> str:
    """An index of tasks, or the results of an evaluation."""
    good = RECORDS if name == INDEX else {"oracle": {"task": "one"}, "tasks": {}}
    path = folder / name
    path.write_bytes(mutations.dump(random, mutations.tree(random, good)))
    if random.random() < 0.2:
        path.write_bytes(mutations.raw(random, path.read_bytes()))
    if random.random() < 0.05:
        mutations.no_file(random, path)
    (folder / "task").mkdir(exist_ok=True)
    if name != INDEX:
        if not path.exists():
            return "refused: there is none, which the command line says"
        return refuses(lambda: _read_oracles(path))[1]
    found, verdict = refuses(lambda: _record(folder / "task"))
    if found is not None and not isinstance(found.get("metric") or "", str):
        raise Wrong(f"accepted {found!r}")
    return verdict


@dataclass(frozen=True)
class Reader:
    name: str
    weight: int
    run: Callable[[World, Random, Path], str]


def _of_expert(name: str) -> Callable[[World, Random, Path], str]:
    return lambda world, random, folder: expert_case(world, random, folder, name)


READERS = [
    Reader("adapter_config", 25, _of_expert(CONFIG_FILE)),
    Reader("adapter_weights", 25, _of_expert(WEIGHTS_FILE)),
    *(Reader(kind.name, 9, _of_expert(kind.file)) for kind in KINDS.values()),
    Reader("tasks", 8, task_case),
    Reader("best.pt", 6, published_case),
    Reader("INDEX.json", 3, lambda *case: json_case(*case, INDEX)),
    Reader("results.json", 2, lambda *case: json_case(*case, "results.json")),
]
BY_NAME = {reader.name: reader for reader in READERS}


def shape(verdict: str) -> str:
    """A refusal without what differs from case to case, to count kinds of it."""
    return re.sub(r"\S*/\S*|'.*?'|\d+|\([^)]*\)", "*", verdict)[:90]
