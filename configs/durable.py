"""Flush of files and folders to disk (fsync), so that a rename is not on disk before the content it names."""

from __future__ import annotations

import errno
import os
from pathlib import Path

# Errors of file systems that cannot flush a folder, e.g. network shares.
_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EACCES)


def sync_folder(folder: Path) -> None:
    """Flush the entries of a folder to disk; no effect where the file system does not support it."""
    try:
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise


def sync_tree(folder: Path) -> None:
    """Flush the content of every file below ``folder``, then the entries of every folder, to disk."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            _sync_file(Path(parent, name))
        sync_folder(Path(parent))


def _sync_file(path: Path) -> None:
    if path.is_symlink() or not path.is_file():
        return
    with path.open("rb") as file:
        os.fsync(file.fileno())
