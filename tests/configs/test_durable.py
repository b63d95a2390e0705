"""Flush to disk: which files and folders are flushed, in which order; which errors are raised."""

from __future__ import annotations

import errno
import os
import stat

import pytest

from configs.durable import sync_folder, sync_tree
from configs.output import new_directory, write_bytes


@pytest.fixture
def events(monkeypatch) -> list[str]:
    """Names of what is flushed and of the targets of renames, in order."""
    seen: list[str] = []
    fsync, replace = os.fsync, os.replace

    def record(handle: int) -> None:
        seen.append(os.path.basename(os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    def rename(source, target) -> None:
        seen.append(f"-> {os.path.basename(target)}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record)
    monkeypatch.setattr(os, "replace", rename)
    return seen


def test_a_tree_is_flushed_from_the_files_up(tmp_path, events):
    (tmp_path / "top" / "sub").mkdir(parents=True)
    (tmp_path / "top" / "a").touch()
    (tmp_path / "top" / "sub" / "b").touch()
    (tmp_path / "top" / "dangling").symlink_to(tmp_path / "absent")
    sync_tree(tmp_path / "top")
    assert events == ["b", "sub", "a", "top"]


def test_content_is_on_disk_before_the_rename_and_the_rename_before_the_end(tmp_path, events):
    write_bytes(tmp_path / "file", b"x")
    partial, *after = events
    assert partial.startswith(".file.") and after == ["-> file", tmp_path.name]
    events.clear()
    write_bytes(tmp_path / "cache", b"x", durable=False)
    assert events == ["-> cache"]
    events.clear()
    with new_directory(tmp_path / "out") as directory:
        (directory / "a").touch()
    assert events == ["a", directory.name, "-> out", tmp_path.name]


@pytest.mark.parametrize(("number", "raised"), [(errno.EINVAL, False), (errno.EIO, True)])
def test_a_folder_that_cannot_be_flushed_is_accepted_but_not_a_failure_to_write(
    tmp_path, monkeypatch, number, raised
):
    def fail(handle: int) -> None:
        assert stat.S_ISDIR(os.fstat(handle).st_mode)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    if raised:
        with pytest.raises(OSError, match="Input/output"):
            sync_folder(tmp_path)
    else:
        sync_folder(tmp_path)
