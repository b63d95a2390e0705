"""Files that differ in a number."""

from __future__ import annotations

from models.files.numbered_files import NumberedFiles


def test_numbers_are_those_of_the_files_that_exist_and_of_no_others(tmp_path):
    files = NumberedFiles(tmp_path, "round")
    assert files.numbers() == []
    for number in (10, 9, 2):
        files.path(number).touch()
    for other in ("round-x.safetensors", "round.safetensors", "around-3.safetensors", "round-4.json"):
        (tmp_path / other).touch()
    assert files.numbers() == [2, 9, 10]
    assert files.path(7) == tmp_path / "round-7.safetensors"
