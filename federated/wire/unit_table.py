"""Units column of a packed update: shipped units, their sizes, and the shapes of their low-rank factors."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from federated.updates.update import RefusedUpdate, SparseUpdate
from federated.wire.columns import zstd_pack, zstd_unpack
from federated.wire.container import MAX_UNIT_SIZE


class UnitRow(NamedTuple):
    """Row of the units column; the last three fields are zero for a unit without low-rank factors."""

    layer: int
    expert: int
    size: int
    rows: int
    columns: int
    rank: int

    @property
    def factor_values(self) -> int:
        """Number of values in both factors."""
        return self.rank * (self.rows + self.columns)

    def valid(self) -> bool:
        """Whether size and factor shape are within bounds."""
        area, side = self.rows * self.columns, min(self.rows, self.columns)
        factors = 0 < self.rank <= side and area <= self.size
        return 0 <= self.size <= MAX_UNIT_SIZE and (
            factors or (self.rows, self.columns, self.rank) == (0, 0, 0)
        )


def pack_units(update: SparseUpdate) -> bytes:
    """Pack the rows of all units, int64 [6, units], in unit order."""
    vectors = update.vectors
    rows = [(*unit, vectors[unit].size, *vectors[unit].factor_shape) for unit in sorted(vectors)]
    return zstd_pack(np.array(rows, dtype="<i8").reshape(-1, len(UnitRow._fields)).T.tobytes())


def read_units(column: bytes, count: int) -> list[UnitRow]:
    """Read ``count`` rows; RefusedUpdate for sizes or shapes out of bounds."""
    fields = len(UnitRow._fields)
    table = np.frombuffer(zstd_unpack(column, size=8 * fields * count), dtype="<i8").reshape(fields, count)
    units = [UnitRow(*row) for row in table.T.tolist()]
    # Vectorized check for the common case, many units without factors.
    sizes, factors = table[2], table[3:]
    valid = all(unit.valid() for unit in units) if factors.any() else (sizes >= 0) & (sizes <= MAX_UNIT_SIZE)
    if not np.all(valid):
        raise RefusedUpdate("unit size out of range")
    return units
