"""Reading a PEFT LoRA folder: which matrices, which scale, and what we refuse."""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from phatgoose.errors import ExpertFormatError, UnsupportedAdapterError
from phatgoose.experts.delta import LORA_A, LORA_B, Delta
from phatgoose.experts.deltas import kind_of, split_key, supported_fields
from phatgoose.experts.embeddings import EMBEDDING_A, EMBEDDING_B
from phatgoose.experts.keys import PREFIX, plain_keys
from phatgoose.experts.lora_parts import LORA_BIAS, MAGNITUDE
from phatgoose.experts.low_rank import LoraModule
from phatgoose.experts.patterns import PatternError, Patterns
from phatgoose.experts.targets import Targets
from phatgoose.experts.tensors import LARGEST_VALUE, is_finite, largest, read_tensors
from phatgoose.files import write_json, write_tensors
from phatgoose.reading import read_json
from phatgoose.text import visible

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
LARGEST_INPUT = 65504.0  # of a layer: the largest of float16

# PEFT options that change what an adapted layer computes; any truthy value is refused.
UNSUPPORTED = {
    "use_dora": "DoRA",
    "modules_to_save": "modules_to_save",
    "trainable_token_indices": "trainable token indices",
    "target_parameters": "LoRA on bare parameters",
    "layer_replication": "layer replication",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow routing inside PEFT",
    "megatron_config": "Megatron layers",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "kasa_config": "KaSA",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
}
# Initialisations that also change the base's weights, so the adapter alone is not the difference.
# PiSSA and OLoRA can be computed again from the base (see `initial`); these drew random numbers or
# read data.
MOVES_THE_BASE = ("pissa_niter", "corda", "loftq", "lora_ga")


def read_config(folder: Path) -> dict[str, Any]:
    """Parse adapter_config.json and refuse what we would not compute exactly.

    Raises:
        ExpertFormatError: the file is missing or not a JSON object.
        UnsupportedAdapterError: not LoRA, or a feature in `UNSUPPORTED` is on.
    """
    path = folder / CONFIG_FILE
    try:
        config = read_json(path)
    except FileNotFoundError:
        raise ExpertFormatError(
            f"{folder}: no {CONFIG_FILE}. An expert is a PEFT LoRA folder; save one with "
            "peft_model.save_pretrained(folder)."
        ) from None
    if not isinstance(config, dict):
        raise ExpertFormatError(f"{path}: holds {type(config).__name__}, a JSON object is wanted.")
    refuse_unsupported(config, str(path))
    _check_fields(config, str(path))
    return config


def _check_fields(config: Mapping[str, Any], who: str) -> None:
    base = config.get("base_model_name_or_path")
    if base is not None and (not isinstance(base, str) or visible(base) != base):
        raise ExpertFormatError(
            f"{who}: base_model_name_or_path is {base!r}, a Hub id or a path is wanted. Correct it."
        )
    if not isinstance(config.get("use_rslora") or False, bool):
        raise ExpertFormatError(
            f"{who}: use_rslora is {config['use_rslora']!r}, true or false is wanted. Correct it."
        )


def refuse_unsupported(config: Mapping[str, Any], who: str) -> None:
    """Raise UnsupportedAdapterError where a PEFT LoRA config needs what we do not compute."""
    peft_type = str(getattr(config.get("peft_type"), "value", config.get("peft_type")))
    if peft_type.upper() != "LORA":
        raise UnsupportedAdapterError(
            f"{who}: peft_type is {peft_type}, only LORA is supported. Make one of it: phatgoose "
            "experts convert FOLDER --out NEW --base BASE. Or train a LoRA."
        )
    for field, feature in UNSUPPORTED.items():
        if config.get(field) and field not in supported_fields():
            raise UnsupportedAdapterError(
                f"{who}: {field} is set ({feature}), which is not supported. Train a plain LoRA on "
                "linear layers."
            )
    init = str(config.get("init_lora_weights", "")).lower()
    if init.startswith(MOVES_THE_BASE):
        raise UnsupportedAdapterError(
            f"{who}: init_lora_weights is {init!r}, which changes the base's weights too. Save the "
            "adapter converted to plain LoRA (PEFT: path_initial_model_for_weight_conversion)."
        )


