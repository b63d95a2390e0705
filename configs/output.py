"""Writing results so that nothing is ever half written: a temporary name beside the target, then a rename."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from configs.errors import UserError


def check_output_directory(path: Path, *, overwrite: bool) -> None:
    """Refuse an output directory that holds something, before any work is done.

    Raises:
        UserError: the directory is not empty and ``overwrite`` is false, or the path is a file.
    """
    if path.is_file():
        raise UserError(f"expected an output directory, got the file {path}; name a directory")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise UserError(f"expected an empty output directory, got {path} with files in it; pass --overwrite")


@contextmanager
def new_directory(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary directory that takes the name ``path`` when the block ends without an error.

    Raises:
        UserError: as ``check_output_directory``.
    """
    path = path.absolute()
    check_output_directory(path, overwrite=overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    try:
        yield partial
        partial.chmod(0o755)
        if path.exists():
            shutil.rmtree(path)
        os.replace(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file in one step; readers see the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(partial, 0o644)
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON in one step; NaN and infinities are refused."""
    write_bytes(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())
