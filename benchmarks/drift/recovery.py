"""Rounds, at equal uplink bytes, until a loss has fallen by a given share."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

SHARE = 0.9  # of the final decrease without growth


def target_loss(losses: Sequence[float], share: float = SHARE) -> float:
    """Loss after ``share`` of the decrease from the first to the last of ``losses``."""
    return losses[0] - share * (losses[0] - losses[-1])


def equal_byte_rounds(bytes_up: Sequence[int], bytes_per_round: float) -> list[float]:
    """Cumulative uplink before each round and after the last, in rounds of ``bytes_per_round`` each."""
    total, found = 0, [0.0]
    for each in bytes_up:
        total += each
        found.append(total / bytes_per_round)
    return found


def first_crossing(positions: Sequence[float], losses: Sequence[float], target: float) -> float | None:
    """Position at which the losses, linear in between, first fall to ``target``; None where they do not.

    Args:
        positions: rising.
        losses: one per position.
        target: loss to reach.
    """
    if losses[0] <= target:
        return positions[0]
    for (start, above), (end, below) in pairwise(zip(positions, losses, strict=True)):
        if below <= target:
            return start + (end - start) * (above - target) / (above - below)
    return None
