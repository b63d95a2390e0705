from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from configs.errors import UserError
from configs.output import (
    OutputKept,
    check_free_space,
    check_output_directory,
    check_output_file,
    new_directory,
    write_bytes,
    write_json,
)


class Interrupted(BaseException):
    """Stands for what ends a process in the middle of a write."""


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def assert_kept(error: OutputKept, parent: Path, content: list[str]) -> None:
    """The error names the only other directory in ``parent``, which has the content."""
    assert names(parent) == sorted([error.folder.name, "out"])
    assert str(error.folder) in str(error) and names(error.folder) == content


def test_a_directory_appears_only_when_it_is_whole(tmp_path):
    target = tmp_path / "deep" / "out"
    with new_directory(target) as directory:
        (directory / "a.txt").write_text("a")
        assert not target.exists() and directory.parent == target.parent
    assert names(target) == ["a.txt"] and names(target.parent) == ["out"]
    assert target.stat().st_mode & 0o777 == 0o755


def test_a_relative_path_means_the_directory_at_the_start(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    with new_directory(Path("out")) as directory:
        (directory / "a").touch()
        os.chdir(tmp_path / "elsewhere")
    assert names(tmp_path / "out") == ["a"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, Interrupted])
def test_an_interrupted_directory_leaves_nothing(tmp_path, error):
    with pytest.raises(error), new_directory(tmp_path / "out") as directory:
        (directory / "half").touch()
        raise error
    assert names(tmp_path) == []


