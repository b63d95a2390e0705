"""Disk spool for the packed updates of one round, so that memory does not grow with the number of clients."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

_PREFIX = ".replies."


@dataclass(frozen=True)
class HeldBytes:
    """Bytes in memory, with the interface of ``SpooledBytes``."""

    data: bytes

    @property
    def size(self) -> int:
        """Number of bytes."""
        return len(self.data)

    def read(self) -> bytes:
        """Return the bytes."""
        return self.data


@dataclass(frozen=True)
class SpooledBytes:
    """Bytes in a file.

    Attributes:
        path: of the file.
        size: number of bytes.
    """

    path: Path
    size: int

    def read(self) -> bytes:
        """Return the bytes."""
        return self.path.read_bytes()


def remove_spools(parent: Path) -> None:
    """Remove the spools that killed processes left in ``parent``."""
    for folder in Path(parent).glob(f"{_PREFIX}*"):
        shutil.rmtree(folder, ignore_errors=True)


class ReplySpool:
    """Temporary folder of packed updates, removed at the end of its ``with`` block.

    Args:
        parent: folder in which it is created; on disk rather than a RAM disk, to keep memory free.
    """

    def __init__(self, parent: Path) -> None:
        Path(parent).mkdir(parents=True, exist_ok=True)
        self.folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        self._count = 0

    def put(self, data: bytes) -> SpooledBytes:
        """Write ``data`` to a new file."""
        self._count += 1
        path = self.folder / f"{self._count}.update"
        path.write_bytes(data)
        return SpooledBytes(path, len(data))

    def close(self) -> None:
        """Remove the folder and its files."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> ReplySpool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
