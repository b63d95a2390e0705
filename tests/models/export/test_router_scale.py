from __future__ import annotations

import pytest

from models.export.router_scale import MOST, choose_exponent


@pytest.mark.parametrize("best", [0, 4, 10, 12, 18, MOST])
def test_the_minimum_is_found_from_either_side(best):
    tried = []

    def divergence(exponent):
        tried.append(exponent)
        return abs(exponent - best) + 1.0

    assert choose_exponent(divergence, 10) == best
    assert len(tried) == len(set(tried))


def test_noise_does_not_move_the_choice():
    assert choose_exponent(lambda exponent: 1e-12 * (30 - exponent), 20) == 20
