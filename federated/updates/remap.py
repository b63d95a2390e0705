"""Vectors of units after edits of the graph: the same experts under other numbers, beside more or fewer others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from experts.graph.edit_plan import renumber_units
from models.graph.unit_vectors import OTHERS, Unit


def remap_vector(vector: Tensor, origin: np.ndarray, count: int) -> Tensor:
    """Vector ``[size']`` of an expert for a layer of other experts: gains and affinities of their edges to it.

    Those of new experts are zero; see ``models.graph.unit_vectors`` for the order of entries.

    Args:
        vector: ``[size]``.
        origin: int64 ``[E']``, number of each expert of the layer before the edits; -1: a new one.
        count: E before the edits.
    """
    if np.array_equal(origin, np.arange(count)):
        return vector
    head, *pairs = vector.split([len(vector) - 2 * count, count, count])
    rows = torch.from_numpy(np.asarray(origin))
    return torch.cat([head, *(each[rows.clamp(min=0)].masked_fill(rows < 0, 0) for each in pairs)])


def remap_vectors(
    vectors: Mapping[Unit, Tensor], origins: Sequence[np.ndarray], counts: Sequence[int]
) -> dict[Unit, Tensor]:
    """Vectors by unit after edits; those of removed experts are left out.

    Args:
        vectors: by unit before the edits.
        origins: per layer, see ``remap_vector``.
        counts: E of each layer before the edits.
    """
    return {
        unit: vector if unit[1] == OTHERS else remap_vector(vector, origins[unit[0]], counts[unit[0]])
        for unit, vector in renumber_units(vectors, dict(enumerate(origins))).items()
    }
