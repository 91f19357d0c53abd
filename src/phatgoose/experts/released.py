"""Importing the pools published with the paper: one PEFT LoRA folder with gates per expert.

The checkpoints r-three/P3_Phatgoose and r-three/FLAN_Phatgoose on the Hub are each one `best.pt` of
36 or 166 experts of google/t5-xl-lm-adapt (arXiv:2402.05859); `released_file` says what is in it.
The order of the experts is the one the authors concatenate them in (scripts/concatenate.py in
github.com/r-three/phatgoose).
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from phatgoose.errors import (
    ConfigError,
    ExpertFormatError,
    ExpertNotFoundError,
    IncompatibleExpertError,
    PhatgooseError,
    first_line,
)
from phatgoose.experts.base import BaseIdentity, identify_base, is_hub_name
from phatgoose.experts.expert import Expert, load_expert
from phatgoose.experts.lora import adapter_hash, problem_of
from phatgoose.experts.low_rank import LoraModule
from phatgoose.experts.released_file import GATE, A, B, Halves, read_pool
from phatgoose.experts.save import save_expert
from phatgoose.experts.signatures import GateRecord, Gates, vectors_hash
from phatgoose.experts.tensors import is_finite
from phatgoose.experts.verify import check_modules

_P3 = """
    Agnews Amazonpolarity Cosmosqa Samsum Quartz Ropes Wikibio Paws Wikiqa Socialiqa Qasc Quail
    Dream Wiqa Quarel Sciq Quoref Duorc Rottentomatoes Yelp Commongen Gigaword Xsum Mrpc Qqp
    Commonsenseqa Cose Wikihop Hotpotqa Appreviews Trec Multinews Imdb Adversarialqa
    Cnndailymail Dbpedia14
"""
_FLAN2021 = """
    Ai2arceasy Ai2arcchallenge Algebralinear1d Boolq Coqa Defpronounresolution Drop Fixpunct
    GemDart Geme2enlg Gemwebnlgen Gemwikilinguaen Gluesst2 Gluecola Gluemnli Glueqnli Gluestsb
    Gluewnli Lambada Naturalquestionsopen Newsroom Openbookqa Opinionabstractidebate
    Opinionabstractrottentomatoes Paracrawlenes Piqa Quac Sentiment140 Snli Squad
    Supergluemultirc Supergluerecord Triviaqa Truecase Unifiedqascienceinst Wordsegment
"""
_NIV2 = """
    Translation Programexecution Questiongeneration Sentimentanalysis Textcategorization
    Textmatching Toxiclanguagedetection Causeeffectclassification Informationextraction
    Textualentailment Wrongcandidategeneration Namedentityrecognition Commonsenseclassification
    Fillintheblank Textcompletion Sentencecomposition Titlegeneration Languageidentification
    Questionunderstanding Sentenceperturbation Answerabilityclassification Summarization
    Coreferenceresolution Textqualityevaluation Texttocode Paraphrasing Dialoguegeneration
    Questionrewriting Wordsemantics Postagging Linguisticprobing Storycomposition
    Speakeridentification Wordanalogy Datatotext Stereotypedetection
    Negotiationstrategydetection Dialogueactrecognition Genderclassification
    Coherenceclassification Explanation Ethicsclassification Wordrelationclassification
    Sentenceordering Answerverification Mathematics Intentidentification Keywordtagging
    Codetotext Dialoguestatetracking Textsimplification Stancedetection Factverification
    Grammarerrordetection Sectionclassification Numberconversion Styletransfer
    Speakerrelationclassification Ironydetection Questiondecomposition Overlapextraction
    Grammarerrorcorrection Spellingerrordetection Entitygeneration Sentenceexpansion
    Discourseconnectiveidentification Discourserelationclassification Poemgeneration
    Entityrelationclassification Punctuationerrordetection Spamclassification Paperreview
    Sentencecompression Prepositionprediction Misc
"""
_ADDED = """
    P3Wscfixed P3Copa P3Hswag P3Wic P3Racehigh P3Racemiddle P3Webquestions Flanv2zsQrecc
    Flanv2zsWikidialog Flanv2zsQreccii Flanv2zsWikidialogii Flanv2zsAeslc
    Flanv2zsWmt16translatecsen Flanv2zsWmt16translatedeen Flanv2zsWmt16translateruen
    Flanv2zsWmt16translatefien Flanv2zsWmt16translateroen Flanv2zsWmt16translatetren
    Flanv2zsWmt14translatefren
