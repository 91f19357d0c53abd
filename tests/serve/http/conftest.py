import pytest

from phatgoose.serve.http import access, signals


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Nothing of the machine's own; signals are left to pytest."""
    for name in (access.ADMIN_KEY, access.EXPERTS_ROOT, access.ALLOW_HUB, access.API_KEY):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv(access.DRAIN_SECONDS, raising=False)
    monkeypatch.delenv(access.ALLOW_NO_KEY, raising=False)
    monkeypatch.setattr(signals, "listen", lambda: None)


@pytest.fixture(scope="session")
def anyio_backend():
    """For the tests marked anyio: starlette brings its plugin for pytest along."""
    return "asyncio"
