"""Container of a packed update: its header and its four byte columns."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Literal

from pydantic import Field

from federated.wire.byte_columns import ColumnsHeader, read_columns, write_columns

COLUMNS = ("codes", "index", "scales", "units")
MAX_UNITS = 1 << 20
MAX_UNIT_SIZE = 1 << 42


class Header(ColumnsHeader):
    """Header of a packed update: the graph it was computed on, its units, kept entries and coding."""

    format: Literal[2] = 2
    graph_version: int
    graph_hash: str = Field(max_length=128)
    units: int = Field(ge=0, le=MAX_UNITS)
    count: int = Field(ge=0, le=MAX_UNITS * MAX_UNIT_SIZE)
    index: Literal["runs", "bitmask"]
    value_bits: Literal[2, 4, 8, 16]
    exponent: int
    checksum: str = ""


def write_container(header: Header, columns: Mapping[str, bytes]) -> bytes:
    """Serialize a header, its checksum filled in here, and the four ``COLUMNS``."""
    return write_columns(header, columns, _checksum)


def read_container(data: bytes) -> tuple[Header, dict[str, bytes]]:
    """Parse and verify the bytes of ``write_container``; RefusedUpdate for other bytes."""
    return read_columns(
        data, Header, _checksum, kind="a packed update", contents="four byte columns", names=COLUMNS
    )


def _checksum(header: Header, columns: Mapping[str, bytes]) -> str:
    """CRC-32 over the lengths and bytes of all parts: against accidents, and many times as fast as a digest."""
    value = 0
    for part in [header.unsigned(), *(columns[name] for name in COLUMNS)]:
        value = zlib.crc32(part, zlib.crc32(len(part).to_bytes(8, "little"), value))
    return f"{value:08x}"
