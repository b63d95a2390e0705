"""Systematic sampling without replacement, with inclusion probabilities proportional to sizes."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from typing import TypeVar

Key = TypeVar("Key", bound=Hashable)


def inclusion_probabilities(sizes: Mapping[Key, float], draws: int) -> dict[Key, float]:
    """Inclusion probabilities in (0, 1] proportional to ``sizes`` that sum to ``draws`` (0: all are 1).

    Elements whose proportional share exceeds 1 get 1, and the others share the remaining draws. Elements of size zero
    are left out.
    """
    open_sizes = {key: size for key, size in sizes.items() if size > 0}
    if not draws or len(open_sizes) <= draws:
        return dict.fromkeys(open_sizes, 1.0)
    certain: dict[Key, float] = {}
    while True:
        total, left = sum(open_sizes.values()), draws - len(certain)
        large = [key for key, size in open_sizes.items() if left * size >= total]
        if not large:
            return certain | {key: left * size / total for key, size in open_sizes.items()}
        certain |= dict.fromkeys(large, 1.0)
        open_sizes = {key: size for key, size in open_sizes.items() if key not in certain}


def draw_systematic(probabilities: Mapping[Key, float], start: float) -> dict[Key, float]:
    """Elements whose interval of the cumulative probability contains one of start, start + 1, ...

    Madow, Annals of Mathematical Statistics 20, 1949. Each element is drawn with its probability; which pairs are drawn
    together depends on the order.

    Args:
        probabilities: inclusion probability of each element.
        start: uniform random number in [0, 1).
    """
    drawn, end = {}, 0.0
    for key, probability in probabilities.items():
        begin, end = end, end + probability
        if probability == 1.0 or math.ceil(end - start) > math.ceil(begin - start):
            drawn[key] = probability
    return drawn
