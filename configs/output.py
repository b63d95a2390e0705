"""Atomic output: files and directories are written under a temporary name, flushed to disk and moved to their place."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from configs.directory_placement import entries, partial_directory, place_directory, staging_parent
from configs.durable import sync_folder, sync_tree
from configs.errors import UserError, first_line


class OutputKept(OSError):
    """A finished output directory that could not be moved to its place, and was kept where it is.

    Attributes:
        folder: the finished directory.
    """

    def __init__(self, folder: Path, path: Path, reason: str) -> None:
        super().__init__(f"the output could not be moved to {path}: {reason}; it is complete in {folder}")
        self.folder = folder


def check_output_directory(path: Path, *, overwrite: bool, size: int = 0) -> None:
    """Check that an output directory can be written and is empty, or may be replaced.

    Args:
        path: of the directory; it need not exist.
        overwrite: whether its content may be replaced.
        size: bytes that will be written; 0: unknown.

    Raises:
        UserError: the directory is not empty and ``overwrite`` is false; it is or contains the working or home
            directory, which are never replaced; the path or a part of it is a file; it is not writable; its file system
            has less than ``size`` bytes free.
    """
    path = path.absolute()
    parent = _existing(path)
    if not parent.is_dir():
        raise UserError(f"expected an output directory, got the file {parent}; name a directory")
    _check_writable(staging_parent(path) if parent == path else parent, path)
    _check_writable(parent, path)
    check_free_space({path: size})
    if parent == path:
        _check_replaceable(path, overwrite=overwrite)


def check_free_space(sizes: Mapping[Path, int]) -> None:
    """Check that file systems have room for outputs.

    Args:
        sizes: bytes of each output by its path, which need not exist; those on one file system add up.

    Raises:
        UserError: a file system has fewer bytes free than its outputs need.
    """
    needed: Counter[int] = Counter()
    for path, size in sizes.items():
        folder = _existing(path.absolute())
        needed[folder.stat().st_dev] += size
        if (free := shutil.disk_usage(folder).free) < (total := needed[folder.stat().st_dev]):
            raise UserError(
                f"expected {_mib(total)} free on the file system of {path}, got {_mib(free)}; make room or choose "
                "another"
            )


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


def _existing(path: Path) -> Path:
    """The path itself or its nearest parent that exists."""
    return next(part for part in (path, *path.parents) if part.exists())


def _check_writable(directory: Path, path: Path, kind: str = "directory") -> None:
    """Check the permissions of ``directory``, and that an entry can be created: file systems may refuse it, too."""
    reason = "" if os.access(directory, os.W_OK) else "permission denied"
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".fedgraft.", suffix=".partial", dir=directory))
    except OSError as error:
        reason = error.strerror or first_line(error)
    if reason:
        raise UserError(
            f"expected an output {kind} that can be written, got {path} ({reason}); choose another"
        )


def _check_replaceable(path: Path, *, overwrite: bool, staged: str = "") -> None:
    """Check that a directory is empty apart from the entry ``staged``, or may be replaced."""
    if not entries(path, without=(staged,)):
        return
    if not overwrite:
        raise UserError(f"expected an empty output directory, got {path} with files in it; set `overwrite`")
    for kept in (Path.cwd(), Path.home()):
        if path.resolve() in (kept.resolve(), *kept.resolve().parents):
            raise UserError(
                f"expected an output directory that may be replaced, got {path}, which holds {kept}"
            )


def check_output_file(path: Path, *, overwrite: bool) -> None:
    """Check that an output file can be written and does not exist, or may be replaced.

    Raises:
        UserError: the file exists and ``overwrite`` is false; it is a directory; its directory is not writable.
    """
    path = path.absolute()
    if path.is_dir():
        raise UserError(f"expected an output file, got the directory {path}; name a file")
    parent = _existing(path.parent)
    if not parent.is_dir():
        raise UserError(
            f"expected an output file that can be written, got {path} below a file; choose another"
        )
    _check_writable(parent, path, "file")
    if path.exists() and not overwrite:
        raise UserError(f"expected an output file that does not exist, got {path}; set `overwrite`")


@contextmanager
def new_directory(path: Path, *, overwrite: bool = False, size: int = 0) -> Iterator[Path]:
    """Yield a temporary directory that is moved to ``path`` when the block ends without an error.

    Args:
        path: of the directory; its parents are created.
        overwrite: whether its content may be replaced.
        size: bytes that will be written; 0: unknown.

    Raises:
        UserError: as ``check_output_directory``.
        OutputKept: the finished directory could not be moved to ``path``, and is kept where the error says.
    """
    path = path.resolve()
    check_output_directory(path, overwrite=overwrite, size=size)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_directory(path)
    try:
        yield partial
        partial.chmod(0o755)
        sync_tree(partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    try:
        if path.exists():
            _check_replaceable(path, overwrite=overwrite, staged=partial.name)
        place_directory(partial, path)
    except (OSError, UserError) as error:
        raise OutputKept(partial, path, str(error)) from error


@contextmanager
def replacing(path: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """Yield a temporary file that is renamed to ``path`` when the block ends without an error.

    Args:
        path: of the file; its parents are created.
        durable: flush the file and its name to disk; otherwise a power failure may leave any content under the name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.chmod(partial, 0o644)
        os.replace(partial, path)
        if durable:
            sync_folder(path.parent)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


def write_bytes(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Write a file atomically: a reader sees the old content or the new, never a part; ``durable`` as ``replacing``."""
    with replacing(path, durable=durable) as file:
        file.write(data)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON atomically; NaN and infinities are refused."""
    write_bytes(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def finite(value: Any) -> Any:
    """Convert ``value`` to JSON types: arrays to lists, array scalars to numbers, NaN and infinities to None."""
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
