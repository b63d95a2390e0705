"""Low-rank factors of an expert's change, the alternative to its top-k entries.

The change of a matrix over few steps of training has low rank, since its gradient is a sum over few tokens. In as many
bytes a truncated singular value decomposition keeps more energy than the largest entries, as ``benchmarks.wire``
measures; error feedback ships the rest later (PowerSGD for gradients: Vogels et al., 2019, arXiv:1905.13727).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from federated.updates.update import SparseVector

# Up to this smaller side all singular values are computed; above it only the largest, by a randomized method.
_EXACT_SIDE = 512
_OVERSAMPLING, _POWER_ITERATIONS = 8, 2


class FactoredVector(SparseVector):
    """Sparse vector whose first ``rows * columns`` entries are a product of two factors.

    As a ``SparseVector`` it holds every entry of the matrix, then the kept entries of ``rest``. The product is computed
    on each access of ``values``, so that an update of many units stays small.

    Args:
        left: float32 ``[rank, rows]``.
        right: float32 ``[rank, columns]``.
        rest: vector of the whole size, with entries after the matrix only.

    Raises:
        ValueError: the shapes do not fit each other.
    """

    left: np.ndarray
    right: np.ndarray
    rest: SparseVector

    def __init__(self, left: np.ndarray, right: np.ndarray, rest: SparseVector) -> None:
        left, right = (np.ascontiguousarray(part, dtype=np.float32) for part in (left, right))
        if left.ndim != 2 or right.ndim != 2 or len(left) != len(right) or not len(left):
            raise ValueError(f"expected factors of one rank, got {left.shape} and {right.shape}")
        area = left.shape[1] * right.shape[1]
        if area > rest.size or (rest.indices.size and rest.indices[0] < area):
            raise ValueError(f"expected other entries behind a matrix of {area} in a vector of {rest.size}")
        for name, value in (("size", rest.size), ("left", left), ("right", right), ("rest", rest)):
            object.__setattr__(self, name, value)

    @property
    def factor_shape(self) -> tuple[int, int, int]:
        """Rows, columns and rank of the factors."""
        return self.left.shape[1], self.right.shape[1], len(self.left)

    @property
    def indices(self) -> np.ndarray:  # type: ignore[override]
        """Positions of the matrix, then the kept positions of the rest: int64 ``[n]``."""
        return np.concatenate([np.arange(self.left.shape[1] * self.right.shape[1]), self.rest.indices])

    @property
    def values(self) -> np.ndarray:  # type: ignore[override]
        """Entries of the product, then the kept values of the rest: float32 ``[n]``.

        Ranks are added in order with rounding after each, which gives the same bits on every machine; a matrix product
        does not guarantee that.
        """
        product = np.multiply.outer(self.left[0], self.right[0])
        for left, right in zip(self.left[1:], self.right[1:], strict=True):
            product += np.multiply.outer(left, right)
        return np.concatenate([product.reshape(-1), self.rest.values])

    @property
    def bound(self) -> float:
        """Upper bound of the magnitudes of the product's entries."""
        return float((np.abs(self.left).max(axis=1) * np.abs(self.right).max(axis=1)).sum(dtype=np.float64))

    @property
    def sent_indices(self) -> np.ndarray:
        """Kept positions of the rest: int64 ``[n]``."""
        return self.rest.indices

    @property
    def sent_values(self) -> np.ndarray:
        """Both factors, then the kept values of the rest."""
        return np.concatenate([self.left.reshape(-1), self.right.reshape(-1), self.rest.values])

    def with_sent_values(self, values: np.ndarray) -> FactoredVector:
        """Vector of the same shapes and positions with other ``sent_values``."""
        ends = np.cumsum([self.left.size, self.right.size])
        left, right, rest = np.split(values, ends)
        return FactoredVector(
            left.reshape(self.left.shape), right.reshape(self.right.shape), self.rest.with_sent_values(rest)
        )


def factorize(vector: Tensor, rows: int, columns: int, rank: int, rest: SparseVector) -> FactoredVector:
    """Truncated SVD of ``rank`` of the first ``rows * columns`` entries of ``vector``, combined with ``rest``.

    Each factor carries the square root of the singular values, so that both quantize equally well. Exact for small
    matrices, else by subspace iteration (Halko et al., 2011, arXiv:0909.4061) from a fixed seed.
    """
    matrix = vector.detach().float().cpu()[: rows * columns].view(rows, columns)
    if min(rows, columns) <= _EXACT_SIDE:
        left, singular, right = torch.linalg.svd(matrix, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            left, singular, right = torch.svd_lowrank(
                matrix, min(rank + _OVERSAMPLING, rows, columns), _POWER_ITERATIONS
            )
        right = right.T
    root = singular[:rank].sqrt()
    return FactoredVector((left[:, :rank] * root).T.numpy(), (root[:, None] * right[:rank]).numpy(), rest)


def equal_rank(entries: int, size: int, rows: int, columns: int, value_bits: int) -> int:
    """Largest rank whose factors take no more bits than ``entries`` of ``size`` with their index at its entropy."""
    if not size:
        return 0
    share = entries / size
    index = -sum(part * math.log2(part) for part in (share, 1 - share) if part > 0) * size
    return min(int((index + entries * value_bits) / ((rows + columns) * value_bits)), rows, columns)


def better_of(
    vector: Tensor, kept: SparseVector, rows: int, columns: int, *, value_bits: int
) -> SparseVector:
    """Replace the ``kept`` entries of the matrix by low-rank factors where these hold more energy in as many bytes.

    Args:
        vector: change ``[size]``: a matrix ``[rows, columns]`` and other entries after it.
        kept: its top entries.
        rows: rows of the matrix.
        columns: columns of the matrix.
        value_bits: bits per value of a factor or an entry.
    """
    area = rows * columns
    inside = int(np.searchsorted(kept.indices, area))
    rank = equal_rank(inside, area, rows, columns, value_bits)
    if not rank:
        return kept
    rest = SparseVector(kept.size, kept.indices[inside:], kept.values[inside:])
    factored = factorize(vector, rows, columns, rank, rest)
    held = float(
        np.square(np.linalg.norm(factored.left, axis=1) * np.linalg.norm(factored.right, axis=1)).sum()
    )
    return factored if held > float(np.square(kept.values[:inside]).sum()) else kept
