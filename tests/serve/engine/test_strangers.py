"""What strangers put into files and requests does not come out as they wrote it."""

import json
import logging

import pytest
import torch
from safetensors.torch import save_file

from phatgoose.errors import PhatgooseError
from phatgoose.experts import load_expert
from phatgoose.serve.engine.runner import _failed

ESCAPES = "\x1b]0;owned\x07\x1b[2K\r\nCRITICAL fake line \u202e\x9b"


def shows_nothing(text):
    """One line, without what a terminal obeys."""
    return text.isprintable()


@pytest.mark.parametrize("error", [PhatgooseError, ValueError, KeyError])
def test_a_workers_log_has_no_line_of_a_strangers(error, caplog):
    try:
        raise error(f"x: {ESCAPES}")
    except error as raised:
        answer = _failed(raised)
    assert shows_nothing(caplog.records[0].getMessage())
    assert "fake line" in caplog.records[0].getMessage()
    assert all(record.exc_info is None for record in caplog.records)
    # Where it was raised is told all the same, of an error that nobody expected.
    assert ("test_strangers.py" in caplog.text) == (error is not PhatgooseError)
    assert "\nCRITICAL" not in caplog.text and "\x1b" not in caplog.text
    assert shows_nothing(answer["error"])


def test_an_adapter_with_such_a_tensor(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file({ESCAPES: torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(PhatgooseError) as caught:
        load_expert(tmp_path)
    _failed(caught.value)
    assert shows_nothing(caplog.records[0].getMessage())
