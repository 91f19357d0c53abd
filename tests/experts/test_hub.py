"""The Hub, with its client replaced: nothing here touches a network."""

import shutil
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from phatgoose.errors import ExpertNotFoundError
from phatgoose.experts import load_expert
from phatgoose.experts.hub import files, locate, push, signature_files
from phatgoose.experts.signatures import KINDS, vectors_hash

OTHERS = ["adapter_model.bin", "training_args.bin", "optimizer.pt", "model.pkl", "run.py"]


@pytest.fixture
def hub(monkeypatch, expert_dir, tmp_path):
    """A Hub with one repository, which also holds pickles; its calls are recorded."""
    calls = []

    def snapshot_download(repo_id, *, revision=None, allow_patterns=None, local_dir=None):
        calls.append({"repo_id": repo_id, "revision": revision, "local_dir": local_dir})
        for name in OTHERS:
            (expert_dir / name).write_bytes(b"\x80\x04.")
        target = Path(local_dir or tmp_path / "cache")
        target.mkdir(exist_ok=True)
        for path in expert_dir.iterdir():
            if any(fnmatch(path.name, pattern) for pattern in allow_patterns):
                shutil.copy(path, target)
        return str(target)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


@pytest.fixture
def failing_hub(monkeypatch):
    """failing_hub(error): a Hub that answers every download with this error."""

    def fail(error):
        def snapshot_download(*_, **__):
            raise error

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)

    return fail


def http_error(text):
    """The client's own HTTP error, without the response that would need its HTTP library."""
    error = HfHubHTTPError.__new__(HfHubHTTPError)
    error.args = (text,)
    return error


def test_only_the_files_of_an_expert_are_downloaded(hub, expert, expert_dir):
    found = load_expert("owner/name")
    there = {path.name for path in expert_dir.iterdir()}
    assert {path.name for path in found.folder.iterdir()} == there & set(files())
    assert there > there & set(files())  # the pickles
    assert found.name == "owner/name"
    assert set(found.modules) == set(expert.modules)
    assert found.gates.record == expert.gates.record
    assert hub == [{"repo_id": "owner/name", "revision": None, "local_dir": None}]


def test_no_pattern_lets_a_pickle_or_code_through():
    assert not [name for name in OTHERS for pattern in files() if fnmatch(name, pattern)]


def test_a_revision_is_passed_on(hub, tmp_path):
    target = tmp_path / "target"
    assert locate("owner/na.me-1@refs/pr/1", local_dir=target) == target
    assert hub == [{"repo_id": "owner/na.me-1", "revision": "refs/pr/1", "local_dir": target}]
    assert load_expert("owner/na.me-1@v1").name == "owner/na.me-1"


def test_a_local_folder_wins(hub, expert_dir, monkeypatch):
    (expert_dir.parent / "owner").mkdir()
    shutil.copytree(expert_dir, expert_dir.parent / "owner" / "name")
    monkeypatch.chdir(expert_dir.parent)
    assert load_expert("owner/name").name == "name"
    assert load_expert(Path("owner/name"), name="mine").name == "mine"
    assert hub == []


@pytest.mark.parametrize(
    "text",
    ["", "name", "a/b/c", "/a/b", "./a", "../a/b", "~/a", "a b/c", "a/b@", "-a/b", "a/b\n", "a\0b"],
)
def test_what_is_no_hub_id_is_not_asked_for(text, hub, monkeypatch, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    if text == "":  # "" is the current folder to pathlib, and no expert either way
        with pytest.raises(ExpertNotFoundError):
            locate(text)
    else:
        with pytest.raises(ExpertNotFoundError, match="not a Hub id"):
            locate(text)
    assert hub == []


def test_names_too_long_for_a_file_system(hub):
    with pytest.raises(ExpertNotFoundError, match="not a Hub id"):
        locate("x" * 5000)


def test_a_file_is_no_folder(hub, expert_dir, one_line):
    with pytest.raises(ExpertNotFoundError, match="not a folder but a file") as info:
        load_expert(expert_dir / "adapter_config.json")
    one_line(info)
    assert hub == []


@pytest.mark.parametrize(
    "error",
    [
        http_error("401 Client Error.\nRepository Not Found for url: https://hub/owner/name."),
        LocalEntryNotFoundError("Cannot find the files.\nCheck your connection."),
        HFValidationError("Cannot have -- or .. in repo_id: 'owner/name'."),
        OSError(28, "No space left on device"),
        ConnectionError(),
        next(base for base in HfHubHTTPError.__bases__)("connection lost\nmidway"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_unreachable_hub_is_one_line(error, failing_hub, one_line):
    failing_hub(error)
    with pytest.raises(ExpertNotFoundError) as info:
        load_expert("owner/name")
    text = one_line(info)
    assert text.startswith("owner/name: ") and "the Hub did not give it (" in text
    assert (str(error).splitlines() or [type(error).__name__])[0] in text


def test_other_errors_are_not_hidden(failing_hub):
    failing_hub(ZeroDivisionError("a bug"))
    with pytest.raises(ZeroDivisionError):
        load_expert("owner/name")


def test_an_id_the_hub_would_refuse(one_line):
    """The real client checks ids before it opens a connection."""
    with pytest.raises(ExpertNotFoundError, match=r"owner\.\.x/name") as info:
        locate("owner..x/name")
    one_line(info)


@pytest.fixture
def api(monkeypatch):
    calls = []

    class Api:
        failure: Exception | None = None

        def create_repo(self, repo_id, **options):
            if self.failure:
                raise self.failure
            calls.append(("create", repo_id, options))
            return f"https://huggingface.co/{repo_id}"

        def upload_folder(self, **options):
            calls.append(("upload", options.pop("repo_id"), options))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    return Api, calls


@pytest.mark.parametrize("private", [False, True])
def test_push_uploads_the_files_of_an_expert(private, api, expert_dir):
    address = push(expert_dir, "owner/name", private=private)
    create, upload = api[1]
    assert address == "https://huggingface.co/owner/name"
    assert create == ("create", "owner/name", {"private": private, "exist_ok": True})
    assert upload[:2] == ("upload", "owner/name")
    assert upload[2] == {
        "folder_path": expert_dir,
        "allow_patterns": files(),
        "delete_patterns": signature_files(),
    }


def test_every_kind_of_signature_is_pulled(hub, complete_dir, expert_dir):
    complete = load_expert(complete_dir)
    assert set(complete.signatures) >= {kind for kind in KINDS if kind != "gates"}
    shutil.rmtree(expert_dir)
    shutil.copytree(complete_dir, expert_dir)
    found = load_expert("owner/name")
    assert set(found.signatures) == set(complete.signatures)
    for kind, signatures in complete.signatures.items():
        assert vectors_hash(found.signatures[kind].vectors) == vectors_hash(signatures.vectors)


@pytest.mark.parametrize("error", [http_error("403\nForbidden"), HFValidationError("bad\nid")])
def test_a_failed_push_is_one_line(error, api, expert_dir, one_line):
    api[0].failure = error
    with pytest.raises(ExpertNotFoundError, match="did not take the upload") as info:
        push(expert_dir, "owner/name")
    assert str(error).splitlines()[0] in one_line(info)
    assert api[1] == []