def scale_of(config: Mapping[str, Any], module: str, rank: int) -> float:
    """The factor PEFT puts before B A at `module`: alpha / r, or alpha / sqrt(r) for rsLoRA."""
    return _scale(config, module, rank, _Setting(config, "alpha_pattern", "lora_alpha"))


def _scale(config: Mapping[str, Any], module: str, rank: int, alphas: "_Setting") -> float:
    alpha = alphas.of(module)
    if not isinstance(alpha, int | float) or isinstance(alpha, bool):
        raise ExpertFormatError(
            f"{CONFIG_FILE}: lora_alpha is {alpha!r} for {module}, a number is wanted."
        )
    try:
        scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    except OverflowError:
        scale = math.inf
    if not abs(scale) <= LARGEST_VALUE:
        raise ExpertFormatError(
            f"{CONFIG_FILE}: lora_alpha is {alpha!r} for {module}, which is more than float32 "
            "holds. Correct it."
        )
    return scale


class _Setting:
    """What a config says for each module: by the first of its patterns that fits, as in PEFT."""

    def __init__(self, config: Mapping[str, Any], field: str, default: str) -> None:
        self._field, self._default = field, config.get(default)
        self._values: Any = config.get(field) or {}
        if not isinstance(self._values, dict) or not all(isinstance(k, str) for k in self._values):
            raise ExpertFormatError(
                f"{CONFIG_FILE}: {field} is {self._values!r}, a mapping from module patterns to "
                "numbers is wanted."
            )
        self._keys = list(self._values)
        try:
            self._patterns = Patterns(self._keys)
        except PatternError as error:
            raise self._refused(error) from None

    def of(self, module: str) -> Any:
        try:
            place = self._patterns.first(module)
        except PatternError as error:
            raise self._refused(error) from None
        key = module if place is None else self._keys[place]
        return self._values.get(key, self._default)

    def _refused(self, error: PatternError) -> ExpertFormatError:
        return ExpertFormatError(f"{CONFIG_FILE}: {self._field}: {error}.")


def read_adapter(folder: Path) -> tuple[dict[str, Any], dict[str, Delta]]:
    """Read a PEFT LoRA folder: its config, and what it adds at each adapted module, by name.

    Raises:
        ExpertFormatError: a file is missing, truncated or does not match its config.
        UnsupportedAdapterError: a feature we do not compute, or only a pickle is there.
    """
    config = read_config(folder)
    path = folder / WEIGHTS_FILE
    if not path.exists() and (folder / PICKLE).exists():
        raise UnsupportedAdapterError(
            f"{folder}/{PICKLE}: a pickle, which can run code when opened, so it is never loaded. "
            f"Ask its owner for {WEIGHTS_FILE}, or convert it by torch's reader for weights alone: "
            f"phatgoose experts convert {folder} --out FOLDER --bin"
        )
    tensors, _ = read_tensors(path)
    return config, split_modules(config, plain_keys(tensors, str(path)), str(path))


def has_peft_keys(folder: Path) -> bool:
    """Whether PEFT itself finds every tensor, for it leaves out those whose keys were changed."""
    tensors, _ = read_tensors(folder / WEIGHTS_FILE)
    return set(plain_keys(tensors, str(folder))) == set(tensors)


def write_adapter(folder: Path, config: Mapping[str, Any], modules: Mapping[str, Delta]) -> None:
    """Write a PEFT LoRA folder: what read_adapter reads, and PEFT."""
    tensors = {}
    for name, module in modules.items():
        factors = {LORA_A: module.a, LORA_B: module.b} if module.rank else {}
        for key, tensor in {**factors, **module.others}.items():
            tensors[f"{PREFIX}{name}.{key}"] = tensor
    write_tensors(folder / WEIGHTS_FILE, tensors, {"format": "pt"})
    plain = {key: sorted(v) if isinstance(v, set) else v for key, v in sorted(config.items())}
    write_json(folder / CONFIG_FILE, plain)


