"""Move of a finished directory to its place: by a rename, or entry by entry into a directory that cannot be renamed."""

from __future__ import annotations

import errno
import glob
import os
import shutil
import tempfile
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil

from configs.durable import sync_folder, sync_tree

# A checkpoint is loaded by this file: it disappears first and appears last, so that no mixture of two is loaded.
MARKER = "config.json"
_OF_FILE_SYSTEM = "lost+found"  # entry at the top of an ext file system
# Errors of a rename that is not possible where writing into the directory may be.
_NOT_RENAMED = (errno.EBUSY, errno.EXDEV, errno.EACCES, errno.EPERM, errno.EROFS)


def entries(directory: Path, *, without: Iterable[str] = ()) -> list[str]:
    """Names in a directory, sorted, without ``lost+found`` and those of ``without``."""
    return sorted({path.name for path in directory.iterdir()} - {_OF_FILE_SYSTEM, *without})


def staging_parent(path: Path) -> Path:
    """Directory in which the future content of the directory ``path`` is written.

    Beside ``path``, to be renamed, except inside ``path`` where that is a mount point or its parent is not writable.
    """
    path = path.resolve()
    if path.is_dir() and (_is_mount_point(path) or not os.access(path.parent, os.W_OK | os.X_OK)):
        return path
    return path.parent


def partial_directory(path: Path) -> Path:
    """Create the temporary directory, in ``staging_parent(path)``, that will be moved to ``path``."""
    return Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=staging_parent(path)))


def remove_partials(path: Path) -> None:
    """Remove the temporary directories that killed processes left for the directory ``path``."""
    for folder in staging_parent(path).glob(f".{glob.escape(path.name)}.*.partial"):
        shutil.rmtree(folder, ignore_errors=True)


def place_directory(staged: Path, path: Path) -> None:
    """Move ``staged`` to ``path``, or its entries into ``path`` where that cannot be renamed.

    Old content of ``path`` is deleted afterwards, and restored if a move fails.

    Args:
        staged: finished directory beside or inside ``path``, as ``partial_directory`` creates it, flushed to disk.
        path: absolute path without links.

    Raises:
        OSError: ``staged`` and ``path`` are as before.
    """
    if staged.parent == path:
        _fill(staged, path)
        return
    try:
        _rename(staged, path)
    except OSError as error:
        if error.errno not in _NOT_RENAMED or not path.is_dir():
            raise
        _copy_and_fill(staged, path)


def _rename(staged: Path, path: Path) -> None:
    old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    try:
        _move([(path, old), (staged, path)] if path.exists() else [(staged, path)])
    finally:
        shutil.rmtree(old, ignore_errors=True)
    sync_folder(path.parent)


def _copy_and_fill(staged: Path, path: Path) -> None:
    """Fill ``path``, which may be on another file system, from a copy of ``staged``."""
    inner = path / staged.name
    try:
        shutil.copytree(staged, inner)
        sync_tree(inner)
        _fill(inner, path)
    except BaseException:
        shutil.rmtree(inner, ignore_errors=True)
        raise
    shutil.rmtree(staged, ignore_errors=True)


def _fill(staged: Path, path: Path) -> None:
    """Move the entries of ``path`` out and those of ``staged``, which is inside it, in."""
    old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path))
    gone = _marker_last(entries(path, without=(staged.name, old.name)))[::-1]
    new = _marker_last(entries(staged))
    try:
        _move([(path / name, old / name) for name in gone] + [(staged / name, path / name) for name in new])
    finally:
        shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(staged, ignore_errors=True)
    sync_folder(path)


def _move(moves: Iterable[tuple[Path, Path]]) -> None:
    """Rename each pair in order; those done are undone, last first, if one fails."""
    with ExitStack() as undo:
        for source, target in moves:
            if target.name == MARKER:
                sync_folder(target.parent)
            os.replace(source, target)
            undo.callback(os.replace, target, source)
        undo.pop_all()


def _marker_last(names: list[str]) -> list[str]:
    return sorted(names, key=lambda name: name == MARKER)


def _is_mount_point(path: Path) -> bool:
    """Whether a file system is mounted at ``path``, also a folder of the same file system (bind mount)."""
    if os.path.ismount(path):
        return True
    with suppress(OSError):  # no list of mounts in a sandbox
        return any(partition.mountpoint == str(path) for partition in psutil.disk_partitions(all=True))
    return False
