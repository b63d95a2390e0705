from __future__ import annotations

import pytest

from benchmarks.ui.__main__ import measure, random_saliency
from benchmarks.ui.browser import CHROMIUM


@pytest.mark.skipif(not CHROMIUM.exists(), reason=f"no browser: {CHROMIUM} is absent")
def test_a_quick_run_gives_every_figure():
    measured = measure(True, lambda stage, done, total: None)
    assert set(measured.figures) == {"page_seconds", "first_drawn_seconds", "filter_change_seconds"}
    assert all(0 < value < 60 for value in measured.figures.values())
    assert len(measured.peers["seconds"]["filter_change"]) == 10


def test_the_saliency_has_the_shape_asked_for():
    assert random_saliency((3, 5)).experts_per_layer == [5, 5, 5]
