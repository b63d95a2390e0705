from __future__ import annotations

import numpy as np
import pytest

from federated.updates.update import RefusedUpdate, SparseUpdate, SparseVector
from federated.wire.columns import zstd_pack
from federated.wire.factors import FactoredVector
from federated.wire.unit_table import UnitRow, pack_units, read_units

PLAIN = SparseVector(9, [1], [1.0])
FACTORED = FactoredVector(np.ones((1, 2)), np.ones((1, 3)), SparseVector(7, [], []))


def test_rows_in_unit_order():
    update = SparseUpdate(0, "", {(1, 0): PLAIN, (0, 3): FACTORED})
    rows = read_units(pack_units(update), 2)
    assert rows == [UnitRow(0, 3, 7, 2, 3, 1), UnitRow(1, 0, 9, 0, 0, 0)]
    assert [row.factor_values for row in rows] == [5, 0]
    assert read_units(pack_units(SparseUpdate(0, "", {})), 0) == []


@pytest.mark.parametrize(
    "row", [(0, 0, -1, 0, 0, 0), (0, 0, 2**43, 0, 0, 0), (0, 0, 9, 5, 2, 1), (0, 0, 9, 3, 3, 4)]
)
def test_sizes_and_shapes_that_cannot_be_are_refused(row):
    assert not UnitRow(*row).valid()
    with pytest.raises(RefusedUpdate, match="out of range"):
        read_units(zstd_pack(np.array([row], dtype="<i8").T.tobytes()), 1)


@pytest.mark.parametrize("count", [0, 2])
def test_another_count_is_refused(count):
    with pytest.raises(RefusedUpdate):
        read_units(pack_units(SparseUpdate(0, "", {(0, 0): PLAIN})), count)
