"""Options that several commands share, by groups. Nothing heavy is imported here."""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from phatgoose.cli.fields import Options, option
from phatgoose.errors import ConfigError
from phatgoose.train.settings import AdapterTraining, GateTraining, SaveDtype

# As nn.RoutingSettings and pool.retrieval have them; they load torch, and tests/cli compares.
Scale = Literal["softmax", "unit"]
Quantization = Literal["bnb-8bit", "bnb-4bit", "torchao-int8", "gguf"]
ROUTER = "phatgoose"
ENCODER = "base"
MODEL = "model and experts"
ROUTERS = "how tokens choose their experts: a router's name (docs/routers.md has all of them)"


@dataclass(frozen=True, kw_only=True)
class JsonOption(Options):
    """Every command that prints results has it."""

    json: bool = option("print JSON instead of text", default=False)


@dataclass(frozen=True, kw_only=True)
class TrustOption(Options):
    """Whether a base's own code may run."""

    TITLE: ClassVar = MODEL
    trust_remote_code: bool = option(
        "run the Python code that the base brings along; read it first", default=False
    )


@dataclass(frozen=True, kw_only=True)
class LoadOptions(TrustOption):
    """How the base is loaded, and where it runs."""

    TITLE: ClassVar = MODEL

    device: str | None = option(
        "device to run on, cpu or cuda for example; without it, a GPU if there is one", default=None
    )
    device_map: str | None = option(
        "how to spread the base over devices: auto, balanced or the like, or a JSON object of "
        "modules and devices; without it, all is on --device",
        default=None,
        metavar="MAP",
    )
    dtype: Literal["float32", "bfloat16", "float16"] | None = option(
        "dtype of the base; without it, bfloat16, and float32 on a CPU and in training",
        default=None,
    )
    quantization: Quantization | None = option(
        "quantise the base while it is loaded; without it, the base is as it is saved, quantised "
        "ones too",
        default=None,
    )


def read_map(text: str | None) -> Any:
    """A device map as it was typed: a word, or a JSON object."""
    if text is None or not text.lstrip().startswith("{"):
        return text
    try:
        return json.loads(text)
    except ValueError as error:
        raise ConfigError(f"--device-map: is not JSON ({error}). Correct it.") from None


@dataclass(frozen=True, kw_only=True)
class SameBaseOption(Options):
    """What settles by how many names one base goes."""

    TITLE: ClassVar = MODEL

    same_base: bool = option(
        "take the experts' base and the model for one, whatever their names are", default=False
    )


@dataclass(frozen=True, kw_only=True)
class BaseOption(Options):
    """The base model, where that of the package is meant unless one is named."""

    TITLE: ClassVar = MODEL

    base: str | None = option(
        "base model, as a folder or Hub id; without it, the one in the package", default=None
    )


@dataclass(frozen=True, kw_only=True)
class AdaptersBaseOption(SameBaseOption):
    """The base model, where the adapters name theirs."""

    TITLE: ClassVar = MODEL

    base: str | None = option(
        "base model, as a folder or Hub id; without it, the one that the adapters' configs name",
        default=None,
    )


@dataclass(frozen=True, kw_only=True)
class PoolOptions(SameBaseOption):
    """The base and its experts."""

    TITLE: ClassVar = MODEL

    base: str | None = option(
        "base model, as a folder or Hub id; without it, the one that the experts name", default=None
    )
    experts: Sequence[str] | None = option(
        "experts: their folders, trees of such folders, or Hub ids "
        "(owner/name[/folder][@revision]); NAME=EXPERT names one; without it, those in the package",
        default=None,
        metavar="EXPERT",
    )


@dataclass(frozen=True, kw_only=True)
class ExpertsOptions(PoolOptions):
    """The base and its experts, less what general adapters know."""

    TITLE: ClassVar = MODEL

    general: Sequence[str] | None = option(
        "adapters of general knowledge, which are subtracted from every expert first (GenKnowSub); "
        "the experts then have no gates, so choose a router that needs none",
        default=None,
        metavar="FOLDER",
    )


def _top_k(text: str) -> int | str:
    if text == "all":
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"wanted a number or all, got {text!r}") from None


