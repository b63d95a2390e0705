from __future__ import annotations

import os
import weakref

import pytest
import torch
from safetensors.torch import save_file

from models.files.checked_file import (
    bytes_tensor,
    check_in_turn,
    read_checked,
    tensor_bytes,
    write_checked,
    write_in_turn,
)
from models.files.safetensors_files import read_stored

TENSORS = {
    "a": torch.arange(600.0).view(20, 30).T,
    "b": torch.zeros(0),
    "c": torch.ones(3, dtype=torch.uint8),
    "d": torch.tensor(7.5),
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


VECTORS = {
    "0.10": torch.arange(5.0),
    "0.2": torch.ones(70_000),
    "shipped": torch.tensor([0, 9], dtype=torch.uint8),
}


def test_what_was_written_in_turn_comes_back_in_turn(path):
    asked: list[str] = []

    def read(name: str) -> torch.Tensor:
        asked.append(name)
        return {**VECTORS, "0.3": torch.zeros(4)}[name]

    write_in_turn(path, ["shipped", "0.2", "0.3", "0.10"], read, {"version": "1", "name": 'n\u00e4"me'})
    assert asked == ["0.10", "0.2", "0.3", "shipped"]
    stored, metadata = check_in_turn(path)
    assert stored.keys() == VECTORS.keys()
    assert metadata == {"version": "1", "name": 'n\u00e4"me'}
    for name, vector in VECTORS.items():
        read_back = read_stored(stored[name])
        assert torch.equal(read_back, vector) and read_back.dtype == vector.dtype
    # The same file for everybody else: safetensors reads it, and so does the reader of whole files.
    tensors, _ = read_checked(path)
    assert all(torch.equal(tensors[name], vector) for name, vector in VECTORS.items())
    write_in_turn(path, [], read, {})
    assert check_in_turn(path) == ({}, {})


def test_what_was_written_whole_can_be_checked_in_turn(path):
    write_checked(path, TENSORS, {"version": "1"})
    stored, _ = check_in_turn(path)
    assert {name: tensor.shape for name, tensor in stored.items()} == {
        name: list(tensor.shape) for name, tensor in TENSORS.items()
    }
    assert all(torch.equal(read_stored(stored[name]), tensor) for name, tensor in TENSORS.items())


@pytest.mark.parametrize("damage", [each for each in DAMAGES if each != "other version"])
def test_damage_to_what_was_written_in_turn_is_noticed(path, damage):
    write_in_turn(path, VECTORS, VECTORS.__getitem__, {"version": "1"})
    data = path.read_bytes().replace(b'"checksum": "', b'"checksum":"')
    path.write_bytes(damaged(path.read_bytes() if "checksum" not in damage else data, damage))
    assert check_in_turn(path) is None


def test_a_header_that_outgrows_its_room_is_refused_and_leaves_no_file(path):
    with pytest.raises(ValueError, match="header"):
        write_in_turn(path, ["x" * 4000], lambda name: torch.ones(1), {})
    assert not path.exists() and os.listdir(path.parent) == []


def test_one_vector_at_a_time_is_in_memory_when_written_in_turn(path):
    alive: list[weakref.ref] = []

    def read(name: str) -> torch.Tensor:
        assert sum(reference() is not None for reference in alive) <= 1
        vector = torch.ones(10)
        alive.append(weakref.ref(vector))
        return vector

    write_in_turn(path, [str(number) for number in range(20)], read, {})
    assert len(alive) == 20


@pytest.mark.parametrize("data", [b"", b"\x00\xff packed"])
def test_bytes_survive_as_a_tensor(data):
    assert bytes_tensor(data).dtype == torch.uint8 and tensor_bytes(bytes_tensor(data)) == data
