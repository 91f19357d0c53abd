"""A server that was told to stop is known from one that stopped by itself."""

import os
import signal

import pytest

from phatgoose.serve.http import signals

LISTEN = signals.listen  # the tests beside this one do without


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_noted_and_does_what_it_did(number, monkeypatch):
    monkeypatch.setattr(signals, "_received", [])
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    came = []
    try:
        for n in before:
            signal.signal(n, lambda found, frame: came.append(found))
        LISTEN()
        assert not signals.to_stop()
        os.kill(os.getpid(), number)
        assert signals.to_stop()
        assert came == [number]
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)
