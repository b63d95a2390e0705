from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from benchmarks.support.wire_lowrank import energy_ratios, factor_energy, sparse_energy
from benchmarks.support.wire_peers import dense_peers, plain_pack, plain_select, plain_unpack
from benchmarks.support.wire_updates import kept, random_update, side_by_side
from benchmarks.wire import measure, smallest_bytes

FIGURES = {
    "index_over_entropy_uniform_max",
    "index_over_entropy_real_max",
    "int4_bits",
    "bit2_bits",
    "overhead_bytes",
    "container_share_100k",
    "pack_speed_ratio",
    "pack_speed_ratio_same_selection",
    "pack_speed_ratio_without_selection",
    "unpack_speed_ratio",
    "size_ratio",
}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_quick_run_measures_every_figure():
    measured = measure(True, lambda *step: None)
    assert set(measured.figures) == FIGURES
    assert all(
        value is not None and math.isfinite(value) and value > 0 for value in measured.figures.values()
    )
    assert measured.figures["size_ratio"] < 0.5 and measured.figures["overhead_bytes"] == smallest_bytes()
    assert set(measured.peers["sent"]) >= {"flower fp32", "flower fp16", "bf16 zstd -3", "bitsandbytes nf4"}
    for row in [*measured.peers["uniform"].values(), *measured.peers["real"].values()]:
        assert (
            row["kept"] <= row["entries"]
            and row["index_bytes"] + row["kept"] * row["bits_4"] / 8 < row["bytes"]
        )


def test_plain_coding_gives_back_positions_and_half_precision_values():
    update = random_update(1000, 0.2, seed=3, unit_size=300)
    sizes = [(unit, vector.size) for unit, vector in update.vectors.items()]
    again = plain_unpack(plain_pack(update), sizes)
    for unit, vector in update.vectors.items():
        np.testing.assert_array_equal(again.vectors[unit].indices, vector.indices)
        np.testing.assert_allclose(again.vectors[unit].values, vector.values, rtol=1e-3, atol=1e-7)


def test_plain_selection_finds_the_same_entries_as_ours():
    vectors = {(0, 0): normal(1000), (0, 1): normal(500, seed=1)}
    plain, ours = (select(vectors, 0.1).vectors for select in (plain_select, kept))
    for unit in vectors:
        np.testing.assert_array_equal(plain[unit].indices, ours[unit].indices)
        np.testing.assert_array_equal(plain[unit].values, ours[unit].values)


def test_clients_side_by_side_are_layers():
    one = {(0, 0): normal(4), (1, 0): normal(4)}
    assert list(side_by_side([one, one])) == [(0, 0), (1, 0), (2, 0), (3, 0)]


def test_shared_selection_compares_units():
    vectors = {(0, 0): normal(100), (0, 1): 100 * normal(100, seed=1)}
    each, together = (kept(vectors, 0.1, shared=shared).vectors for shared in (False, True))
    assert [vector.indices.size for vector in each.values()] == [10, 10]
    assert together[(0, 1)].indices.size == 20 and (0, 0) not in together


def test_dense_peers_take_their_nominal_bytes():
    found = dense_peers({(0, 0): normal(6400), (0, 1): normal(6400)}, repeats=1)
    nominal = {"flower fp32": 4, "flower fp16": 2, "bitsandbytes nf4": 0.516}
    for name, size in nominal.items():
        assert found[name]["bytes_per_entry"] == pytest.approx(size, rel=0.05)


def test_factors_win_where_a_change_has_low_rank_and_lose_where_few_entries_moved():
    low = normal(48, 1) @ normal(1, 32, seed=1)
    few = torch.zeros(48, 32)
    few.view(-1)[torch.randperm(48 * 32, generator=torch.Generator().manual_seed(2))[:20]] = 1.0
    share, size = factor_energy(low, 1, 8)
    assert share > 0.99 and size < 200 and sparse_energy(low, size, 8) < 0.9
    ratios = energy_ratios([low, few], rank=1, bits=4)
    assert ratios["experts"] == 2 and ratios["share_of_experts_better"] == 0.5
