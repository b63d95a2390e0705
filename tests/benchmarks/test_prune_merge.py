from __future__ import annotations

import math

from benchmarks.prune_merge import measure
from configs.choices import Metric


def test_a_quick_run_gives_every_figure():
    measured = measure(True, lambda stage, done, total: None)
    assert set(measured.figures) == {
        "ppl_frequency_over_reap_50",
        "ppl_random_over_reap_50",
        "ppl_prune_over_merge_25",
        "reap_formula_difference",
        "saliency_time_ratio",
        "prune_peak_over_checkpoint",
    }
    assert all(value is not None and math.isfinite(value) for value in measured.figures.values())
    assert measured.figures["reap_formula_difference"] < 1e-5
    for kind in ("mixture", "graph"):
        for run in measured.peers["runs"][kind]:
            for share in ("quarter", "half"):
                assert {*Metric, "random", "merge"} <= set(run[share])
