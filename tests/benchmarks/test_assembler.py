from __future__ import annotations

import math

import pytest

from benchmarks.assembler import ARMS, QUICK, choose_masks, client_text, measure, ratios
from benchmarks.support.material import bootstrapped, data_sources, model_path


def test_a_quick_run_gives_every_figure():
    measured = measure(True, lambda stage, done, total: None)
    assert set(measured.figures) == {"ppl_random_over_learned", "ppl_usage_over_learned"}
    assert all(value is not None and math.isfinite(value) for value in measured.figures.values())
    (runs,) = measured.peers["runs"].values()
    assert [each["seed"] for each in runs] == [0, 1]
    assert all(set(client) == set(ARMS) for each in runs for client in each["clients"].values())


def test_all_masks_hold_as_many_experts_and_the_most_used_are_in_that_of_usage():
    model = bootstrapped(model_path("mix7M", quick=True), QUICK.experts, QUICK.calibration_tokens)
    train, _ = client_text(data_sources(["a"], quick=True)[0], QUICK, 0, True)
    masks = choose_masks(model, train, 2, 0, QUICK.training)
    assert set(masks) == {"learned", "usage", "random"}
    assert all(int(held.sum()) == 2 for layers in masks.values() for held in layers)


def test_a_ratio_is_the_geometric_mean_over_clients():
    def client(learned: float, usage: float) -> dict:
        return {"learned": {"after": learned}, "usage": {"after": usage}}

    seeds = [{"clients": {"a": client(10, 20), "b": client(5, 40)}}, {"clients": {"a": client(4, 2)}}]
    assert ratios(seeds, "usage") == pytest.approx([4.0, 0.5])
