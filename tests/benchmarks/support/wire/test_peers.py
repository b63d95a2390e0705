"""Plain codings: exact round trips, selected entries, nominal sizes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.support.wire.peers import (
    dense_peers,
    plain_pack,
    plain_select,
    plain_unpack,
    speed_figures,
)
from benchmarks.support.wire.updates import kept, random_update
from federated.wire.codec import pack_update


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


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


def test_dense_peers_take_their_nominal_bytes():
    found = dense_peers({(0, 0): normal(6400), (0, 1): normal(6400)}, repeats=1)
    nominal = {"flower fp32": 4, "flower fp16": 2, "bitsandbytes nf4": 0.516}
    for name, size in nominal.items():
        assert found[name]["bytes_per_entry"] == pytest.approx(size, rel=0.05)


def test_speed_figures_compare_both_codings_of_the_same_entries():
    vectors = {(0, 0): normal(4000), (0, 1): normal(2000, seed=1)}
    found = speed_figures(vectors, density=0.05, bits=4, repeats=1)
    update = kept(vectors, 0.05)
    ours, plain = len(pack_update(update, value_bits=4)), len(plain_pack(update))
    assert found["figures"]["size_ratio"] == ours / plain
    assert all(value > 0 for value in found["figures"].values())
    assert found["peers"]["ours at density 0.05, int4"]["bytes_per_entry"] == ours / 6000
    assert found["peers"]["int32 fp16 zstd -3 at density 0.05"]["bytes_per_entry"] == plain / 6000
    assert set(found["peers"]) >= {
        "selection of the largest entries, ours",
        "selection of the largest entries, torch.topk",
    }
