"""Selection of the experts that a client ships: top-k by update energy, or a draw with known probabilities."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from federated.selection.systematic import draw_systematic, inclusion_probabilities
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

    Systematic sampling (``draw_systematic``). Returns the inclusion probability in (0, 1]
    of each drawn unit, exact for single units; pairs are not drawn independently. Units without change are never drawn;
    ``(layer, -1)`` units always are.
    """
    norms = {unit: math.sqrt(energy) for unit, energy in update_energy(vectors).items()}
    drawn = {unit: 1.0 for unit in norms if unit[1] < 0}
    for experts in _by_layer(norms).values():
        start = float(torch.rand((), generator=generator, dtype=torch.float64))
        probabilities = inclusion_probabilities({unit: norms[unit] for unit in experts}, per_layer)
        drawn.update(draw_systematic(probabilities, start))
    return dict(sorted(drawn.items()))


def _by_layer(units: Iterable[Unit]) -> dict[int, list[Unit]]:
    layers: dict[int, list[Unit]] = defaultdict(list)
    for unit in sorted(units):
        if unit[1] >= 0:
            layers[unit[0]].append(unit)
    return layers
