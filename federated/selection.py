"""Which units and entries a client ships, and what it keeps for the next round."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from configs.errors import UserError
from federated.quantise import quantise_update
from federated.top_entries import top_entries
from federated.update import SparseUpdate, SparseVector, Unit


class PreparedUpdate(NamedTuple):
    """``update``: what is shipped, with the values the server will see. ``residual``: float32 [size] per
    unit, what was not shipped. ``inclusion``: probability with which each shipped unit was drawn."""

    update: SparseUpdate
    residual: dict[Unit, Tensor]
    inclusion: dict[Unit, float]


def sparsify(vector: Tensor, density: float) -> SparseVector:
    """Keep the ``ceil(density * size)`` entries of largest magnitude of ``vector`` [size].

    Among equal magnitudes the lowest index wins. Zeros are never kept: shipping them changes nothing.
    """
    if not 0 <= density <= 1:
        raise ValueError(f"expected a density from 0 to 1, got {density}")
    values = vector.detach().to(torch.float32).reshape(-1).cpu()
    # The small term keeps 0.07 * 100 = 7.000000000000001 from counting as 8.
    count = min(math.ceil(density * values.numel() - 1e-9), int(torch.count_nonzero(values)))
    return SparseVector.from_dense(values.numpy(), top_entries(values.abs(), count).numpy())


def update_energy(vectors: Mapping[Unit, Tensor]) -> dict[Unit, float]:
    """Return the sum of squares of every unit's vector."""
    return {unit: float(vector.detach().double().square().sum()) for unit, vector in vectors.items()}


def select_top(vectors: Mapping[Unit, Tensor], per_layer: int) -> list[Unit]:
    """Return the ``per_layer`` experts of each layer with the largest energy, 0 for all, in unit order.

    A ``(layer, -1)`` unit is always among them. Equal energies: the lower expert wins.
    """
    energy = update_energy(vectors)
    chosen = [unit for unit in energy if unit[1] < 0]
    for experts in _by_layer(energy).values():
        ranked = sorted(experts, key=lambda unit: (-energy[unit], unit))
        chosen += ranked[:per_layer] if per_layer else ranked
    return sorted(chosen)


def select_sample(
    vectors: Mapping[Unit, Tensor], per_layer: int, *, generator: torch.Generator
) -> dict[Unit, float]:
    """Draw ``per_layer`` experts of each layer (0: all), larger updates more often.

    Systematic sampling with probability proportional to the norm. Returns the inclusion probability in (0, 1]
    of each drawn unit. A unit without any change is never drawn; ``(layer, -1)`` always is.
    """
    norms = {unit: math.sqrt(energy) for unit, energy in update_energy(vectors).items()}
    drawn = {unit: 1.0 for unit in norms if unit[1] < 0}
    for experts in _by_layer(norms).values():
        start = float(torch.rand((), generator=generator, dtype=torch.float64))
        probabilities = inclusion_probabilities({unit: norms[unit] for unit in experts}, per_layer)
        drawn.update(_draw_systematic(probabilities, start))
    return dict(sorted(drawn.items()))


def inclusion_probabilities(sizes: Mapping[Unit, float], draws: int) -> dict[Unit, float]:
    """Return probabilities in (0, 1] proportional to ``sizes`` that sum to ``draws`` (0: all are certain).

    Units too large for their share are certain, and the others share the remaining draws. Units of size
    zero are left out.
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


def prepare_update(
    deltas: Mapping[Unit, Tensor],
    residual: Mapping[Unit, Tensor],
    *,
    selection: Literal["top", "sample"] = "top",
    per_layer: int = 0,
    density: float,
    value_bits: int,
    residual_decay: float = 1.0,
    graph_version: int,
    graph_hash: str,
    generator: torch.Generator | None = None,
) -> PreparedUpdate:
    """Choose what to ship of ``deltas`` (float [size] per trained unit) with error feedback.

    The decayed residual is added first; what is not shipped (other units, entries below the density cut,
    the quantisation error) is the new residual. Units with a residual that were not trained keep it,
    decayed. ``generator`` is needed for ``selection="sample"``. Raises UserError when nothing has changed
    or a change is not finite.
    """
    _check_changes(deltas)
    carried = {unit: vector.float() * residual_decay for unit, vector in residual.items()}
    total = {unit: delta.detach().float().cpu() for unit, delta in deltas.items()}
    total |= {unit: vector + carried[unit] for unit, vector in total.items() if unit in carried}
    inclusion = _select(total, selection, per_layer, generator)
    vectors = {unit: sparsify(total[unit], density) for unit in inclusion}
    update = quantise_update(SparseUpdate(graph_version, graph_hash, vectors), value_bits)
    kept = {unit: _subtract(vector, update.vectors.get(unit)) for unit, vector in (carried | total).items()}
    return PreparedUpdate(update, {unit: left for unit, left in kept.items() if left.any()}, inclusion)


def _check_changes(deltas: Mapping[Unit, Tensor]) -> None:
    for unit, delta in deltas.items():
        if not torch.isfinite(delta).all():
            raise UserError(
                f"expected finite changes, got NaN or infinity in unit {unit}; lower learning-rate"
            )
    if not any(bool(delta.any()) for delta in deltas.values()):
        raise UserError(
            "expected a change to ship, got an all-zero update; check local-steps and learning-rate"
        )


def _select(
    vectors: Mapping[Unit, Tensor], selection: str, per_layer: int, generator: torch.Generator | None
) -> dict[Unit, float]:
    if selection == "top":
        return dict.fromkeys(select_top(vectors, per_layer), 1.0)
    if selection != "sample" or generator is None:
        raise ValueError(f"expected selection top, or sample with a generator, got {selection!r}")
    return select_sample(vectors, per_layer, generator=generator)


def _by_layer(units: Iterable[Unit]) -> dict[int, list[Unit]]:
    layers: dict[int, list[Unit]] = defaultdict(list)
    for unit in sorted(units):
        if unit[1] >= 0:
            layers[unit[0]].append(unit)
    return layers


def _draw_systematic(probabilities: Mapping[Unit, float], start: float) -> dict[Unit, float]:
    """Return the units in whose stretch of the cumulative sum one of start, start + 1, ... falls."""
    drawn, end = {}, 0.0
    for unit, probability in probabilities.items():
        begin, end = end, end + probability
        if probability == 1.0 or math.ceil(end - start) > math.ceil(begin - start):
            drawn[unit] = probability
    return drawn


def _subtract(vector: Tensor, shipped: SparseVector | None) -> Tensor:
    if shipped is None:
        return vector
    left = vector.clone()
    left[torch.from_numpy(shipped.indices)] -= torch.from_numpy(shipped.values)
    return left