def lora_of(layer: Any, adapter: str) -> LoraModule:
    """What a PEFT LoRA layer has of one adapter; shares the layer's memory on the CPU."""
    a, b = (half[adapter].weight.detach().cpu() for half in (layer.lora_A, layer.lora_B))
    return LoraModule(a, b, float(layer.scaling[adapter]))


def split_modules(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], who: str
) -> dict[str, Delta]:
    """What an adapter's tensors add at each module; `who` names the source in errors."""
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if _is_twice(key, tensors):
            continue
        known = split_key(key.removeprefix(PREFIX))
        if known is None:
            _refuse_key(key, who)
        module, half = known
        if not key.startswith(PREFIX):
            raise ExpertFormatError(
                f"{who}: {key} does not begin with {PREFIX}, so PEFT would leave it out. Save "
                "the adapter with peft_model.save_pretrained(folder)."
            )
        halves.setdefault(module, {})[half] = tensor
    if not halves:
        raise ExpertFormatError(f"{who}: holds no lora_A and lora_B matrices.")
    settings = _Settings(config)
    for module, found in halves.items():
        _check_promises(module, found, config, who)
    modules = {
        module: _read_module(module, found, settings, who)
        for module, found in sorted(halves.items())
    }
    _check_kept(modules, config, who)
    check_values(modules, who)
    return modules


def _is_twice(key: str, tensors: Mapping[str, Tensor]) -> bool:
    """Whether it is a bias that PEFT saved once more, or the base's own, of modules_to_save."""
    for wrapped in (".modules_to_save.", ".original_module."):
        if wrapped in key and key.replace(wrapped, ".") in tensors:
            return True
    return False


class _Settings:
    """What a config says for each module."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        self.targets = Targets(config)
        self.ranks = _Setting(config, "rank_pattern", "r")
        self.alphas = _Setting(config, "alpha_pattern", "lora_alpha")


# What a config says of every LoRA, and the tensor that a file then has for each.
PROMISES = {"use_dora": MAGNITUDE, "lora_bias": LORA_BIAS}


def _check_promises(
    module: str, found: Mapping[str, Tensor], config: Mapping[str, Any], who: str
) -> None:
    """Raise UnsupportedAdapterError where PEFT would compute something else than was trained."""
    for field, key in PROMISES.items():
        said = bool(config.get(field)) and field in supported_fields()
        adapted = LORA_B in found or (EMBEDDING_B in found and field == "use_dora")
        if adapted and said != (key in found) and not config.get("target_parameters"):
            raise UnsupportedAdapterError(
                f"{who}: {module} has {'a' if key in found else 'no'} {key}, and {CONFIG_FILE} "
                f"says {field}: {json.dumps(config.get(field))}, so PEFT would compute something "
                "else than was trained. Correct the config, or save the adapter again."
            )


def _check_kept(modules: Mapping[str, Delta], config: Mapping[str, Any], who: str) -> None:
    """Raise UnsupportedAdapterError where the config names what the file holds nothing of."""
    kept = {field for delta in modules.values() for field in delta.fields}
    for field in ("modules_to_save", "trainable_token_indices", "target_parameters"):
        if config.get(field) and field not in kept:
            raise UnsupportedAdapterError(
                f"{who}: {CONFIG_FILE} has {field} ({UNSUPPORTED[field]}), and the file holds "
                "nothing of that. Save the adapter again."
            )


def _read_module(module: str, found: dict[str, Tensor], settings: _Settings, who: str) -> Delta:
    kind = kind_of(found, module, settings.config)
    if kind is None:
        raise ExpertFormatError(f"{who}: {module} {_why_no_kind(found)}. Save the adapter again.")
    if LORA_A in kind.keys:
        _check_shapes(found[LORA_A], found[LORA_B], module, who)
    # With this, PEFT adapts the output head along with the embedding.
    if kind.targeted and not settings.config.get("ensure_weight_tying"):
        _check_target(module, settings.targets, who)
    rank, scale = kind.rank_in(found, settings.config), 1.0
    if rank is not None:
        if kind.targeted:
            _check_rank(settings.ranks.of(module), module, rank, who)
        scale = _scale(settings.config, module, rank, settings.alphas)
    try:
        return kind.read_of(found, scale, module, settings.config)
    except (ExpertFormatError, UnsupportedAdapterError) as error:
        raise type(error)(f"{who}: {error}") from None


def _why_no_kind(found: Mapping[str, Tensor]) -> str:
    """What is missing, or too much, of a module's tensors."""
    for pair in ((LORA_A, LORA_B), (EMBEDDING_A, EMBEDDING_B)):
        missing = [half.removesuffix(".weight") for half in pair if half not in found]
        if len(missing) == 1:
            return f"has no {missing[0]}"
    if not any(half.startswith("lora_embedding") for half in found):
        return "has no lora_A nor lora_B beside " + ", ".join(sorted(found))
    return "has tensors that do not go together: " + ", ".join(sorted(found))


