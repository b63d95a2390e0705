"""Packed updates of one round on disk, so that the server's memory does not grow with the number of clients."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class SpooledBytes:
    """Bytes in a file.

    Attributes:
        path: of the file.
        size: in bytes.
    """

    path: Path
    size: int

    def read(self) -> bytes:
        """All of them."""
        return self.path.read_bytes()


class ReplySpool:
    """A folder that takes bytes as they come in and is gone after its ``with`` block.

    Args:
        parent: folder in which it is made; on a disk, where it matters that the memory stays free.
    """

    def __init__(self, parent: Path) -> None:
        Path(parent).mkdir(parents=True, exist_ok=True)
        self.folder = Path(tempfile.mkdtemp(prefix=".replies.", dir=parent))
        self._count = 0

    def put(self, data: bytes) -> SpooledBytes:
        """Write ``data`` to a file of its own."""
        self._count += 1
        path = self.folder / f"{self._count}.update"
        path.write_bytes(data)
        return SpooledBytes(path, len(data))

    def close(self) -> None:
        """Remove the folder with all it holds."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> ReplySpool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
