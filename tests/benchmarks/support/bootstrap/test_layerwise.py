"""Perplexity of graphs that are bootstrapped layer by layer."""

from __future__ import annotations

import pytest

from benchmarks.support.bootstrap.layerwise import MIXES, QUICK, Case, cases, perplexities, ratios


def test_a_static_selection_is_worse_than_the_router_and_the_dense_model_is_best():
    mix = next(iter(MIXES))
    dense, router, static = (
        perplexities(Case("mix7M", mix, 1, selection), QUICK["mix7M"], True)
        for selection in ("dense", "router", "static")
    )
    assert set(dense) == {"100"} and set(static) == {"50", "seconds"}
    assert dense["100"] < router["75"] < router["50"] < router["25"]
    assert dense["100"] < static["50"] and router["seconds"] > 0


def test_ratios_are_those_of_the_same_mix_and_seed():
    found = [
        (Case("m", "a", seed, name), values)
        for seed, factor in ((1, 1.0), (2, 2.0))
        for name, values in {
            "dense": {"100": 10.0 * factor},
            "router": {"75": 11.0, "50": 20.0, "25": 40.0},
            "static": {"50": 30.0 * factor},
        }.items()
    ]
    other = [(Case("other", "a", 1, "dense"), {"100": 1.0})]
    values = ratios(found + other, "m")
    assert values["ppl_75_over_dense"] == pytest.approx([1.1, 0.55])
    assert values["ppl_50_over_dense"] == pytest.approx([2, 1])
    assert values["ppl_25_over_dense"] == pytest.approx([4, 2])
    assert values["static_over_router_50"] == pytest.approx([1.5, 3])


def test_every_model_and_selection_is_measured_on_every_text():
    listed = cases(["m", "n"], [("a", 4), ("b", 5)])
    assert len(listed) == len(set(listed)) == 12
    assert [(case.mix, case.seed) for case in listed] == [("a", 4)] * 6 + [("b", 5)] * 6
    assert {case.selection for case in listed} == {"dense", "router", "static"}
