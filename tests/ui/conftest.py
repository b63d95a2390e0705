"""The page on a free port, a Mixtral of 2 layers of 4 experts with a saliency file ranked by hand, and a browser."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from gradio_client import Client
from playwright.sync_api import Browser

from benchmarks.ui.browser import CHROMIUM, opened_browser
from experts.saliency.measures import save_saliency
from tests.support.saliency_samples import saliency_of_scores
from tests.support.tiny_moes import saved_moe
from ui.serve import serving


@pytest.fixture(scope="session")
def page(tmp_path_factory, tiny_tokenizer) -> Iterator[SimpleNamespace]:
    """The server: ``address``, ``model``, ``runs``; ``saliency``: 4 > 3 > 2 > 1 in layer 0, the reverse in layer 1."""
    folder = tmp_path_factory.mktemp("page")
    model = saved_moe("mixtral", folder, tiny_tokenizer)
    save_saliency(saliency_of_scores([[4, 3, 2, 1], [1, 2, 3, 4]]), folder / "ranked.npz")
    save_saliency(saliency_of_scores([[1, 9, 5, 3], [2, 2, 7, 1]]), folder / "other.npz")
    with serving(model, folder / "runs") as address:
        yield SimpleNamespace(
            address=address,
            model=model,
            runs=folder / "runs",
            saliency=folder / "ranked.npz",
            other=folder / "other.npz",
        )


@pytest.fixture
def client(page) -> Iterator[Client]:
    """A session of the page."""
    client = Client(page.address, verbose=False)
    yield client
    client.close()


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Debian's Chromium without a window."""
    if not CHROMIUM.exists():
        pytest.skip(f"no browser: {CHROMIUM} is absent (apt-get install chromium)")
    with opened_browser() as browser:
        yield browser
