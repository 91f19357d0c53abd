"""Writing: whole or not at all, whoever else writes, and whatever a dead writer left."""

import ctypes
import os
import shutil
from pathlib import Path
from threading import Thread

import pytest

from phatgoose.errors import ConfigError
from phatgoose.files import PARTIAL, new_folder, publish, sweep, write_bytes
from phatgoose.locks import claimed, lock
from tests.crash.dying import DEAD, DONE, in_child


def texts(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


def fill(partial, text="new"):
    (partial / "a").write_text(text)
    (partial / "b").write_text(text)


def test_a_file_has_the_mode_that_the_user_wants(tmp_path):
    for mask, mode in ((0o022, 0o644), (0o077, 0o600)):
        before = os.umask(mask)
        try:
            write_bytes(tmp_path / "x", b"x")
        finally:
            os.umask(before)
        assert (tmp_path / "x").stat().st_mode & 0o777 == mode


@pytest.mark.parametrize("name", ["x" * 250, "é" * 120])
def test_names_as_long_as_they_may_be(name, tmp_path):
    write_bytes(tmp_path / name, b"x")
    assert texts(tmp_path) == {name: "x"}


def test_a_new_folder_is_the_first_writers(tmp_path):
    folder = tmp_path / "e"
    with pytest.raises(ConfigError, match="another process"), new_folder(folder) as second:
        fill(second, "second")
        with new_folder(folder) as first:
            fill(first, "first")
    assert texts(folder) == {"a": "first", "b": "first"}
    assert [path.name for path in tmp_path.iterdir()] == ["e"]


def test_an_empty_folder_may_be_there(tmp_path):
    (tmp_path / "e").mkdir()
    with new_folder(tmp_path / "e") as partial:
        fill(partial)
    assert texts(tmp_path / "e") == {"a": "new", "b": "new"}


@pytest.mark.parametrize("swaps", [True, False])
def test_a_folder_is_replaced_whole(swaps, tmp_path, monkeypatch):
    """In one step on Linux; elsewhere by way of another name."""
    if not swaps:
        monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: object())
    folder = tmp_path / "e"
    folder.mkdir()
    (folder / "old").write_text("old")
    with new_folder(folder, replace=True) as partial:
        fill(partial)
        assert texts(folder) == {"old": "old"}
    assert texts(folder) == {"a": "new", "b": "new"}
    assert [path.name for path in tmp_path.iterdir()] == ["e"]


def test_what_a_link_leads_to_is_replaced(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "e").symlink_to(tmp_path / "far")
    with new_folder(tmp_path / "e", replace=True) as partial:
        fill(partial)
    assert (tmp_path / "e").is_symlink()
    assert texts(tmp_path / "far") == {"a": "new", "b": "new"}


def test_the_folder_we_are_in_stays_the_one_it_is(tmp_path, monkeypatch):
    (tmp_path / "e").mkdir()
    monkeypatch.chdir(tmp_path / "e")
    (tmp_path / "e" / "a").write_text("old")
    with new_folder(Path("."), replace=True) as partial:
        fill(partial)
    assert texts(Path(".")) == {"a": "new", "b": "new"}
    assert os.path.samefile(".", tmp_path / "e")


def test_only_what_the_dead_left_is_swept(tmp_path):
    (tmp_path / f".file.1{PARTIAL}").write_text("half")
    (tmp_path / f".folder.2{PARTIAL}").mkdir()
    fill(tmp_path / f".folder.2{PARTIAL}")
    (tmp_path / f"seen{PARTIAL}").write_text("a user's")
    (tmp_path / ".hidden").write_text("a user's")
    (tmp_path / f".link{PARTIAL}").symlink_to(tmp_path / ".hidden")
    os.mkfifo(tmp_path / f".pipe{PARTIAL}")
    living = [tmp_path / f".file.3{PARTIAL}", tmp_path / f".folder.4{PARTIAL}"]
    living[0].write_text("half")
    living[1].mkdir()
    held = [os.open(path, os.O_RDONLY) for path in living]
    assert all(lock(descriptor) for descriptor in held)
    sweep(tmp_path)
    kept = {f"seen{PARTIAL}", ".hidden", f".link{PARTIAL}", f".pipe{PARTIAL}"}
    assert {path.name for path in tmp_path.iterdir()} == kept | {path.name for path in living}
    for descriptor in held:
        os.close(descriptor)
    sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == kept


def test_a_writer_sweeps_what_a_killed_one_left(tmp_path):
    for act in (lambda f: write_bytes(f / "x", b"1"), lambda f: _new(f / "e")):
        for at in (4, 5, 6):
            assert in_child(act, tmp_path, tmp_path / "log", at=at) == DEAD
    assert any(path.name.endswith(PARTIAL) for path in tmp_path.iterdir())
    write_bytes(tmp_path / "y", b"2")
    assert texts(tmp_path)["y"] == "2"
    assert not any(path.name.endswith(PARTIAL) for path in tmp_path.iterdir())


def _new(folder):
    with new_folder(folder) as partial:
        fill(partial)


def test_publish_puts_a_folder_in_its_place(tmp_path):
    (tmp_path / "work" / "e").mkdir(parents=True)
    fill(tmp_path / "work" / "e")
    publish(tmp_path / "work" / "e", tmp_path / "e")
    (tmp_path / "work" / "e").mkdir()
    fill(tmp_path / "work" / "e", "other")
    with pytest.raises(ConfigError, match="another process"):
        publish(tmp_path / "work" / "e", tmp_path / "e")
    assert texts(tmp_path / "e") == {"a": "new", "b": "new"}


def test_a_claim_is_one_writers(tmp_path):
    path = tmp_path / "new" / "lock"
    with claimed(path, "the task"):
        assert path.exists()
        with (
            pytest.raises(ConfigError, match="the task: another process"),
            claimed(path, "the task"),
        ):
            pass
        code = in_child(lambda _: _claim(path), tmp_path, tmp_path / "log")
        assert code != DONE and "another process" in (tmp_path / "log").read_text()
    assert not path.exists()
    assert in_child(lambda _: _claim(path), tmp_path, tmp_path / "log") == DONE


def test_a_claim_may_wait(tmp_path):
    path, order = tmp_path / "lock", []

    def second():
        with claimed(path, "the task", wait=True):
            order.append("second")

    thread = Thread(target=second)
    with claimed(path, "the task"):
        thread.start()
        thread.join(0.1)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"] and not path.exists()


def test_a_claim_ends_with_its_process(tmp_path):
    path = tmp_path / "lock"
    assert in_child(lambda _: _claim(path, die=True), tmp_path, tmp_path / "log") == DEAD
    assert path.exists()
    with claimed(path, "the task"):
        pass
    assert not path.exists()


def test_a_claim_may_go_with_its_folder(tmp_path):
    with claimed(tmp_path / "work" / "lock", "the task"):
        shutil.rmtree(tmp_path / "work")
    assert not (tmp_path / "work").exists()


def test_where_there_are_no_locks_a_claim_warns(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("phatgoose.locks.lock", lambda descriptor, **_: None)
    with claimed(tmp_path / "lock", "the task"):
        assert "the task" in caplog.text and "no locks" in caplog.text


def _claim(path, *, die=False):
    with claimed(path, "the task"):
        if die:
            os._exit(DEAD)
