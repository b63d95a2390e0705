"""Streaming of safetensors files from the bytes of others, 1 MiB at a time, so that no whole tensor is in memory."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models.files.safetensors_files import StoredTensor, bytes_between

# The format's own alignment of the data behind the header.
_ALIGNMENT = 8


@dataclass(frozen=True)
class NewTensor:
    """Tensor of a new file, in the dtype of the stored tensor that it is a copy of.

    Attributes:
        name: name in the new file.
        stored: source tensor.
        rows: kept indices of the first axis, ascending; None for all.
        values: values that replace the stored ones, in the stored dtype; None to copy.
    """

    name: str
    stored: StoredTensor
    rows: np.ndarray | None = None
    values: Tensor | None = None

    @property
    def shape(self) -> list[int]:
        """Shape in the new file."""
        if self.values is not None:
            return list(self.values.shape)
        if self.rows is None:
            return list(self.stored.shape)
        return [len(self.rows), *self.stored.shape[1:]]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        if self.values is not None:
            return self.values.nbytes
        stored = self.stored.stop - self.stored.start
        return stored if self.rows is None else stored // self.stored.shape[0] * len(self.rows)

    def chunks(self) -> Iterator[bytes]:
        """Bytes of the tensor in chunks of at most 1 MiB."""
        if self.values is not None:
            yield self.values.contiguous().flatten().view(torch.uint8).numpy().tobytes()
            return
        with self.stored.path.open("rb") as file:
            for start, stop in self._spans():
                yield from bytes_between(file, start, stop)

    def _spans(self) -> Iterator[tuple[int, int]]:
        """Byte ranges in the stored file; consecutive rows are one range."""
        if self.rows is None:
            yield self.stored.start, self.stored.stop
            return
        row = (self.stored.stop - self.stored.start) // self.stored.shape[0]
        for run in np.split(self.rows, np.flatnonzero(np.diff(self.rows) != 1) + 1):
            if len(run):
                yield self.stored.start + int(run[0]) * row, self.stored.start + (int(run[-1]) + 1) * row


def write_tensors(
    path: Path, tensors: Sequence[NewTensor], *, on_bytes: Callable[[int], None] = lambda count: None
) -> None:
    """Write a safetensors file with the tensors in the given order.

    Args:
        path: new file; must not be the file of a stored tensor.
        tensors: tensors of distinct names.
        on_bytes: called with the size of every written chunk.

    Raises:
        UserError: a stored file ends before the tensor does.
    """
    with path.open("wb") as file:
        file.write(_header(tensors))
        for tensor in tensors:
            for chunk in tensor.chunks():
                file.write(chunk)
                on_bytes(len(chunk))


def file_bytes(tensors: Sequence[NewTensor]) -> int:
    """Size in bytes of the file that ``write_tensors`` writes."""
    return len(_header(tensors)) + sum(tensor.nbytes for tensor in tensors)


def count_parameters(tensors: Sequence[StoredTensor | NewTensor]) -> int:
    """Number of entries of floating-point tensors; masks and index tables are not parameters."""
    dtypes = [tensor.stored.dtype if isinstance(tensor, NewTensor) else tensor.dtype for tensor in tensors]
    return sum(
        math.prod(tensor.shape)
        for tensor, dtype in zip(tensors, dtypes, strict=True)
        if "F" in dtype  # F32, BF16, F8_E4M3 ...
    )


def _header(tensors: Sequence[NewTensor]) -> bytes:
    entries: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.nbytes
        entries[tensor.name] = {
            "dtype": tensor.stored.dtype,
            "shape": tensor.shape,
            "data_offsets": [start, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
