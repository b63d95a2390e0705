"""Caps on what one client claims, relative to the median over the clients of a round."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def untrusted(clients: int) -> int:
    """Number of largest values, of one per client, that must not decide alone: a fifth, at least one of three."""
    return max(1, clients // 5) if clients > 2 else 0


def capped(values: Sequence[float], multiple: float) -> list[float]:
    """Each value, at most ``multiple`` times the lower median of all (0: no cap).

    The lower of the two middle values is taken for an even number of clients, so that one of two cannot raise its own
    cap; fewer than half of the clients cannot raise it above what an honest client has.
    """
    if not multiple or not values:
        return list(values)
    most = multiple * statistics.median_low(values)
    return [min(value, most) for value in values]
