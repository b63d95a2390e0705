"""An expert's change as low-rank factors: the other way to ship a unit, beside its largest entries.

The change of a matrix over few steps of training is of low rank: its gradient is a sum over few tokens. In as many
bytes a truncated singular value decomposition keeps more of its energy than its largest entries do, as
``benchmarks.wire`` measures; error feedback ships the rest later all the same (of gradients: Vogels et al., PowerSGD,
2019, arXiv:1905.13727).
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
    """A vector whose first ``rows * columns`` entries are a product of factors.

    Reads as the ``SparseVector`` that it stands for: every entry of the matrix, then the kept ones of ``rest``. The
    product is computed anew whenever ``values`` is asked for, so that an update of many units stays small.

    Args:
        left: float32 ``[rank, rows]``.
        right: float32 ``[rank, columns]``.
        rest: of the whole size, its entries behind the matrix.

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
        return self.left.shape[1], self.right.shape[1], len(self.left)

    @property
    def indices(self) -> np.ndarray:  # type: ignore[override]
        """Positions of the matrix, then those kept of the rest: int64 ``[n]``."""
        return np.concatenate([np.arange(self.left.shape[1] * self.right.shape[1]), self.rest.indices])

    @property
    def values(self) -> np.ndarray:  # type: ignore[override]
        """The product, then what is kept of the rest: float32 ``[n]``.

        One rank after the other, each rounded: the same bits on every machine, which no matrix product promises.
        """
        product = np.multiply.outer(self.left[0], self.right[0])
        for left, right in zip(self.left[1:], self.right[1:], strict=True):
            product += np.multiply.outer(left, right)
        return np.concatenate([product.reshape(-1), self.rest.values])

    @property
    def bound(self) -> float:
        """What no entry of the product exceeds."""
        return float((np.abs(self.left).max(axis=1) * np.abs(self.right).max(axis=1)).sum(dtype=np.float64))

    @property
    def sent_indices(self) -> np.ndarray:
        return self.rest.indices

    @property
    def sent_values(self) -> np.ndarray:
        """Both factors, then what is kept of the rest."""
        return np.concatenate([self.left.reshape(-1), self.right.reshape(-1), self.rest.values])

    def with_sent_values(self, values: np.ndarray) -> FactoredVector:
        ends = np.cumsum([self.left.size, self.right.size])
        left, right, rest = np.split(values, ends)
        return FactoredVector(
            left.reshape(self.left.shape), right.reshape(self.right.shape), self.rest.with_sent_values(rest)
        )


def factorize(vector: Tensor, rows: int, columns: int, rank: int, rest: SparseVector) -> FactoredVector:
    """The best factors of ``rank`` of the first ``rows * columns`` entries of ``vector``, and ``rest``.

    Each carries the root of the singular values, so that both are quantized alike. Exact for small matrices, else by
    subspace iteration (Halko et al., 2011, arXiv:0909.4061) from a fixed seed.
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
    """The rank whose factors take the bits of ``entries`` kept of ``size``, index at its entropy; 0 where none does."""
    if not size:
        return 0
    share = entries / size
    index = -sum(part * math.log2(part) for part in (share, 1 - share) if part > 0) * size
    return min(int((index + entries * value_bits) / ((rows + columns) * value_bits)), rows, columns)


def better_of(
    vector: Tensor, kept: SparseVector, rows: int, columns: int, *, value_bits: int
) -> SparseVector:
    """Factors in the place of the ``kept`` entries of the matrix where they hold more energy in as many bytes.

    Args:
        vector: the change ``[size]``, a matrix ``[rows, columns]`` and other entries behind it.
        kept: its largest entries.
        rows: of the matrix.
        columns: of the matrix.
        value_bits: of a value, factor or entry.
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
