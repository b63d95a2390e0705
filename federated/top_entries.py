"""The largest entries of a vector, exactly, without sorting it."""

from __future__ import annotations

import torch
from torch import Tensor


def top_entries(magnitudes: Tensor, count: int) -> Tensor:
    """Return the increasing positions (int64 [count]) of the ``count`` largest of ``magnitudes`` [size].

    Among equal magnitudes the lowest position wins. ValueError for a count outside ``[0, size]``.
    """
    if not 0 <= count <= magnitudes.numel():
        raise ValueError(f"expected a count from 0 to {magnitudes.numel()}, got {count}")
    if count == 0:
        return torch.zeros(0, dtype=torch.int64)
    threshold = torch.topk(magnitudes, count, sorted=False).values.min()
    above = torch.nonzero(magnitudes > threshold).reshape(-1)
    ties = torch.nonzero(magnitudes == threshold).reshape(-1)[: count - above.numel()]
    return torch.cat([above, ties]).sort().values
