"""Directories that cannot be renamed: mount points and directories in a parent that is not writable."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from configs.directory_placement import (
    MARKER,
    entries,
    place_directory,
    remove_partials,
    staging_parent,
)
from configs.output import OutputKept, check_output_directory, new_directory
from tests.support.paths import ROOT

# Writes a checkpoint of two files and a folder twice into the directory of the first argument; prints its content.
WRITES = """
import os, sys
from pathlib import Path
from configs.output import check_output_directory, new_directory
out = Path(sys.argv[1])
for content in ("one", "two"):
    check_output_directory(out, overwrite=content == "two")
    with new_directory(out, overwrite=content == "two") as directory:
        (directory / "config.json").write_text(content)
        (directory / "sub").mkdir()
        (directory / "sub" / content).touch()
print(*sorted(str(path.relative_to(out)) for path in out.rglob("*")), (out / "config.json").read_text())
"""
NOBODY = 65534  # user without rights
WRITTEN = "config.json sub sub/two two\n"


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture
def out(tmp_path, monkeypatch) -> Path:
    """An empty directory that no rename may name, as a mount point that is in no list of mounts."""
    out = tmp_path / "out"
    out.mkdir()
    replace = os.replace

    def busy(source, target):
        if out in (Path(source), Path(target)):
            raise OSError(errno.EBUSY, "Device or resource busy")
        replace(source, target)

    monkeypatch.setattr(os, "replace", busy)
    return out


@pytest.fixture
def mounted(out, monkeypatch) -> Path:
    """The same, in the list of mounts."""
    monkeypatch.setattr("configs.directory_placement._is_mount_point", lambda path: path == out)
    return out


def write(out: Path, *files: str, overwrite: bool = False) -> Path:
    with new_directory(out, overwrite=overwrite) as directory:
        for name in files:
            (directory / name).write_text(name)
    return directory


@pytest.mark.parametrize("kind", ["out", "mounted"])
def test_a_busy_directory_receives_the_entries(kind, request, tmp_path):
    out = request.getfixturevalue(kind)
    staged = write(out, "a", MARKER)
    assert staged.parent == (out if kind == "mounted" else tmp_path)
    assert names(out) == ["a", MARKER] and names(tmp_path) == ["out"]
    write(out, "b", MARKER, overwrite=True)
    assert names(out) == ["b", MARKER] and names(tmp_path) == ["out"]
    assert (out / "b").read_text() == "b"


def test_what_the_file_system_keeps_at_its_top_is_no_content_and_stays(mounted):
    (mounted / "lost+found").mkdir()
    check_output_directory(mounted, overwrite=False)
    write(mounted, "a")
    assert names(mounted) == ["a", "lost+found"] and entries(mounted) == ["a"]


def test_the_configuration_disappears_first_and_appears_last(mounted, monkeypatch):
    write(mounted, "z", MARKER)
    replace, moved = os.replace, []

    def record(source, target):
        moved.append((Path(source).name, Path(source).parent == mounted))
        replace(source, target)

    monkeypatch.setattr(os, "replace", record)
    write(mounted, "a", "z", MARKER, overwrite=True)
    assert moved == [(MARKER, True), ("z", True), ("a", False), ("z", False), (MARKER, False)]


def test_a_move_that_fails_restores_the_old_content_and_keeps_the_new(mounted, tmp_path, monkeypatch):
    write(mounted, "old", MARKER)
    replace = os.replace

    def fail(source, target):
        if Path(target) == mounted / MARKER and Path(source).parent.name.startswith(".out.") and not failed:
            failed.append(target)
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    failed: list[Path] = []
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OutputKept, match="No space left on device; it is complete in") as error:
        write(mounted, "new", MARKER, overwrite=True)
    kept = error.value.folder
    assert str(kept) in str(error.value)
    assert names(kept) == [MARKER, "new"] and names(mounted) == sorted([kept.name, MARKER, "old"])
    assert names(tmp_path) == ["out"]


def test_a_copy_that_fails_keeps_the_staged_directory(out, tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("configs.directory_placement.shutil.copytree", full)
    with pytest.raises(OutputKept, match="No space left") as error:
        write(out, "a")
    assert names(out) == [] and names(tmp_path) == [error.value.folder.name, "out"]
    assert (error.value.folder / "a").read_text() == "a"


def test_a_directory_in_a_parent_that_is_not_writable_is_staged_inside(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    assert staging_parent(tmp_path / "out") == tmp_path
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    assert staging_parent(tmp_path / "out") == tmp_path / "out"
    assert write(tmp_path / "out", "a").parent == tmp_path / "out"
    assert names(tmp_path / "out") == ["a"]


def test_a_staged_directory_beside_is_renamed(tmp_path):
    (tmp_path / "staged").mkdir()
    (tmp_path / "staged" / "a").touch()
    place_directory(tmp_path / "staged", tmp_path / "out")
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["a"]


@pytest.mark.parametrize("kind", ["tmpfs", "bind"])
def test_a_real_mount_point_is_written(tmp_path, kind):
    (tmp_path / "out").mkdir()
    (tmp_path / "source").mkdir()
    mount = ["mount", "-t", "tmpfs", "none"] if kind == "tmpfs" else ["mount", "--bind", tmp_path / "source"]
    script = 'out=$1; shift; "$@" "$out" || exit 77; exec "$PYTHON" -c "$CODE" "$out"'
    try:
        result = subprocess.run(
            ["unshare", "--mount", "sh", "-c", script, "sh", tmp_path / "out", *mount],
            env=dict(os.environ) | {"PYTHON": sys.executable, "CODE": WRITES},
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
    except FileNotFoundError:
        pytest.skip("no unshare on this machine")
    if result.returncode == 77 or "unshare" in result.stderr:
        pytest.skip(f"no mount on this machine: {result.stderr}")
    assert (result.stdout, result.returncode) == (WRITTEN, 0), result.stderr
    assert names(tmp_path / "out") == []


@pytest.mark.skipif(os.getuid() != 0, reason="only root can change to a user who may not write")
def test_a_writable_directory_in_a_real_parent_that_is_not(tmp_path):
    out = tmp_path / "parent" / "out"
    out.mkdir(parents=True)
    out.parent.chmod(0o555)
    for folder in (tmp_path, *tmp_path.parents[:-2]):  # pytest's own folders are those of one user
        folder.chmod(0o755)
    os.chown(out, NOBODY, NOBODY)
    assert as_nobody(lambda: write(out, "a", MARKER).parent.name) == "out"
    assert as_nobody(lambda: write(out, "b", MARKER, overwrite=True).parent.name) == "out"
    assert names(out) == ["b", MARKER] and names(out.parent) == ["out"]
    refused = as_nobody(lambda: check_output_directory(out.parent / "absent", overwrite=False))
    assert "can be written" in refused and "Permission denied" in refused


def as_nobody(function: Callable[[], object]) -> str:
    """Text of the result or the error of a function in a fork of this process with the rights of another user."""
    receive, send = os.pipe()
    if not (child := os.fork()):
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            result = str(function())
        except BaseException as error:
            result = f"{type(error).__name__}: {error}"
        os.write(send, result.encode())
        os._exit(0)
    os.close(send)
    os.waitpid(child, 0)
    with os.fdopen(receive) as stream:
        return stream.read()


def test_what_killed_processes_left_for_a_directory_is_removed_and_nothing_else(tmp_path):
    path = tmp_path / "out[1]"
    for name in (".out[1].a.partial", ".out[1].b.partial", ".out1.a.partial", ".other.a.partial", "out[1]"):
        (tmp_path / name / "x").mkdir(parents=True)
    remove_partials(path)
    kept = [".other.a.partial", ".out1.a.partial", "out[1]"]
    assert sorted(each.name for each in tmp_path.iterdir()) == kept
    remove_partials(tmp_path / "absent" / "out")
