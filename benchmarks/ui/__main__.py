"""Response times of the web page in Chromium, for saliency of 61 layers of 128 experts.

``first_drawn_seconds`` is the time from choosing the file to the drawn heat map: upload, reading, ranking and drawing.
``filter_change_seconds`` is that from a new number of experts to remove to the redrawn one, and ``page_seconds`` that
from the address to the form. All are medians, measured from outside of the browser, with the server on the same
machine.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from playwright.sync_api import Browser, Page

from benchmarks.support.runner import Measured, OnStep, run_benchmark
from benchmarks.ui.browser import opened_browser
from experts.saliency.measures import Saliency, save_saliency
from ui.serve import serving

FULL, QUICK = (61, 128), (4, 8)
_REPETITIONS, _CHANGES = 5, 10
_PRUNED = "(document.querySelector('#experts-map [data-marks]')?.dataset.marks ?? '').split('p').length - 1"
_DRAWN = "(document.querySelector('#experts-map [data-marks]')?.dataset.marks ?? '').length"


def measure(quick: bool, on_step: OnStep) -> Measured:
    """Measure page, first drawing and changes of a filter.

    Args:
        quick: use a small table, once.
        on_step: called with the stage, the number of steps done and their total.
    """
    shape, repetitions = (QUICK, 1) if quick else (FULL, _REPETITIONS)
    times: dict[str, list[float]] = {"page": [], "first_drawn": [], "filter_change": []}
    with TemporaryDirectory(prefix="fedgraft-") as name:
        folder = Path(name)
        save_saliency(random_saliency(shape), folder / "saliency.npz")
        with serving(None, folder / "runs") as address, opened_browser() as browser:
            for done in range(repetitions):
                for key, found in _visit(browser, address, folder / "saliency.npz", shape).items():
                    times[key] += found
                on_step("visits", done + 1, repetitions)
    figures = {f"{key}_seconds": statistics.median(found) for key, found in times.items()}
    return Measured(figures, {"shape": list(shape), "seconds": times})


def random_saliency(shape: tuple[int, int]) -> Saliency:
    """Random saliency ``[L, E]`` of a fixed seed."""
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 10_000, shape).astype(float)
    sums = [counts * rng.uniform(0.1, 2.0, shape) for _ in range(3)]
    return Saliency(sums[0], counts, sums[1], counts, sums[2], list(range(shape[0])))


def _visit(browser: Browser, address: str, file: Path, shape: tuple[int, int]) -> dict[str, list[float]]:
    """Times in seconds of one visit: page, first drawing, and changes of the number of experts."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    try:
        opened = _seconds(lambda: _open(page, address))
        drawn = _seconds(lambda: _load(page, file, shape[0] * shape[1]))
        numbers = [1 + number % (shape[1] - 2) for number in range(_CHANGES)]
        changes = [_seconds(partial(_change, page, number, shape[0])) for number in numbers]
    finally:
        page.close()
    return {"page": [opened], "first_drawn": [drawn], "filter_change": changes}


def _open(page: Page, address: str) -> None:
    page.goto(address)
    page.wait_for_selector("input[type=file]", state="attached")


def _load(page: Page, file: Path, cells: int) -> None:
    page.locator("input[type=file]").first.set_input_files(str(file))
    page.wait_for_function(f"{_DRAWN} === {cells}")


def _change(page: Page, number: int, layers: int) -> None:
    page.get_by_label("Experts to remove").fill(str(number))
    page.wait_for_function(f"{_PRUNED} === {number * layers}")


def _seconds(act: Callable[[], None]) -> float:
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


if __name__ == "__main__":
    run_benchmark("ui", measure)
