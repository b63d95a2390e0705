"""Selection of the experts that a client ships: top-k by update energy, or a draw with known probabilities."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from models.graph.unit_vectors import Unit


def update_energy(vectors: Mapping[Unit, Tensor]) -> dict[Unit, float]:
    """Update energy: the sum of squares of each unit's vector."""
    return {unit: float(vector.detach().double().square().sum()) for unit, vector in vectors.items()}


def select_top(vectors: Mapping[Unit, Tensor], per_layer: int) -> list[Unit]:
    """Top ``per_layer`` experts of each layer by update energy (0: all), in unit order.

    ``(layer, -1)`` units are always included. Among equal energies the lower expert is selected.
    """
    if not per_layer:
        return sorted(vectors)
    energy = update_energy(vectors)
    chosen = [unit for unit in energy if unit[1] < 0]
    for experts in _by_layer(energy).values():
        chosen += sorted(experts, key=lambda unit: (-energy[unit], unit))[:per_layer]
    return sorted(chosen)


def select_sample(
    vectors: Mapping[Unit, Tensor], per_layer: int, *, generator: torch.Generator
) -> dict[Unit, float]:
    """Draw ``per_layer`` experts of each layer (0: all) with probability proportional to the update norm.

    Systematic sampling (Madow, Annals of Mathematical Statistics 20, 1949). Returns the inclusion probability in (0, 1]
    of each drawn unit, exact for single units; pairs are not drawn independently. Units without change are never drawn;
    ``(layer, -1)`` units always are.
    """
    norms = {unit: math.sqrt(energy) for unit, energy in update_energy(vectors).items()}
    drawn = {unit: 1.0 for unit in norms if unit[1] < 0}
    for experts in _by_layer(norms).values():
        start = float(torch.rand((), generator=generator, dtype=torch.float64))
        probabilities = inclusion_probabilities({unit: norms[unit] for unit in experts}, per_layer)
        drawn.update(_draw_systematic(probabilities, start))
    return dict(sorted(drawn.items()))


def inclusion_probabilities(sizes: Mapping[Unit, float], draws: int) -> dict[Unit, float]:
    """Inclusion probabilities in (0, 1] proportional to ``sizes`` that sum to ``draws`` (0: all are 1).

    Units whose proportional share exceeds 1 get 1, and the others share the remaining draws. Units of size zero are
    left out.
    """
    open_units = {unit: size for unit, size in sizes.items() if size > 0}
    if not draws or len(open_units) <= draws:
        return dict.fromkeys(open_units, 1.0)
    certain: dict[Unit, float] = {}
    while True:
        total, left = sum(open_units.values()), draws - len(certain)
        large = [unit for unit, size in open_units.items() if left * size >= total]
        if not large:
            return certain | {unit: left * size / total for unit, size in open_units.items()}
        certain |= dict.fromkeys(large, 1.0)
        open_units = {unit: size for unit, size in open_units.items() if unit not in certain}


def _by_layer(units: Iterable[Unit]) -> dict[int, list[Unit]]:
    layers: dict[int, list[Unit]] = defaultdict(list)
    for unit in sorted(units):
        if unit[1] >= 0:
            layers[unit[0]].append(unit)
    return layers


def _draw_systematic(probabilities: Mapping[Unit, float], start: float) -> dict[Unit, float]:
    """Units whose interval of the cumulative probability contains one of start, start + 1, ..."""
    drawn, end = {}, 0.0
    for unit, probability in probabilities.items():
        begin, end = end, end + probability
        if probability == 1.0 or math.ceil(end - start) > math.ceil(begin - start):
            drawn[unit] = probability
    return drawn
