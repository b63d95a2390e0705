from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import save_file

from clients.checked_file import read_checked, write_checked

TENSORS = {
    "a": torch.arange(600.0).view(20, 30).T,
    "b": torch.zeros(0),
    "c": torch.ones(3, dtype=torch.uint8),
}


def damaged(data: bytes, damage: str) -> bytes:
    middle = len(data) // 2
    return {
        "empty": b"",
        "half": data[:middle],
        "one byte short": data[:-1],
        "garbage": b"\xff" * 300,
        "flipped bit": data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :],
        "last bit": data[:-1] + bytes([data[-1] ^ 1]),
        "other version": data.replace(b'"version":"1"', b'"version":"7"'),
        "other checksum": data.replace(b'"checksum":"', b'"checksun":"'),
    }[damage]


DAMAGES = [
    "empty",
    "half",
    "one byte short",
    "garbage",
    "flipped bit",
    "last bit",
    "other version",
    "other checksum",
]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "folder" / "x.safetensors"


def test_what_was_written_comes_back(path):
    write_checked(path, TENSORS, {"version": "1", "name": "n\u00e4me"})
    tensors, metadata = read_checked(path)
    assert tensors.keys() == TENSORS.keys() and metadata == {"version": "1", "name": "n\u00e4me"}
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)
    assert all(tensors[name].dtype == TENSORS[name].dtype for name in TENSORS)


def test_an_empty_file_of_no_tensors_is_whole(path):
    write_checked(path, {}, {})
    assert read_checked(path) == ({}, {})


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_counts_as_none(path, damage):
    write_checked(path, TENSORS, {"version": "1"})
    path.write_bytes(damaged(path.read_bytes(), damage))
    assert read_checked(path) is None


def test_no_file_and_a_file_without_checksum_count_as_none(path):
    assert read_checked(path) is None
    path.parent.mkdir()
    save_file({"a": torch.ones(2)}, path, metadata={"version": "1"})
    assert read_checked(path) is None


def test_a_write_that_dies_leaves_the_file_before(path, monkeypatch):
    write_checked(path, {"a": torch.ones(2)}, {})

    def die(*_):
        raise OSError("killed")

    monkeypatch.setattr("configs.output.os.replace", die)
    with pytest.raises(OSError, match="killed"):
        write_checked(path, {"a": torch.zeros(2)}, {})
    assert os.listdir(path.parent) == ["x.safetensors"]
    assert torch.equal(read_checked(path)[0]["a"], torch.ones(2))
