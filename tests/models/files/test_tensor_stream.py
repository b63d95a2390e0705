from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from configs.errors import UserError
from models.files.safetensors_files import StoredTensor, stored_tensors
from models.files.tensor_stream import NewTensor, count_parameters, file_bytes, write_tensors


@pytest.fixture
def stored(tmp_path) -> dict[str, StoredTensor]:
    """A file with tensors of several dtypes and shapes."""
    torch.manual_seed(0)
    values = {
        "matrix": torch.randn(7, 5),
        "experts": torch.randn(6, 3, 4).to(torch.bfloat16),
        "flags": torch.rand(4, 4) > 0.5,
        "numbers": torch.arange(12).view(3, 4),
        "scalar": torch.tensor(2.5),
        "none": torch.zeros(0, 3),
        "large": torch.randn(3, 200_000),
    }
    save_file(values, tmp_path / "source.safetensors")
    return {tensor.name: tensor for tensor in stored_tensors(tmp_path / "source.safetensors")}


def written(directory: Path, tensors: list[NewTensor]) -> dict[str, torch.Tensor]:
    path = directory / "new.safetensors"
    write_tensors(path, tensors)
    assert path.stat().st_size == file_bytes(tensors)
    return load_file(path)


def source(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "source.safetensors")


def test_copied_tensors_are_equal_bit_for_bit(tmp_path, stored):
    values = written(tmp_path, [NewTensor(f"new.{name}", tensor) for name, tensor in stored.items()])
    assert set(values) == {f"new.{name}" for name in stored}
    for name, before in source(tmp_path).items():
        assert values[f"new.{name}"].dtype == before.dtype and torch.equal(values[f"new.{name}"], before)


@pytest.mark.parametrize("rows", [[0], [5], [0, 1, 2], [1, 3, 4, 5], [0, 2, 5], [0, 1, 2, 3, 4, 5], []])
def test_rows_are_those_of_indexing(tmp_path, stored, rows):
    values = written(tmp_path, [NewTensor("x", stored["experts"], rows=np.array(rows, dtype=np.int64))])
    assert torch.equal(values["x"], source(tmp_path)["experts"][rows])
    values = written(tmp_path, [NewTensor("x", stored["matrix"], rows=np.array(rows, dtype=np.int64))])
    assert torch.equal(values["x"], source(tmp_path)["matrix"][rows])


def test_given_values_take_the_place_of_stored_ones(tmp_path, stored):
    given = {
        "flags": torch.tensor([[True, False]]),
        "experts": torch.randn(2, 2).to(torch.bfloat16).T,
        "scalar": torch.tensor(-1.0),
    }
    values = written(tmp_path, [NewTensor(name, stored[name], values=value) for name, value in given.items()])
    assert all(torch.equal(values[name], value) for name, value in given.items())


def test_pieces_are_of_a_mebibyte_at_most_and_all_are_told(tmp_path, stored):
    tensors = [NewTensor("x", stored["large"]), NewTensor("y", stored["large"], rows=np.array([0, 2]))]
    told = []
    write_tensors(tmp_path / "new.safetensors", tensors, on_bytes=told.append)
    assert sum(told) == sum(tensor.nbytes for tensor in tensors) == 5 * 200_000 * 4
    assert max(told) <= 1 << 20


def test_a_file_may_hold_no_tensor(tmp_path, stored):
    assert written(tmp_path, []) == {}


def test_parameters_are_the_floating_point_entries(stored):
    tensors = list(stored.values())
    assert count_parameters(tensors) == 7 * 5 + 6 * 3 * 4 + 1 + 600_000
    assert count_parameters([NewTensor("x", stored["experts"], rows=np.array([0, 4]))]) == 24
    assert (
        count_parameters([NewTensor("x", stored["flags"], values=torch.zeros(2, 2, dtype=torch.bool))]) == 0
    )


def test_a_source_that_is_cut_short_meanwhile_is_refused(tmp_path, stored):
    path = tmp_path / "source.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    last = max(stored.values(), key=lambda tensor: tensor.stop)
    with pytest.raises(UserError, match="got the end of the file"):
        write_tensors(tmp_path / "new.safetensors", [NewTensor("x", last)])
