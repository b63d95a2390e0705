"""Sums over clients of bounded L2 sensitivity: a client that contributes or not changes them by at most a bound.

A sum is not a mean over those that shipped an entry, whose divisor would depend on the data of the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from federated.aggregation.contribution import Contribution
from federated.updates.update import RefusedUpdate, SparseUpdate
from models.graph.unit_vectors import Unit

Positions = Mapping[Unit, np.ndarray]


def check_positions(update: SparseUpdate, positions: Positions) -> None:
    """Refuse an update with an entry outside of the shared positions.

    Args:
        update: decoded update.
        positions: int64 ``[n]`` of each unit, increasing.

    Raises:
        RefusedUpdate: names the unit and the position.
    """
    for unit, vector in update.vectors.items():
        stray = np.setdiff1d(vector.indices, positions[unit], assume_unique=True)
        if stray.size:
            raise RefusedUpdate(
                f"expected entries of the round's shared draw only, got {stray[0]} of unit {unit}"
            )


def clipped_sum(
    contributions: Iterable[Contribution], positions: Positions, *, clip_norm: float
) -> dict[Unit, np.ndarray]:
    """Sum of the updates at shared positions, each scaled to an L2 norm of at most ``clip_norm``, without weights.

    The norm is that of the decoded update over all units. Its L2 sensitivity to any one client is ``clip_norm``.

    Args:
        contributions: one per client; decoded one at a time.
        positions: int64 ``[n]`` of each unit, increasing; entries elsewhere are an error.
        clip_norm: bound above 0.

    Returns:
        float64 ``[n]`` of each unit of ``positions``, in unit order, zero where no client shipped.
    """
    sums = {unit: np.zeros(positions[unit].size) for unit in sorted(positions)}
    for contribution in contributions:
        _add_clipped(sums, contribution.unpack(), positions, clip_norm)
    return sums


def unit_norm_sum(clients: Sequence[Sequence[np.ndarray]]) -> list[np.ndarray]:
    """Sum of the clients' usage counts, each scaled to an L2 norm of 1 over all layers: an L2 sensitivity of 1.

    Args:
        clients: per client and layer ``[E, E]``; a client without any count adds nothing.

    Returns:
        per layer float64 ``[E, E]``; empty without a client.
    """
    scaled = [_scaled([np.asarray(layer, dtype=np.float64) for layer in client]) for client in clients]
    return [np.sum(layers, axis=0) for layers in zip(*scaled, strict=True)]


def _add_clipped(
    sums: dict[Unit, np.ndarray], update: SparseUpdate, positions: Positions, clip_norm: float
) -> None:
    # A separate function, so that one update is freed before the next is decoded.
    values = {unit: vector.values.astype(np.float64) for unit, vector in update.vectors.items()}
    norm = sum(float(np.square(each).sum()) for each in values.values()) ** 0.5
    scale = min(1.0, clip_norm / norm) if norm else 1.0
    for unit, vector in update.vectors.items():
        places = np.searchsorted(positions[unit], vector.indices)
        if not np.array_equal(positions[unit].take(places, mode="clip"), vector.indices):
            raise ValueError(f"expected entries at the shared positions of unit {unit}, got others")
        sums[unit][places] += scale * values[unit]


def _scaled(layers: list[np.ndarray]) -> list[np.ndarray]:
    norm = sum(float(np.square(layer).sum()) for layer in layers) ** 0.5
    return [layer / norm for layer in layers] if norm else layers
