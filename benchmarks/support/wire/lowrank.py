"""Energy of an expert's change that low-rank factors keep, relative to top-k entries of equal bytes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from federated.selection.entries import sparsify
from federated.updates.update import SparseUpdate
from federated.wire.codec import pack_update, packed_stats
from federated.wire.columns import pack_column
from federated.wire.quantize import dequantize, quantize


def factor_energy(change: Tensor, rank: int, bits: int) -> tuple[float, int]:
    """Share of the energy of ``change [rows, columns]`` that its quantized truncated SVD keeps.

    Each factor is scaled by the square root of the singular values and quantized as sparse values are.

    Returns:
        share of the energy, and bytes of codes and scales.
    """
    left, singular, right = torch.linalg.svd(change, full_matrices=False)
    root = singular[:rank].sqrt()
    coded = [_quantized(part, bits) for part in ((left[:, :rank] * root).T, root[:, None] * right[:rank])]
    product = coded[0][0].T @ coded[1][0]
    return _energy_kept(change, product), sum(size for _, size in coded)


def sparse_energy(change: Tensor, size: int, bits: int) -> float:
    """Share of the energy that the largest entries keep, with index and values of at most ``size`` bytes together."""
    flat, low, high = change.reshape(-1), 0.0, 1.0
    best = torch.zeros_like(flat)
    for _ in range(12):
        density = (low + high) / 2
        update = SparseUpdate(0, "", {(0, 0): sparsify(flat, density)})
        packed = pack_update(update, value_bits=bits)
        stats = packed_stats(packed)
        if stats.index_bytes + stats.value_bytes > size:
            high = density
            continue
        low = density
        vector = update.vectors[(0, 0)]
        best = torch.zeros_like(flat)
        best[torch.from_numpy(vector.indices)] = torch.from_numpy(dequantize(quantize(vector.values, bits)))
    return _energy_kept(flat, best)


def energy_ratios(changes: list[Tensor], *, rank: int, bits: int) -> dict[str, float]:
    """Energy kept by factors over that kept by sparse entries at equal bytes: median and share above 1 over experts."""
    ratios = []
    for change in changes:
        factors, size = factor_energy(change, rank, bits)
        ratios.append(factors / max(sparse_energy(change, size, bits), 1e-9))
    return {
        "median": float(np.median(ratios)),
        "share_of_experts_better": float(np.mean(np.array(ratios) > 1)),
        "experts": len(ratios),
    }


def _quantized(part: Tensor, bits: int) -> tuple[Tensor, int]:
    column = quantize(part.reshape(-1).numpy(), bits)
    size = len(pack_column(column.codes, width=bits)) + len(
        pack_column(column.scales, width=8 * column.scales.itemsize)
    )
    return torch.from_numpy(dequantize(column)).view(part.shape), size


def _energy_kept(change: Tensor, shipped: Tensor) -> float:
    return 1 - float((change - shipped).square().sum() / change.square().sum())