"""
P3_NAMES = tuple(f"P3{name}" for name in _P3.split())
FLAN_NAMES = (
    *P3_NAMES,
    *(f"Flanv2zs{name}" for name in _FLAN2021.split()),
    *(f"Niv2zs{name}" for name in _NIV2.split()),
    *_ADDED.split(),
)
_COLLECTIONS = {
    "P3": "the P3 data set",
    "Flanv2zs": "the zero-shot prompts of the FLAN v2 data set",
    "Niv2zs": "the zero-shot prompts of the Natural Instructions v2 category",
}

_SAFE_NAME = re.compile(r"[A-Za-z0-9][\w.-]*", re.ASCII)


def import_released(
    checkpoint: str | Path,
    base: str,
    out: str | Path,
    *,
    names: Sequence[str] | None = None,
    progress: bool = True,
) -> list[Path]:
    """Turn a published `best.pt` into one expert folder per expert, and return the folders.

    `base` is a Hub id or a folder with the base's config.json; its weights are not read. A file of
    36 or 166 experts gets the published names, any other expert_000 and so on, unless `names` are
    given. The file is memory-mapped, so memory holds one expert at a time. Folders that an earlier
    import finished are checked and kept; a folder with other content is never overwritten.

    Raises:
        ConfigError: `names` are too few, too many, not distinct, or no folder names.
        ExpertFormatError: the file is no such checkpoint, or a folder with other content exists.
        ExpertNotFoundError: the base's config cannot be had.
        IncompatibleExpertError: the experts do not fit the base.
    """
    checkpoint, base, out = Path(checkpoint), str(base), Path(out)
    experts = read_pool(checkpoint)
    names = _check_names(names, len(experts), str(checkpoint))
    model, identity = _open_base(base)
    for name, halves in zip(names, experts, strict=True):
        misfit = next(check_modules(_view(name, halves, base), model), None)
        if misfit:
            raise IncompatibleExpertError(f"{checkpoint} on {base}: {misfit}")
        _check_values(name, halves, base, str(checkpoint))
    out.mkdir(parents=True, exist_ok=True)
    folders = []
    for index, name in enumerate(tqdm(names, desc="experts", disable=not progress)):
        source = {"imported_from": checkpoint.name, "index": index}
        expert = _with_gates(_view(name, experts[index], base), experts[index], identity, source)
        folder = out / name
        if os.path.lexists(folder):
            _check_same(folder, expert, str(checkpoint))
        else:
            save_expert(expert, folder, task_type="SEQ_2_SEQ_LM", card=_card(expert))
        folders.append(folder)
    return folders


def _check_values(name: str, halves: Halves, base: str, who: str) -> None:
    """Raise ExpertFormatError unless an expert's values can be computed with."""
    for module, lora in _view(name, halves, base).modules.items():
        problem = problem_of(module, lora)
        if not problem and not is_finite(halves[module][GATE]):
            problem = f"the gate of {module} holds NaN or infinite values, or some beyond float32."
        if problem:
            raise ExpertFormatError(f"{who}: {name}: {problem}")


def _check_names(names: Sequence[str] | None, experts: int, who: str) -> list[str]:
    """The experts' names: as given, as published, or numbered."""
    if names is None:
        published = {len(order): order for order in (P3_NAMES, FLAN_NAMES)}
        return list(published.get(experts, [f"expert_{i:03d}" for i in range(experts)]))
    if isinstance(names, str) or len(names) != experts:
        found = "one string" if isinstance(names, str) else f"{len(names)} names"
        raise ConfigError(f"{who}: holds {experts} experts, got {found}. Give one name for each.")
    seen: set[str] = set()
    for name in names:
        if not _SAFE_NAME.fullmatch(name):
            raise ConfigError(
                f"names: {name!r} is no safe folder name. Use letters, digits, '_', '-' and '.', "
                "a letter or digit first."
            )
        if name.lower() in seen:  # some file systems do not tell upper case from lower
            raise ConfigError(f"names: {name!r} comes twice. Give every expert its own name.")
        seen.add(name.lower())
    return list(names)


