"""The Hub, with its client replaced: nothing here touches a network."""

import shutil
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from phatgoose.errors import ExpertNotFoundError, UnsupportedAdapterError
from phatgoose.experts import load_expert
from phatgoose.experts.hub import HubId, files, locate, pull, push, signature_files
from phatgoose.experts.signatures import KINDS, vectors_hash
from phatgoose.experts.sources import hub_name

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
        for path in expert_dir.rglob("*"):
            name = path.relative_to(expert_dir).as_posix()
            if path.is_file() and any(fnmatch(name, pattern) for pattern in allow_patterns):
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target / name)
        return str(target)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


@pytest.fixture
def listing(monkeypatch):
    """listing(name, ...): the files that the Hub says a repository has."""

    def lists(*names):
        api = type("Api", (), {"list_repo_files": lambda self, *_, **__: list(names)})
        monkeypatch.setattr(huggingface_hub, "HfApi", api)

    return lists


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


def test_a_folder_of_a_repository(hub, expert, expert_dir):
    """Only its files are downloaded, at that revision, and it is called by all of its id."""
    for name in ("law", "law/civil", "code"):
        (expert_dir / name).mkdir()
        for path in expert_dir.iterdir():
            if path.is_file():
                shutil.copy(path, expert_dir / name)
    found = load_expert("owner/name/law/civil@v1")
    assert found.name == "owner/name/law/civil"
    assert found.folder.parts[-2:] == ("law", "civil")
    assert {path.name for path in found.folder.iterdir()} <= set(files())
    top = found.folder.parent.parent
    assert {p.parent for p in top.rglob("*") if p.is_file()} == {found.folder}
    assert [call["revision"] for call in hub] == ["v1"]
    assert set(found.modules) == set(expert.modules)


@pytest.mark.parametrize(
    ("hub_id", "name"),
    [
        ("owner/name@v1", "owner/name"),
        ("owner/name/law", "owner/name/law"),
        ("owner/name/law/checkpoint-500@v1", "owner/name/law"),
        ("owner/name/checkpoint-500", "owner/name"),
        ("owner/checkpoint-500", "owner/checkpoint-500"),
    ],
)
def test_names_of_hub_ids(hub_id, name):
    assert hub_name(hub_id) == name
    assert HubId.parse(hub_id).repository == "/".join(hub_id.partition("@")[0].split("/")[:2])


def test_a_pull_of_a_folder_is_flat(hub, expert, expert_dir, tmp_path):
    sub = expert_dir / "law"
    shutil.copytree(expert_dir, tmp_path / "copy")
    shutil.copytree(tmp_path / "copy", sub)
    out = pull("owner/name/law", tmp_path / "pulled")
    assert {path.name for path in out.iterdir()} == {p.name for p in sub.iterdir()} & set(files())
    assert set(load_expert(out).modules) == set(expert.modules)


def test_a_repository_with_a_pickle_alone(hub, expert_dir, listing, one_line):
    (expert_dir / "adapter_model.safetensors").unlink()
    listing("README.md", "adapter_config.json", "adapter_model.bin")
    with pytest.raises(
        UnsupportedAdapterError, match=r"owner/name: has adapter_model\.bin"
    ) as info:
        load_expert("owner/name")
    assert "experts convert owner/name --out FOLDER --bin" in one_line(info)


def test_a_pickle_alone_may_be_why_without_a_network(hub, expert_dir, one_line):
    """Nothing can be listed here, since tests are offline."""
    (expert_dir / "adapter_model.safetensors").unlink()
    with pytest.raises(ExpertNotFoundError, match=r"may have adapter_model\.bin") as info:
        load_expert("owner/name")
    one_line(info)


def test_a_repository_without_an_adapter_says_what_it_has(hub, expert_dir, listing, one_line):
    for path in expert_dir.iterdir():
        path.unlink()
    listing("law/adapter_config.json", "config.json", "model.safetensors")
    with pytest.raises(ExpertNotFoundError, match="it is no adapter.*law/adapter_config") as info:
        load_expert("owner/name")
    one_line(info)


def test_a_local_folder_wins(hub, expert_dir, monkeypatch):
    (expert_dir.parent / "owner").mkdir()
    shutil.copytree(expert_dir, expert_dir.parent / "owner" / "name")
    monkeypatch.chdir(expert_dir.parent)
    assert load_expert("owner/name").name == "name"
    assert load_expert(Path("owner/name"), name="mine").name == "mine"
    assert hub == []


BAD_FOLDERS = [
    *("a/b/", "a/b//c", "a/b/..", "a/b/../c", "a/b/c/../../..", "a/b/.git", "a/b/c.", "a/b/ c"),
    *("a/b/*", "a/b/c?", "a/b/[c]", "a/b/c\\d", "a/b/C:", "a/b/c=d", "a/b/c\n", "a/b/\u202ec"),
    *("a/b/c@", "a/b/c@../d", "a/b@main/c/..", "a/b@v1@v2", "a/b/c@d@e"),
]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "name",
        *BAD_FOLDERS,
        "/a/b",
        "./a",
        "../a/b",
        "~/a",
        "a b/c",
        "a/b@",
        "-a/b",
        "a/b\n",
        "a\0b",
    ],
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
        "path_in_repo": None,
        "revision": None,
        "allow_patterns": files(),
        "delete_patterns": signature_files(),
    }


def test_push_into_a_folder(api, expert_dir):
    push(expert_dir, "owner/name/law@draft")
    create, upload = api[1]
    assert create[1] == upload[1] == "owner/name"
    assert upload[2]["path_in_repo"] == "law" and upload[2]["revision"] == "draft"


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