def _check_target(module: str, targets: Targets, who: str) -> None:
    try:
        named = targets.name(module)
    except PatternError as error:
        raise ExpertFormatError(f"{CONFIG_FILE}: target_modules: {error}.") from None
    if not named:
        raise ExpertFormatError(
            f"{who}: holds matrices of {module}, which {CONFIG_FILE} does not name as a "
            "target, so PEFT would leave them out. Correct target_modules, or save the adapter "
            "again."
        )


def _check_shapes(a: Tensor, b: Tensor, module: str, who: str) -> None:
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or not a.shape[0]:
        raise ExpertFormatError(
            f"{who}: {module} has lora_A {list(a.shape)} and lora_B {list(b.shape)}; wanted "
            "[rank, in_features] and [out_features, rank] with one rank."
        )


def check_values(modules: Mapping[str, Delta], who: str) -> None:
    """Raise ExpertFormatError unless what every module adds can be computed in float32."""
    for name, module in modules.items():
        problem = problem_of(name, module)
        if problem:
            raise ExpertFormatError(f"{who}: {problem}")


def problem_of(name: str, module: Delta) -> str | None:
    """Why a module's values cannot be computed with, in a sentence, or None."""
    stored = {LORA_A: module.a, LORA_B: module.b, **module.others}
    for key, matrix in stored.items():
        half = key.removesuffix(".weight")
        if not is_finite(matrix):
            return (
                f"{half} of {name} holds NaN or infinite values, or some beyond float32. Train the "
                "adapter again, with a lower learning rate or in bfloat16."
            )
    inner = LARGEST_INPUT * module.in_features * largest(module.a)
    outer = inner * module.rank * largest(module.b) * abs(module.scale)
    if not max(inner, outer, largest(module.b) * abs(module.scale)) <= LARGEST_VALUE:
        return (
            f"what it adds at {name} may exceed float32: its matrices have values of up to "
            f"{largest(module.a):.2g} and {largest(module.b):.2g}, its scale is "
            f"{module.scale:.2g}. Train the adapter again, or correct lora_alpha."
        )
    return None


def _check_rank(wanted: Any, module: str, rank: int, who: str) -> None:
    if wanted != rank or type(wanted) is not int:
        raise ExpertFormatError(
            f"{who}: {module} has rank {rank}, {CONFIG_FILE} says {wanted!r}. The two files do not "
            "belong together; save the adapter again."
        )


def _refuse_key(key: str, who: str) -> NoReturn:
    raise UnsupportedAdapterError(
        f"{who}: {key} is a tensor that no kind of adapter has which is supported: see "
        "docs/adapters.md for those. Train a plain LoRA on linear layers."
    )


def adapter_hash(modules: Mapping[str, Delta]) -> str:
    """SHA-256 of names, shapes, fp32 values and scales: what the adapter adds, however stored."""
    digest = hashlib.sha256()
    for name, module in sorted(modules.items()):
        digest.update(f"{name} {module.scale:.9g}".encode())
        for matrix in (module.a, module.b):
            digest.update(f" {list(matrix.shape)} ".encode())
            values = matrix.detach().to("cpu", torch.float32).contiguous()
            digest.update(values.flatten().numpy().data)  # of one dimension, it need not be copied
        for key, tensor in sorted(module.hashed.items()):
            values = tensor.detach().to("cpu", torch.float32).contiguous()
            digest.update(f" {key} {list(tensor.shape)} ".encode() + values.numpy().tobytes())
    return digest.hexdigest()
