"""Writing results so that nothing is ever half written: a temporary name beside the target, then a rename."""

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
    """Refuse an output directory that holds something, before any work is done.

    Raises:
        UserError: the directory is not empty and ``overwrite`` is false, or it is the working or home directory or
            holds one of them, which are never replaced; the path or a part of it is a file; nothing can be made there.
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
        raise UserError(f"expected an empty output directory, got {path} with files in it; pass --overwrite")
    for kept in (Path.cwd(), Path.home()):
        if path.resolve() in (kept.resolve(), *kept.resolve().parents):
            raise UserError(
                f"expected an output directory that may be replaced, got {path}, which holds {kept}"
            )


def check_output_file(path: Path, *, overwrite: bool) -> None:
    """Refuse an output file that is there already, before any work is done.

    Raises:
        UserError: the file is there and ``overwrite`` is false; it is a directory; it cannot be made there.
    """
    path = path.absolute()
    if path.is_dir():
        raise UserError(f"expected an output file, got the directory {path}; name a file")
    parent = next(part for part in path.parents if part.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"expected an output file that can be written, got {path}; choose another")
    if path.exists() and not overwrite:
        raise UserError(f"expected an output file that is not there yet, got {path}; pass --overwrite")


@contextmanager
def new_directory(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary directory that takes the name ``path`` when the block ends without an error.

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
    """Give ``new`` the name ``path``; what was there is deleted only when the new content is in its place."""
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
    """Yield a file to write that takes the name ``path`` when the block ends without an error, in one step."""
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
    """Write a file in one step; readers see the old content or the new, never a part."""
    with replacing(path) as file:
        file.write(data)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON in one step; NaN and infinities are refused."""
    write_bytes(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def finite(value: Any) -> Any:
    """``value`` in types that JSON has: arrays as lists, scalars unwrapped, NaN and infinities as None."""
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
