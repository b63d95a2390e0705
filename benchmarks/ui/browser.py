"""Debian's Chromium without a window, driven by playwright."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

from configs.errors import UserError

CHROMIUM = Path("/usr/bin/chromium")
_FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)


@contextmanager
def opened_browser() -> Iterator[Browser]:
    """A browser for the duration of a ``with`` block.

    Raises:
        UserError: Chromium is not installed.
    """
    if not CHROMIUM.exists():
        raise UserError(
            f"expected a browser, found no {CHROMIUM}; install it with `apt-get install chromium`"
        )
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=_FLAGS.split())
        try:
            yield browser
        finally:
            browser.close()