def test_an_interrupted_overwrite_leaves_the_old_content(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    with pytest.raises(RuntimeError), new_directory(tmp_path / "out", overwrite=True) as directory:
        (directory / "new").touch()
        raise RuntimeError
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["old"]


def test_overwriting_replaces_everything(tmp_path):
    (tmp_path / "out" / "sub").mkdir(parents=True)
    (tmp_path / "out" / "old").touch()
    with new_directory(tmp_path / "out", overwrite=True) as directory:
        (directory / "new").touch()
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["new"]


def test_through_a_link_the_directory_that_it_names_is_replaced(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "old").touch()
    (tmp_path / "out").symlink_to(tmp_path / "real")
    with new_directory(tmp_path / "out", overwrite=True) as directory:
        (directory / "new").touch()
    assert (tmp_path / "out").is_symlink() and names(tmp_path / "real") == ["new"]
    assert names(tmp_path) == ["out", "real"]


def test_a_failed_rename_puts_the_old_content_back(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    replace = os.replace

    def failing(source, target):
        if Path(target).name == "out" and (Path(source) / "new").exists():
            raise OSError("disk gone")
        replace(source, target)

    with (
        pytest.raises(OutputKept, match="disk gone") as failed,
        new_directory(tmp_path / "out", overwrite=True) as directory,
    ):
        (directory / "new").touch()
        monkeypatch.setattr(os, "replace", failing)
    assert names(tmp_path / "out") == ["old"]
    assert_kept(failed.value, tmp_path, ["new"])


def test_the_working_and_the_home_directory_are_never_replaced(tmp_path, monkeypatch):
    (tmp_path / "home" / "work").mkdir(parents=True)
    (tmp_path / "home" / "work" / "precious").touch()
    monkeypatch.chdir(tmp_path / "home" / "work")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for path in (Path("."), Path(".."), tmp_path, tmp_path / "home"):
        with pytest.raises(UserError, match="may be replaced"):
            check_output_directory(path, overwrite=True)
    (tmp_path / "home" / "work" / "precious").unlink()
    check_output_directory(Path("."), overwrite=True)


def test_a_place_that_cannot_be_written_is_refused_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # root may write everywhere
    with pytest.raises(UserError, match="written"):
        check_output_directory(tmp_path / "absent" / "out", overwrite=False)


def test_a_file_system_that_refuses_an_entry_is_found_before_the_work(tmp_path, monkeypatch):
    def refused(**options):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr("configs.output.tempfile.mkdtemp", refused)
    with pytest.raises(UserError, match=r"out \(Disk quota exceeded\); choose another"):
        check_output_directory(tmp_path / "out", overwrite=False)
    with pytest.raises(UserError, match="output file .*quota exceeded"):
        check_output_file(tmp_path / "file", overwrite=False)


def test_room_is_checked_for_all_outputs_of_a_file_system_together(tmp_path, monkeypatch):
    monkeypatch.setattr("configs.output.shutil.disk_usage", lambda path: SimpleNamespace(free=3 << 20))
    check_free_space({tmp_path / "a": 1 << 20, tmp_path / "deep" / "b": 2 << 20})
    with pytest.raises(UserError, match=r"expected 3.5 MiB free on .*b, got 3.0 MiB; make room"):
        check_free_space({tmp_path / "a": 1 << 20, tmp_path / "deep" / "b": 5 << 19})
    check_output_directory(tmp_path / "out", overwrite=False, size=3 << 20)
    with (
        pytest.raises(UserError, match="expected 4.0 MiB free"),
        new_directory(tmp_path / "out", size=4 << 20),
    ):
        raise AssertionError("the block must not run")
    assert names(tmp_path) == []


def test_the_room_of_the_real_file_system_is_read(tmp_path):
    check_free_space({tmp_path: 1})
    with pytest.raises(UserError, match="MiB free"):
        check_free_space({tmp_path / "out": 1 << 60})


def test_a_full_directory_is_refused_before_and_after_the_work(tmp_path):
    (tmp_path / "out").mkdir()
    check_output_directory(tmp_path / "out", overwrite=False)
    with (
        pytest.raises(OutputKept, match="`overwrite`; it is complete in") as failed,
        new_directory(tmp_path / "out") as directory,
    ):
        (directory / "mine").touch()
        (tmp_path / "out" / "theirs").touch()
    assert names(tmp_path / "out") == ["theirs"]
    assert_kept(failed.value, tmp_path, ["mine"])
    with pytest.raises(UserError, match="`overwrite`"):
        check_output_directory(tmp_path / "out", overwrite=False)
    check_output_directory(tmp_path / "out", overwrite=True)


def test_a_file_is_never_taken_for_a_directory(tmp_path):
    (tmp_path / "out").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="directory"):
            check_output_directory(tmp_path / "out", overwrite=overwrite)
    with pytest.raises(UserError, match="directory"):
        check_output_directory(tmp_path / "out" / "below", overwrite=False)
    assert (tmp_path / "out").read_text() == "precious"
    check_output_directory(tmp_path / "absent" / "below", overwrite=False)


def test_bytes_are_written_in_one_step(tmp_path):
    path = tmp_path / "deep" / "file"
    write_bytes(path, b"one")
    write_bytes(path, b"two")
    assert path.read_bytes() == b"two" and names(path.parent) == ["file"]
    assert path.stat().st_mode & 0o777 == 0o644


def test_an_interrupted_write_leaves_the_old_content(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_bytes(path, b"old")

    def interrupted(source, target):
        assert Path(source).read_bytes() == b"new" and Path(source).parent == path.parent
        raise Interrupted

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(Interrupted):
        write_bytes(path, b"new")
    assert path.read_bytes() == b"old" and names(tmp_path) == ["file"]


def test_json_is_readable_and_strict(tmp_path):
    path = tmp_path / "value.json"
    write_json(path, {"a": [1, 2.5, None], "b": "ü"})
    assert json.loads(path.read_text()) == {"a": [1, 2.5, None], "b": "ü"} and path.read_text().endswith("\n")
    with pytest.raises(ValueError):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text())["b"] == "ü" and names(tmp_path) == ["value.json"]


def test_an_output_file_may_be_new_or_replaced_when_asked(tmp_path):
    check_output_file(tmp_path / "new" / "deep" / "file", overwrite=False)
    (tmp_path / "file").write_text("old")
    with pytest.raises(UserError, match="file; set `overwrite`"):
        check_output_file(tmp_path / "file", overwrite=False)
    check_output_file(tmp_path / "file", overwrite=True)
    with pytest.raises(UserError, match="can be written"):
        check_output_file(tmp_path / "file" / "below", overwrite=True)
    for directory in (tmp_path, Path("/")):
        with pytest.raises(UserError, match="got the directory"):
            check_output_file(directory, overwrite=True)
    assert not (tmp_path / "new").exists()
