"""Positions that all clients of a round ship, drawn from the seed and the round without regard to any data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from federated.selection.entries import sparsify
from models.graph.unit_vectors import Span, Unit

_STREAM = 0x5E1EC7  # distinguishes this draw from others of the same seed


@dataclass(frozen=True)
class SharedEntries:
    """Draw of one round: a uniform score of each trained entry, the same on every client and on the server.

    The entries of largest score are shipped, so that those of a lower density are among those of a higher one. Since
    no data enters the draw, the positions of an update disclose nothing (for sparse updates with shared random
    positions see Hu et al., 2021, arXiv:2008.01558).

    Attributes:
        seed: of the run; known to every client.
        server_round: from 1.
        spans: trained entries of each unit.
    """

    seed: int
    server_round: int
    spans: Mapping[Unit, Span]

    def score(self, unit: Unit, vector: Tensor) -> Tensor:
        """Score of each entry of ``vector`` ``[size]``, float32 in (0, 1]; 0 for entries that do not train."""
        span = self.spans[unit]
        key = (_STREAM, self.seed, self.server_round, unit[0], unit[1] + 1)
        drawn = np.random.default_rng(key).random(span.size, dtype=np.float32)
        scores = torch.from_numpy(1 - drawn)
        scores[: span.start] = scores[span.stop :] = 0
        return scores

    def positions(self, unit: Unit, density: float) -> np.ndarray:
        """Positions that are shipped, int64 ``[n]``, increasing.

        Args:
            unit: unit of ``spans``.
            density: positions / all entries of the unit; at most all that train.
        """
        ones = torch.ones(self.spans[unit].size)
        return sparsify(ones, density, self.score(unit, ones)).indices