def _open_base(base: str) -> tuple[nn.Module, BaseIdentity]:
    """The base without weights, and its identity, from its config and tokenizer."""
    from transformers import AutoConfig, AutoModelForSeq2SeqLM

    try:
        config = AutoConfig.from_pretrained(base, trust_remote_code=False)
    except Exception as error:  # a bad config.json raises errors of many kinds
        raise ExpertNotFoundError(
            f"{base}: the base's config cannot be had ({first_line(error)}). Check the name and "
            "the network, or give a folder that holds the base's config.json."
        ) from None
    if not getattr(config, "is_encoder_decoder", False):
        raise IncompatibleExpertError(
            f"{base}: is {config.model_type}, no encoder-decoder. The published pools are experts "
            "of google/t5-xl-lm-adapt."
        )
    try:
        with torch.device("meta"):
            model = AutoModelForSeq2SeqLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # sizes that make no model, or a model this release does not know
        raise IncompatibleExpertError(
            f"{base}: its config makes no model ({first_line(error)}). The published pools are "
            "experts of google/t5-xl-lm-adapt."
        ) from None
    return model, identify_base(model, _open_tokenizer(base), name=base)


def _open_tokenizer(base: str) -> Any | None:
    """The base's tokenizer, or None where it has none that loads here."""
    from transformers import AutoTokenizer
    from transformers.utils.hub import cached_file

    def has(file: str) -> bool:
        try:
            return cached_file(base, file) is not None
        except (OSError, ValueError):
            return False

    try:
        tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    except Exception:  # whatever a missing file or a missing package makes of it
        return None
    # Without a vocabulary file transformers makes up a tokenizer of special tokens alone, which
    # would later be told apart from the real one.
    files = {"tokenizer.json", *tokenizer.vocab_files_names.values()}
    return tokenizer if any(map(has, sorted(files))) else None


def _view(name: str, halves: Halves, base: str) -> Expert:
    """The expert as views of the mapped file: no memory of its own, and no gates yet."""
    modules = {
        module: LoraModule(part[A].T, part[B].T, 1 / part[A].shape[1])
        for module, part in halves.items()
    }
    return Expert(name, modules, base_name=base)


def _with_gates(
    expert: Expert, halves: Halves, identity: BaseIdentity, source: Mapping[str, Any]
) -> Expert:
    """The same expert with its gates; reads the adapter once, for its hash."""
    # Their training is known from the paper only, so the record names the source and claims none.
    record = GateRecord(identity, adapter_hash(expert.modules), training=source)
    vectors = {module: part[GATE].to(torch.float32, copy=True) for module, part in halves.items()}
    return Expert(expert.name, expert.modules, Gates(vectors, record), expert.base_name)


def _check_same(folder: Path, expert: Expert, who: str) -> None:
    """Raise ExpertFormatError unless `folder` holds this very expert, complete."""
    try:
        reason = _difference(load_expert(folder), expert)
    except PhatgooseError as error:
        reason = str(error)
    if reason:
        raise ExpertFormatError(
            f"{folder}: exists and is not the {expert.name} of {who} ({reason}). Nothing was "
            "overwritten; move it away, or import into another folder."
        )


def _difference(found: Expert, wanted: Expert) -> str | None:
    assert wanted.gates is not None
    if found.gates is None:
        return "it has no gates"
    if found.gates.record.adapter != wanted.gates.record.adapter:
        return "its adapter differs"
    if vectors_hash(found.gates.vectors) != vectors_hash(wanted.gates.vectors):
        return "its gates differ"
    return found.gates.record.base.difference(wanted.gates.record.base)


def _card(expert: Expert) -> str:
    """A model card: where the expert comes from."""
    assert expert.gates is not None
    source, base = expert.gates.record.training, expert.base_name
    lines = ["library_name: peft", "tags: [lora, phatgoose]"]
    if is_hub_name(base) and not Path(str(base)).exists():
        lines.insert(0, f"base_model: {base}")
    trained = f"number {source['index']} of its pool"
    for prefix, collection in _COLLECTIONS.items():
        if expert.name in FLAN_NAMES and expert.name.startswith(prefix):
            trained = f"trained on {collection} {expert.name.removeprefix(prefix)}"
    front = "\n".join(lines)
    return (
        f"---\n{front}\n---\n\n# {expert.name}\n\n"
        f"A LoRA expert with PHATGOOSE gates for {base}, {trained}.\n\n"
        f"Converted, values unchanged, from {source['imported_from']}, a checkpoint in the format "
        "of the pools at https://huggingface.co/r-three, which belong to *Learning to Route Among "
        "Specialized Experts for Zero-Shot Generalization* (Muqeeth, Liu, Liu and Raffel, 2024, "
        "https://arxiv.org/abs/2402.05859).\n"
    )
