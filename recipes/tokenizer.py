"""Text to tokens: train the byte-level BPE tokenizer, and what `pretrain.py` reads with it.

    python recipes/tokenizer.py TEXT_DIR OUT_DIR

TEXT_DIR holds `.txt` or `.txt.xz` files whose documents each end with a line
`<|endoftext|>`. OUT_DIR then loads with `AutoTokenizer.from_pretrained`.
"""

import argparse
import functools
import hashlib
import json
import lzma
import multiprocessing
import os
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

EOS = "<|endoftext|>"  # id 0: ends a document and an answer
PAD = "<|pad|>"  # id 1: its own entry, so that padding never looks like an ending


T = TypeVar("T")


def text_files(folder: Path) -> list[Path]:
    """The folder's text files in a fixed order; raises if there are none."""
    files = sorted(p for p in folder.iterdir() if p.name.endswith((".txt", ".txt.xz")))
    if not files:
        raise SystemExit(f"{folder}: found no .txt or .txt.xz file, wanted at least one.")
    return files


def documents(files: list[Path]) -> Iterator[str]:
    """Every document of the files, in order, without its separator line."""
    for path in files:
        opener = lzma.open if path.suffix == ".xz" else open
        # newline="\n": carriage returns inside a document are text, not line ends.
        with opener(path, "rt", encoding="utf-8", newline="\n") as lines:
            document: list[str] = []
            for line in lines:
                if line.rstrip("\n") != EOS:
                    document.append(line)
                    continue
                if text := "".join(document).strip("\n"):
                    yield text
                document = []
            if text := "".join(document).strip("\n"):
                yield text


def sample(files: list[Path], every: int) -> Iterator[str]:
    """Every n-th document: an even sample of all sources, in bounded memory."""
    for i, text in enumerate(documents(files)):
        if i % every == 0:
            yield text


def train(texts: Iterator[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text round-trips exactly, and no token is ever unknown."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            # One token a digit: a small model sees too few numbers to learn them whole.
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=max_length,
        padding_side="left",  # generation continues from the right end
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],  # Llama takes no segment ids
    )


def save(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save compactly, under the class name that every transformers release knows."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"  # releases from 5 write another
    for machine_specific in ("backend", "is_local", "local_files_only"):
        config.pop(machine_specific, None)
    path.write_text(json.dumps(config, indent=2) + "\n")


@functools.cache
def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """A tokenizer that can be trained with; raises if it lacks what that needs."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if len(tokenizer) > 2**16 or tokenizer.eos_token_id is None or tokenizer.pad_token_id is None:
        raise SystemExit(
            f"{folder}: {len(tokenizer)} tokens, end {tokenizer.eos_token}, padding "
            f"{tokenizer.pad_token}; wanted both, and at most {2**16} tokens, to store uint16."
        )
    return tokenizer


def batched(items: Iterable[T], size: int) -> Iterator[tuple[T, ...]]:
    """Tuples of `size` items, the last one shorter."""
    items = iter(items)
    while batch := tuple(islice(items, size)):
        yield batch


def encode(texts: tuple[str, ...], folder: Path) -> list[np.ndarray]:
    """Token ids of each document, with the end-of-text id after it; runs in a worker."""
    tokenizer = load_tokenizer(folder)
    encodings = tokenizer.backend_tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    return [np.array([*e.ids, tokenizer.eos_token_id], dtype=np.uint16) for e in encodings]


def tokenise(
    text: Path, tokenizer: Path, cache: Path, *, held_out: float
) -> tuple[np.ndarray, np.ndarray]:
    """Training and held-out tokens, memory-mapped; the last documents are held out.

    The cache's name hashes the tokenizer and the text files' names and sizes, so
    that a change of either tokenises anew.
    """
    files = text_files(text)
    key = hashlib.sha256((tokenizer / "tokenizer.json").read_bytes())
    key.update(repr([(p.name, p.stat().st_size) for p in files]).encode())
    path = cache / f"tokens-{key.hexdigest()[:12]}.u16"
    ends_path = path.with_suffix(".ends.npy")
    if not ends_path.exists():  # written last
        cache.mkdir(parents=True, exist_ok=True)
        lengths: list[int] = []
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process a core instead
        job = functools.partial(encode, folder=tokenizer)
        with multiprocessing.Pool() as pool, path.open("wb") as out:
            for encoded in pool.imap(job, batched(documents(files), 64)):
                np.concatenate(encoded).tofile(out)
                lengths.extend(map(len, encoded))
        np.save(ends_path, np.cumsum(lengths))
    ends = np.load(ends_path)
    tokens = np.memmap(path, dtype=np.uint16, mode="r")
    kept = len(ends) - max(1, round(held_out * len(ends)))
    if kept < 1:
        raise SystemExit(f"{text}: {len(ends)} documents are too few to hold any out.")
    return tokens[: ends[kept - 1]], tokens[ends[kept - 1] :]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path, help="folder of .txt or .txt.xz files")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--vocab-size", type=int, default=8192, help="specials included")
    parser.add_argument("--max-length", type=int, default=1024, help="tokens the model reads")
    parser.add_argument("--every", type=int, default=5, help="learn from every n-th document")
    args = parser.parse_args()
    tokenizer = train(sample(text_files(args.text), args.every), args.vocab_size, args.max_length)
    save(tokenizer, args.out)
    print(f"{args.out}: {len(tokenizer)} tokens")


if __name__ == "__main__":
    main()
