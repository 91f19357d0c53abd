"""A browser, where Chromium and playwright are installed."""

import shutil
from contextlib import contextmanager

import pytest

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
PHONE = {"width": 375, "height": 720}
DESK = {"width": 1280, "height": 800}


@contextmanager
def browsing():
    """Chromium without a window; skips the test where there is none.

    No test may run its own event loop meanwhile.
    """
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if found is None:
        pytest.skip("Chromium is not installed: apt-get install chromium")
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=found)
        yield chromium
        chromium.close()


@contextmanager
def opened(chromium, url, **settings):
    """A page, which must not complain of anything: scripts that fail or are refused show here."""
    context = chromium.new_context(**{"viewport": DESK, **settings})
    context.set_default_timeout(30_000)
    page = context.new_page()
    complaints = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: (complaints.append(dialog.message), dialog.dismiss()))
    page.on(
        "console",
        lambda said: (
            # What the server refuses, and that it is gone, Chromium notes too; the page tells it.
            complaints.append(said.text)
            if said.type == "error" and "Failed to load resource" not in said.text
            else None
        ),
    )
    page.goto(f"{url}/pool")
    yield page
    context.close()
    assert not complaints
