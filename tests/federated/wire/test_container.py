from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load, save

from federated.updates.update import RefusedUpdate
from federated.wire.container import COLUMNS, Header, read_container, write_container

HEADER = Header(
    graph_version=3, graph_hash="ab", units=1, count=2, index="runs", value_bits=4, exponent=-7, checksum=""
)
PARTS = {"units": b"u" * 5, "index": b"", "codes": b"\x00\x01", "scales": b"s"}
DATA = write_container(HEADER, PARTS)


def rewritten(**changes):
    """The container with some tensors replaced (None: removed), everything else as it was."""
    tensors = {**load(DATA), **changes}
    return save({name: tensor for name, tensor in tensors.items() if tensor is not None})


def header_bytes(**changes):
    fields = {**json.loads(load(DATA)["header"].tobytes()), **changes}
    return np.frombuffer(json.dumps(fields).encode(), dtype=np.uint8)


def test_round_trip_in_the_same_bytes():
    header, parts = read_container(DATA)
    assert parts == PARTS and set(parts) == set(COLUMNS)
    assert header.model_copy(update={"checksum": ""}) == HEADER and header.checksum
    assert write_container(HEADER, dict(reversed(PARTS.items()))) == DATA
    assert read_container(rewritten())[1] == PARTS


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"codes": None}, "four byte columns"),
        ({"extra": np.zeros(1, np.uint8)}, "four byte columns"),
        ({"codes": np.zeros(1, np.float32)}, "four byte columns"),
        ({"codes": np.zeros(2, np.uint8)}, "checksum"),
        ({"codes": np.zeros(0, np.uint8), "index": np.array([0, 1], np.uint8)}, "checksum"),
        ({"header": header_bytes(count=1)}, "checksum"),
        ({"header": header_bytes(graph_version=4)}, "checksum"),
        ({"header": header_bytes(checksum="")}, "checksum"),
        ({"header": header_bytes(count=-1)}, "count"),
        ({"header": header_bytes(count=10**30)}, "count"),
        ({"header": header_bytes(count=2.5)}, "count"),
        ({"header": header_bytes(units=2**21)}, "units"),
        ({"header": header_bytes(value_bits=3)}, "value_bits"),
        ({"header": header_bytes(format=1)}, "format"),
        ({"header": header_bytes(graph_hash="x" * 129)}, "graph_hash"),
        ({"header": header_bytes(more=1)}, "more"),
        ({"header": np.frombuffer(b"[" * 100_000, np.uint8)}, "header"),
        ({"header": np.frombuffer(b"\xff\xfe", np.uint8)}, "header"),
    ],
)
def test_each_defect_is_refused_with_its_reason(changes, reason):
    with pytest.raises(RefusedUpdate, match=reason):
        read_container(rewritten(**changes))


@pytest.mark.parametrize("data", [b"", b"abc", b"\xff" * 8, b"\xff" * 100, DATA[:-1], DATA + b"x", bytes(64)])
def test_bytes_that_are_no_container_are_refused(data):
    with pytest.raises(RefusedUpdate, match="not a packed update"):
        read_container(data)