def _weights(text: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for part in text.split(","):
        name, equals, number = part.strip().rpartition("=")
        try:
            weight = float(number) if equals and name else None
        except ValueError:
            weight = None
        if weight is None:
            raise argparse.ArgumentTypeError(f"wanted NAME=WEIGHT, got {part.strip()!r}")
        if name in found:
            raise argparse.ArgumentTypeError(f"{name} has two weights")
        found[name] = weight
    return found


KNOBS = ("top_k", "temperature", "scale", "null_score")


@dataclass(frozen=True, kw_only=True)
class KnobOptions(Options):
    """The knobs of routing but for top_k; None leaves each to the router."""

    TITLE: ClassVar = "routing"
    temperature: float | None = option(
        "temperature of the softmax over the chosen experts; without it, the router's own",
        default=None,
    )
    scale: Scale | None = option(
        "how the chosen experts are weighted: by a softmax, or each as its adapter was trained "
        "(unit); without it, the router's own",
        default=None,
    )
    null_score: float | None = option(
        "score of using no expert: tokens whose experts all score less use none; without it, "
        "every token uses experts",
        default=None,
    )


@dataclass(frozen=True, kw_only=True)
class RoutingOptions(KnobOptions):
    """The router and all its knobs."""

    TITLE: ClassVar = KnobOptions.TITLE
    router: str = option(ROUTERS, default=ROUTER)
    top_k: int | Literal["all"] | None = option(
        "how many experts a token uses in each layer, a number or all; without it, what the "
        "router's paper says",
        default=None,
        type=_top_k,
    )

    def routing(self) -> dict[str, Any]:
        """What was given; the rest is the router's own."""
        return {knob: value for knob in KNOBS if (value := getattr(self, knob)) is not None}


@dataclass(frozen=True, kw_only=True)
class RoutedOptions(RoutingOptions, ExpertsOptions, LoadOptions, JsonOption):
    """All that a routed model is made of."""


@dataclass(frozen=True, kw_only=True)
class AnswerOptions(Options):
    """How prompts are given and answers written."""

    max_new_tokens: int = option("length that an answer may have, in tokens", default=64, least=1)
    raw: bool = option("give the prompt as it is, without a newline after it", default=False)
    chat: bool = option(
        "give the prompt as a user's turn, as the tokenizer's chat template writes it",
        default=False,
    )


@dataclass(frozen=True, kw_only=True)
class MethodOptions(Options):
    """What methods other than routers are made of."""

    TITLE: ClassVar = "other methods"
    weights: Mapping[str, float] | None = option(
        "for weights: a fixed mixture, NAME=WEIGHT for each of its experts, with commas between; "
        "the weights are used as they are",
        default=None,
        type=_weights,
        metavar="NAME=WEIGHT,...",
    )
    examples: Path | None = option(
        "for lorahub: file of a few examples, by which it finds the weights of a mixture",
        default=None,
        metavar="FILE",
    )
    train_tasks: str | None = option(
        "for retrieval: folder with the experts' training examples, as NAME/train.jsonl",
        default=None,
        metavar="DIR",
    )
    encoder: str = option(
        "for retrieval: what turns a prompt into a vector, base (the base's own embeddings) or a "
        "sentence-transformers model",
        default=ENCODER,
    )
    multitask: Path | None = option(
        "for multitask: a LoRA that was trained on all experts' data",
        default=None,
        metavar="FOLDER",
    )


@dataclass(frozen=True, kw_only=True)
class ChatOption(Options):
    """How examples that are texts are read."""

    chat: bool = option(
        "make chats of examples that are texts: a user's turn of the prompt and the assistant's of "
        "the answer, as the tokenizer's chat template writes them",
        default=False,
    )


@dataclass(frozen=True, kw_only=True)
class BatchOptions(Options):
    """What both phases of training share."""

    TITLE: ClassVar = "training"
    max_length: int = option(
        "length that an example may have, in tokens; a longer one loses its beginning",
        default=1024,
        least=2,
    )
    batch_size: int = option(
        "examples of each expert in a step", default=AdapterTraining.batch_size, least=1
    )
    seed: int = option(
        "seed of the initial values and of the order of examples",
        default=AdapterTraining.seed,
        least=0,
    )
    bf16: bool = option("compute in bfloat16 where autocast does", default=AdapterTraining.bf16)


@dataclass(frozen=True, kw_only=True)
class AdapterOptions(BatchOptions):
    """The adapter phase."""

    TITLE: ClassVar = "adapter"
    rank: int = option("rank of the LoRA", default=AdapterTraining.rank, least=1)
    alpha: int = option(
        "alpha of the LoRA, which is scaled by alpha / rank", default=AdapterTraining.alpha, least=1
    )
    target_modules: Sequence[str] | None = option(
        "layers to adapt, as the last parts of their names; without it, all linear ones but the "
        "head",
        default=None,
        metavar="NAME",
    )
    dropout: float = option(
        "dropout of the LoRA's input", default=AdapterTraining.dropout, least=0, below=1
    )
    steps: int = option(
        "steps that the adapter is trained for", default=AdapterTraining.steps, least=1
    )
    learning_rate: float = option(
        "learning rate of the adapter", default=AdapterTraining.learning_rate, above=0
    )
    save_dtype: SaveDtype = option(
        "dtype that the adapter is saved in", default=AdapterTraining.save_dtype
    )

    def adapter_training(self) -> AdapterTraining:
        return AdapterTraining(
            rank=self.rank,
            alpha=self.alpha,
            target_modules=(
                AdapterTraining.target_modules
                if self.target_modules is None
                else list(self.target_modules)
            ),
            dropout=self.dropout,
            steps=self.steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            seed=self.seed,
            bf16=self.bf16,
            save_dtype=self.save_dtype,
        )


@dataclass(frozen=True, kw_only=True)
class GateOptions(BatchOptions):
    """The gate phase."""

    TITLE: ClassVar = "gates"
    gate_steps: int = option(
        "steps that the gates are trained for", default=GateTraining.steps, least=1
    )
    gate_batch_size: int | None = option(
        "examples of each expert in a step of the gates; without it, --batch-size",
        default=None,
        least=1,
    )
    gate_learning_rate: float = option(
        "learning rate of the gates", default=GateTraining.learning_rate, above=0
    )

    def gate_training(self) -> GateTraining:
        return GateTraining(
            steps=self.gate_steps, learning_rate=self.gate_learning_rate, seed=self.seed
        )

    @property
    def gate_batch(self) -> int:
        """Examples of each expert in a step of the gates."""
        return self.gate_batch_size or self.batch_size


@dataclass(frozen=True, kw_only=True)
class GatingOptions(GateOptions, AdaptersBaseOption, LoadOptions, JsonOption):
    """All that training gates takes, of one adapter or of many."""


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(AdapterOptions, GateOptions, BaseOption, LoadOptions, JsonOption):
    """All that training an adapter and its gates takes, of one expert or of many."""
