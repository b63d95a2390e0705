from __future__ import annotations

from benchmarks.scale.large_units import UNIT, large_rounds
from benchmarks.scale.predictions import LLAMA_2_7B


def test_an_expert_is_that_of_llama():
    assert UNIT * LLAMA_2_7B.layers * LLAMA_2_7B.experts == LLAMA_2_7B.weights


def test_the_parts_of_a_round_are_timed():
    rounds = large_rounds(2, 3, unit_size=20_000)
    assert [load.density for load, _ in rounds] == [0.006, 0.05]
    for load, seconds in rounds:
        assert (load.weights, load.units, load.used) == (40_000, 2, 3)
        assert seconds.keys() == {"check", "aggregate", "pack"} and min(seconds.values()) > 0
