from __future__ import annotations

import zlib

import numpy as np
import pytest
from safetensors.numpy import load, save

from federated.updates.update import RefusedUpdate
from federated.wire.byte_columns import ColumnsHeader, read_columns, write_columns


class Header(ColumnsHeader):
    version: int
    checksum: str = ""


def checksum(header: Header, columns) -> str:
    joined = b"".join(name.encode() + columns[name] for name in sorted(columns))
    return f"{zlib.crc32(header.unsigned() + joined):08x}"


COLUMNS = {"a": b"\x00\x01", "b": b""}
DATA = write_columns(Header(version=3), COLUMNS, checksum)


def read(data: bytes, names=None):
    return read_columns(data, Header, checksum, kind="a test", contents="byte columns", names=names)


def with_parts(**changes) -> bytes:
    parts = {**load(DATA), **changes}
    return save({name: part for name, part in parts.items() if part is not None})


def test_header_and_columns_come_back_and_equal_contents_are_equal_bytes():
    header, columns = read(DATA)
    assert (header.version, columns) == (3, COLUMNS) and header.checksum == checksum(header, COLUMNS)
    assert read(DATA, names=("a", "b")) == (header, columns)
    assert write_columns(Header(version=3), dict(reversed(COLUMNS.items())), checksum) == DATA


@pytest.mark.parametrize(
    ("data", "names", "reason"),
    [
        (b"rubbish", None, "not a test: "),
        (DATA[:-1], None, "not a test: "),
        (with_parts(header=None), None, "not a test: expected a header and byte columns"),
        (with_parts(a=np.zeros(2, np.float32)), None, "not a test: expected a header and byte columns"),
        (with_parts(c=np.zeros(1, np.uint8)), ("a", "b"), "not a test: expected a header and byte columns"),
        (with_parts(b=None), ("a", "b"), "not a test: expected a header and byte columns"),
        (with_parts(a=np.zeros(2, np.uint8)), None, "checksum mismatch"),
        (with_parts(header=np.frombuffer(b'{"version": "3"}', np.uint8)), None, "header: version"),
        (with_parts(header=np.frombuffer(b'{"version": 3, "x": 1}', np.uint8)), None, "header: x"),
    ],
)
def test_other_bytes_are_refused_with_their_reason(data, names, reason):
    with pytest.raises(RefusedUpdate) as caught:
        read(data, names)
    assert caught.value.reason.startswith(reason) and "\n" not in caught.value.reason
