"""Choice of the power of two that scales the router rows of an exported mixture."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

LEAST, MOST = 0, 30
_STEP = 2
# Improvements of the divergence below this number of nats are noise of fp32.
_NOISE = 1e-9


def choose_exponent(divergence: Callable[[int], float], start: int) -> int:
    """Exponent ``n`` of a local minimum of the divergence of a model whose router rows are scaled by ``2 ** -n``.

    Large rows weight the experts of a token unequally; small ones make equal numbers of different shares of a softmax
    in fp32, so that others are chosen. In between the divergence has one minimum.

    Args:
        divergence: mean divergence at an exponent.
        start: exponent that the search starts from.
    """
    measured = cache(divergence)
    best = start
    for step in (-_STEP, _STEP):
        while LEAST <= best + step <= MOST and measured(best + step) < measured(best) - _NOISE:
            best += step
    return best
