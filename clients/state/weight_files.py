"""Append-only files of float32 vectors, one file per version, in which a vector is found by offset and length.

A file per expert costs an open, a temporary name and a rename each; in a graph of 30 layers of 256 experts, most of
which move in every round, that takes longer than to compute what is written.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# Below this share of vectors still in use, those of a file are appended anew and the file is removed.
_LEAST_IN_USE = 0.5
_ITEM = 4


class Place(NamedTuple):
    """Place of a vector: ``size`` float32 from byte ``start`` of the file ``name``."""

    name: str
    start: int
    size: int


class WeightFiles:
    """Files ``VERSION.f32`` of a folder; one is written at a time, and read back at once.

    Files are not flushed one by one: content is verified by the digests of whoever keeps the places. None stays open
    between calls, so that a model over them can be copied.

    Args:
        folder: path, created on the first write.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = Path(folder)
        self._written = ""

    def append(self, version: int, vector: Tensor) -> Place:
        """Append a vector ``[n]`` to the file of a version; the first one replaces such a file of a killed process."""
        name, mode = f"{version}.f32", "ab"
        if name != self._written:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._written, mode = name, "wb"
        values = vector.detach().float().contiguous().numpy()
        with (self._folder / name).open(mode) as file:
            place = Place(name, file.tell(), values.size)
            file.write(values.data)
        return place

    def read(self, place: Place) -> Tensor:
        """Vector ``[n]`` of a place.

        Raises:
            ValueError: the file is missing, or ends before the vector does.
        """
        values = np.empty(place.size, dtype=np.float32)
        try:
            with (self._folder / place.name).open("rb", buffering=0) as file:
                read = os.preadv(file.fileno(), [values.data], place.start) if values.size else 0
        except OSError as error:
            raise ValueError(f"{place.name} cannot be read: {error}") from error
        if read < values.nbytes:
            raise ValueError(f"expected {values.nbytes} bytes of {place.name} from {place.start}, got {read}")
        return torch.from_numpy(values)

    def close_written(self) -> None:
        """Finish the file that is written; the next ``append`` starts another."""
        self._written = ""

    def scattered(self, places: Iterable[Place]) -> set[str]:
        """Names of finished files of which the given places are less than half."""
        used: dict[str, int] = {}
        for place in places:
            used[place.name] = used.get(place.name, 0) + _ITEM * place.size
        return {
            name
            for name, size in used.items()
            if name != self._written and size < _LEAST_IN_USE * (self._folder / name).stat().st_size
        }

    def keep_only(self, places: Iterable[Place]) -> None:
        """Remove the files in which none of the given places is, those of killed processes included."""
        kept = {place.name for place in places}
        for path in self._folder.glob("*"):
            if path.name not in kept:
                path.unlink()
