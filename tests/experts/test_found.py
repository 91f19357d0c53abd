"""Folders as they are found are right against PEFT, or refused with their cause; see `found`."""

import pytest
import torch

from tests.experts import found
from tests.experts.found import HARMLESS, REFUSED, Refused, World, config, is_right, spoiled

FOLDERS = 2 * max(len(HARMLESS), len(REFUSED))  # each change once; make found takes 200


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("found"))


@pytest.mark.parametrize("number", range(FOLDERS))
def test_a_found_folder(number, world):
    verdict = world.judge(number)
    assert is_right(verdict), verdict


def test_every_change_is_made(world):
    harmless, refused = sorted(HARMLESS), sorted(REFUSED)
    made = {harmless[n // 2 % len(harmless)] for n in range(0, FOLDERS, 2)}
    assert made == set(harmless)
    assert {refused[n // 2 % len(refused)] for n in range(1, FOLDERS, 2)} == set(refused)


@pytest.mark.parametrize(
    ("change", "number"), [(config(lora_alpha=99, alpha_pattern={}), 0), (spoiled(30.0), 2)]
)
def test_what_would_be_silently_wrong_is_seen(change, number, world, monkeypatch):
    """A change that alters what the adapter computes is no harmless one."""
    monkeypatch.setattr(found, "HARMLESS", dict.fromkeys(HARMLESS, change))
    verdict = world.judge(number)
    assert verdict.difference is not None and not is_right(verdict)


def test_a_wrong_cause_is_seen(world, monkeypatch):
    sound = REFUSED["NaN"].change
    monkeypatch.setattr(found, "REFUSED", {"NaN": Refused(sound, "its rank is odd")})
    assert not is_right(world.judge(1))
    monkeypatch.setattr(found, "REFUSED", {"fine": Refused(lambda folder, _: None, "anything")})
    assert not is_right(world.judge(1))


def test_dtypes_vary():
    assert set(found.DTYPES) >= {torch.float8_e4m3fn, torch.float64, torch.bfloat16}
