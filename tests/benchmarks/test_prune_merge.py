from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from benchmarks.prune_merge import kept_by, measure, random_experts
from benchmarks.support.prune_peak import measure_pruning
from experts.saliency.measures import METRICS
from models.moe.saliency_collection import collect_saliency
from tests.support.tiny_graphs import random_ids
from tests.support.tiny_moes import saved_moe, tiny_moe


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
                assert {*METRICS, "random", "merge"} <= set(run[share])


@pytest.mark.parametrize("share", [2, 4])
def test_as_many_experts_stay_by_saliency_as_at_random(share):
    moe = tiny_moe("mixtral")
    saliency = collect_saliency(moe, [(random_ids(moe, 2, 10), torch.ones(2, 10, dtype=torch.bool))])
    for keep_map in (
        kept_by(saliency, "freq", share),
        random_experts(saliency, share, np.random.default_rng(0)),
    ):
        assert [len(np.unique(kept)) for kept in keep_map.values()] == [4 - 4 // share] * 2


def test_memory_of_pruning_is_measured(tmp_path, tiny_tokenizer):
    found = measure_pruning(saved_moe("mixtral", tmp_path, tiny_tokenizer), tmp_path / "out", 2)
    assert 0 < found["bytes_after"] < found["bytes_before"] and found["peak_bytes"] >= 0
