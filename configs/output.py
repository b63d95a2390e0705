"""Atomic output: files and directories are written under a temporary name next to the target, then renamed."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from configs.errors import UserError


def check_output_directory(path: Path, *, overwrite: bool) -> None:
    """Check that an output directory can be written and is empty, or may be replaced.

    Raises:
        UserError: the directory is not empty and ``overwrite`` is false; it is or contains the working or home
            directory, which are never replaced; the path or a part of it is a file; it is not writable.
    """
    path = path.absolute()
    parent = next(part for part in (path, *path.parents) if part.exists())
    if not parent.is_dir():
        raise UserError(f"expected an output directory, got the file {parent}; name a directory")
    if not os.access(parent, os.W_OK):
        raise UserError(f"expected an output directory that can be written, got {path}; choose another")
    if parent != path or not any(path.iterdir()):
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
    parent = next(part for part in path.parents if part.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"expected an output file that can be written, got {path}; choose another")
    if path.exists() and not overwrite:
        raise UserError(f"expected an output file that does not exist, got {path}; set `overwrite`")


@contextmanager
def new_directory(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary directory that is renamed to ``path`` when the block ends without an error.

    Raises:
        UserError: as ``check_output_directory``.
    """
    path = path.resolve()
    check_output_directory(path, overwrite=overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    try:
        yield partial
        partial.chmod(0o755)
        check_output_directory(path, overwrite=overwrite)
        _replace_directory(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _replace_directory(new: Path, path: Path) -> None:
    """Rename ``new`` to ``path``; a directory of that name is deleted after the rename, and restored if it fails."""
    if not path.exists():
        os.replace(new, path)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    try:
        os.replace(path, old)
        try:
            os.replace(new, path)
        except BaseException:
            os.replace(old, path)
            raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Yield a temporary file that is renamed to ``path`` when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        os.chmod(partial, 0o644)
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically: a reader sees the old content or the new, never a part."""
    with replacing(path) as file:
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
