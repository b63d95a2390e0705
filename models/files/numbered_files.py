"""Safetensors files of a folder that differ in a number, such as the round that they are of."""

from __future__ import annotations

from pathlib import Path


class NumberedFiles:
    """Files ``NAME-NUMBER.safetensors``.

    Args:
        folder: folder of the files.
        name: NAME.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name = Path(folder), name

    def path(self, number: int) -> Path:
        """Path of the file of ``number``, which need not exist."""
        return self._folder / f"{self._name}-{number}.safetensors"

    def numbers(self) -> list[int]:
        """Numbers of the files that exist, ascending."""
        found = (
            path.stem.removeprefix(f"{self._name}-")
            for path in self._folder.glob(f"{self._name}-*.safetensors")
        )
        return sorted(int(text) for text in found if text.isascii() and text.isdigit())
