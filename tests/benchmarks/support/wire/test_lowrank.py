"""Energy kept by low-rank factors and by sparse entries, on changes of known structure."""

from __future__ import annotations

import pytest
import torch

from benchmarks.support.wire.lowrank import energy_ratios, factor_energy, sparse_energy


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_factors_win_where_a_change_has_low_rank_and_lose_where_few_entries_moved():
    low = normal(48, 1) @ normal(1, 32, seed=1)
    few = torch.zeros(48, 32)
    few.view(-1)[torch.randperm(48 * 32, generator=torch.Generator().manual_seed(2))[:20]] = 1.0
    share, size = factor_energy(low, 1, 8)
    assert share > 0.99 and size < 200 and sparse_energy(low, size, 8) < 0.9
    ratios = energy_ratios([low, few], rank=1, bits=4)
    assert ratios["experts"] == 2 and ratios["share_of_experts_better"] == 0.5


def test_factor_energy_is_the_share_of_the_leading_singular_values():
    left, right = torch.linalg.qr(normal(40, 2)).Q, torch.linalg.qr(normal(30, 2, seed=1)).Q
    change = left @ torch.diag(torch.tensor([3.0, 1.0])) @ right.T
    share, size = factor_energy(change, 1, 8)
    assert share == pytest.approx(0.9, abs=0.01)  # 3^2 of 3^2 + 1^2
    assert 70 < size < 110  # 40 + 30 codes of a byte, and scales


def test_sparse_energy_grows_to_one_with_the_bytes_allowed():
    change = normal(30, 20)
    shares = [sparse_energy(change, size, 8) for size in (0, 100, 400, 5000)]
    assert shares[0] == 0 and shares == sorted(shares) and shares[-1] > 0.999
