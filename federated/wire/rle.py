"""Run-length coding of a sparse mask: the number of zeros before each kept entry."""

from __future__ import annotations

import numpy as np

from federated.updates.update import RefusedUpdate


def run_dtype(size: int) -> np.dtype:
    """Unsigned type that holds every run length of a vector of ``size`` entries."""
    return np.dtype(np.uint32 if size <= 2**32 else np.uint64)


def encode_runs(indices: np.ndarray, size: int) -> np.ndarray:
    """Run lengths of zeros before each kept entry: uint32 [n] (uint64 above 2**32 entries).

    ``indices``: strictly increasing positions [n] in ``[0, size)``; ValueError otherwise. The zeros
    after the last kept entry are implied by ``size``.
    """
    indices = np.asarray(indices, dtype=np.int64)
    if not indices.size:
        return np.zeros(0, dtype=run_dtype(size))
    gaps = np.empty_like(indices)
    gaps[0] = indices[0]
    np.subtract(indices[1:], indices[:-1], out=gaps[1:])
    gaps[1:] -= 1
    if gaps.min() < 0 or indices[-1] >= size:
        raise ValueError(f"expected strictly increasing indices in [0, {size})")
    return gaps.astype(run_dtype(size))


def decode_runs(runs: np.ndarray, size: int) -> np.ndarray:
    """Positions of the kept entries (int64 [n]) from unsigned run lengths [n].

    Raises RefusedUpdate when the runs do not fit in ``size`` entries, whatever their values: sums that
    would overflow are refused as well.
    """
    longest = int(runs.max()) if runs.size else 0
    if runs.size > size or longest >= max(size, 1):
        raise RefusedUpdate(f"run lengths do not fit in {size} entries")
    indices = np.add(runs, 1, dtype=np.int64, casting="unsafe")
    indices[:1] -= 1
    np.cumsum(indices, out=indices)
    # Each step is at most 2**62, so a sum that wraps around shows as a fall; a difference would wrap back.
    wraps = (longest + 1) * runs.size >= 2**63 and np.any(indices[1:] <= indices[:-1])
    if runs.size and (indices[-1] >= size or wraps):
        raise RefusedUpdate(f"run lengths do not fit in {size} entries")
    return indices
