from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from federated.updates.update import RefusedUpdate
from federated.wire.rle import decode_runs, encode_runs, run_dtype


def runs_by_walking(mask):
    """The zeros before each kept entry, counted one by one."""
    runs, zeros = [], 0
    for kept in mask:
        if kept:
            runs.append(zeros)
            zeros = 0
        else:
            zeros += 1
    return runs


@settings(max_examples=200, deadline=None)
@given(st.lists(st.booleans(), max_size=60))
def test_runs_equal_a_walk_over_the_mask(mask):
    indices = np.flatnonzero(np.array(mask, dtype=bool))
    runs = encode_runs(indices, len(mask))
    assert runs.dtype == np.uint32 and runs.tolist() == runs_by_walking(mask)
    assert decode_runs(runs, len(mask)).tolist() == indices.tolist()


@pytest.mark.parametrize("size", [0, 1, 7, 1000])
def test_density_zero_and_one(size):
    assert encode_runs(np.zeros(0, dtype=np.int64), size).size == 0
    assert decode_runs(np.zeros(0, dtype=np.uint32), size).size == 0
    runs = encode_runs(np.arange(size), size)
    assert runs.tolist() == [0] * size and decode_runs(runs, size).tolist() == list(range(size))


def test_giant_sizes_use_the_wide_type():
    assert run_dtype(2**32) == np.uint32 and run_dtype(2**32 + 1) == np.uint64
    indices = np.array([3, 2**40])
    runs = encode_runs(indices, 2**40 + 1)
    assert runs.dtype == np.uint64 and decode_runs(runs, 2**40 + 1).tolist() == indices.tolist()


@pytest.mark.parametrize("indices", [[2, 2], [4, 1], [-1], [10], [0, 12]])
def test_positions_outside_or_out_of_order_are_refused(indices):
    with pytest.raises(ValueError, match="strictly increasing"):
        encode_runs(np.array(indices), 10)


@pytest.mark.parametrize(
    "runs, size",
    [
        ([10], 10),
        ([4, 5], 10),
        ([0] * 11, 10),
        ([2**64 - 1], 10),
        ([2**61] * 8, 2**62),  # sums to 2**64: wraps to a small number
        ([2**61] * 5, 2**62),
        ([0], 0),
    ],
)
def test_runs_that_do_not_fit_are_refused(runs, size):
    with pytest.raises(RefusedUpdate, match="do not fit"):
        decode_runs(np.array(runs, dtype=np.uint64), size)


def test_the_last_run_may_end_exactly_at_the_end():
    assert decode_runs(np.array([4, 4], dtype=np.uint32), 10).tolist() == [4, 9]
