from __future__ import annotations

import os

import pytest
import torch

from clients.state.weight_files import Place, WeightFiles


def test_vectors_are_read_back_while_the_file_is_written_and_by_another_process(tmp_path):
    files, vectors = WeightFiles(tmp_path / "new"), [torch.randn(size) for size in (5, 0, 1000, 3)]
    places = [files.append(7, vector) for vector in vectors]
    assert places[2] == Place("7.f32", 20, 1000)
    assert all(torch.equal(files.read(place), vector) for place, vector in zip(places, vectors, strict=True))
    later = files.append(7, torch.ones(2))
    assert files.read(later).tolist() == [1, 1]
    files.close_written()
    again = WeightFiles(tmp_path / "new")
    assert torch.equal(again.read(places[2]), vectors[2])


def test_views_and_other_dtypes_are_written_as_float32_in_their_order(tmp_path):
    files = WeightFiles(tmp_path)
    matrix = torch.arange(6, dtype=torch.bfloat16).view(2, 3)
    assert files.read(files.append(1, matrix.T.reshape(-1))).tolist() == [0, 3, 1, 4, 2, 5]


def test_a_new_version_starts_a_file_and_replaces_that_of_a_killed_process(tmp_path):
    (tmp_path / "2.f32").write_bytes(b"x" * 100)
    files = WeightFiles(tmp_path)
    first = files.append(1, torch.ones(1))
    files.close_written()
    second = files.append(2, torch.zeros(1))
    assert (first.name, second) == ("1.f32", Place("2.f32", 0, 1))
    files.close_written()
    assert (tmp_path / "2.f32").stat().st_size == 4


@pytest.mark.parametrize(
    "place", [Place("1.f32", 8, 1), Place("1.f32", 4, 2), Place("2.f32", 0, 1), Place("1.f32", -4, 1)]
)
def test_places_outside_of_a_file_are_a_value_error(tmp_path, place):
    files = WeightFiles(tmp_path)
    files.append(1, torch.ones(2))
    with pytest.raises(ValueError, match=place.name):
        files.read(place)


def test_files_less_than_half_in_use_are_found_and_the_unused_removed(tmp_path):
    files = WeightFiles(tmp_path)
    places = {}
    for version in (1, 2, 3):
        places[version] = [files.append(version, torch.ones(4)) for _ in range(4)]
        files.close_written()
    used = [*places[1][:1], *places[2][:2]]
    assert files.scattered(used) == {"1.f32"}
    files.read(places[3][0])
    files.keep_only(used)
    assert sorted(os.listdir(tmp_path)) == ["1.f32", "2.f32"]
