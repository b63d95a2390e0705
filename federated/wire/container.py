"""The safetensors container of a packed update: one header and four byte columns, under a checksum."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Literal

import numpy as np
import safetensors
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.numpy import save

from federated.updates.update import RefusedUpdate

COLUMNS = ("codes", "index", "scales", "units")
MAX_UNITS = 1 << 20
MAX_UNIT_SIZE = 1 << 42


class Header(BaseModel):
    """What describes a packed update; ``checksum`` covers the rest of the header and every column."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

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
    """Return the bytes of a header and the four ``COLUMNS``; its checksum is filled in here."""
    header = header.model_copy(update={"checksum": _checksum(header, columns)})
    parts = {"header": header.model_dump_json().encode(), **columns}
    return save({name: np.frombuffer(part, dtype=np.uint8) for name, part in parts.items()})


def read_container(data: bytes) -> tuple[Header, dict[str, bytes]]:
    """Return the header and the columns; bytes that no ``write_container`` wrote raise RefusedUpdate."""
    try:
        tensors = dict(safetensors.deserialize(data))
    except (safetensors.SafetensorError, ValueError, TypeError) as error:
        raise RefusedUpdate(f"not a packed update: {error}") from error
    if set(tensors) != {"header", *COLUMNS} or any(view["dtype"] != "U8" for view in tensors.values()):
        raise RefusedUpdate("not a packed update: expected a header and four byte columns")
    columns = {name: bytes(view["data"]) for name, view in tensors.items()}
    try:
        header = Header.model_validate_json(columns.pop("header"))
    except ValidationError as error:
        first = error.errors()[0]
        raise RefusedUpdate(f"header: {'.'.join(map(str, first['loc']))} {first['msg']}") from error
    if header.checksum != _checksum(header, columns):
        raise RefusedUpdate("checksum mismatch")
    return header, columns


def _checksum(header: Header, columns: Mapping[str, bytes]) -> str:
    """CRC-32 over the lengths and bytes of all parts: against accidents, and many times as fast as a digest."""
    value = 0
    for part in [header.model_copy(update={"checksum": ""}).model_dump_json().encode()] + [
        columns[name] for name in COLUMNS
    ]:
        value = zlib.crc32(part, zlib.crc32(len(part).to_bytes(8, "little"), value))
    return f"{value:08x}"
