"""Safetensors files of a checkpoint: their paths, tensor headers and byte ranges."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from huggingface_hub import parse_local_safetensors_file_metadata
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from configs.errors import UserError, first_line

_CHUNK_BYTES = 1 << 20
_TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class StoredTensor(NamedTuple):
    """Header of one tensor in a file, and its byte range."""

    name: str
    dtype: str
    shape: list[int]
    path: Path
    start: int
    stop: int


def checkpoint_files(source: str) -> list[Path]:
    """Paths of the safetensors files of a checkpoint; files of a hub id that are not cached are downloaded.

    Args:
        source: directory or hub id.

    Raises:
        UserError: there are none, or some are missing.
    """
    try:
        return [Path(cached_file(source, SAFE_WEIGHTS_NAME))]
    except OSError as error:
        absent = error
    try:
        index = cached_file(source, SAFE_WEIGHTS_INDEX_NAME)
    except OSError:
        raise UserError(
            f"expected safetensors weights in {source}, got none ({first_line(absent)}); the checkpoint is incomplete"
        ) from absent
    try:
        files = [Path(file) for file in get_checkpoint_shard_files(source, index)[0]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"expected the files that {index} names, got: {type(error).__name__} {first_line(error)}"
        ) from error
    for file in files:
        if not file.is_file():
            raise UserError(f"expected {file.name} in {source}, got none; the checkpoint is incomplete")
    return files


def weight_bytes(source: str) -> int:
    """Size in bytes of the weight files of a checkpoint, and about that of its copy in the same dtype.

    Args:
        source: directory or hub id.

    Raises:
        UserError: as ``checkpoint_files``.
    """
    return sum(file.stat().st_size for file in checkpoint_files(source))


def check_file(path: Path) -> None:
    """Check the header and size of a weight file.

    Raises:
        UserError: it is truncated or damaged in its header.
    """
    try:
        with safe_open(path, framework="pt"):
            pass
    except (OSError, SafetensorError) as error:
        raise UserError(f"expected whole safetensors weights in {path}, got: {first_line(error)}") from error


def stored_tensors(path: Path) -> list[StoredTensor]:
    """Headers of the tensors of a weight file.

    Raises:
        UserError: the file is truncated or damaged in its header.
    """
    check_file(path)
    with path.open("rb") as file:
        data = 8 + int.from_bytes(file.read(8), "little")
    return [
        StoredTensor(name, info.dtype, info.shape, path, *(data + offset for offset in info.data_offsets))
        for name, info in parse_local_safetensors_file_metadata(path).tensors.items()
    ]


def read_stored(tensor: StoredTensor, row: int | None = None) -> Tensor:
    """Values of a stored tensor, or of one row of its first axis, by plain reads of its bytes.

    To open the file with ``safe_open`` parses its whole header each time, which for many tensors takes longer than to
    read one; and its mapped pages count as memory of this process.

    Args:
        tensor: header of the tensor.
        row: index of the first axis; None: all of it.

    Raises:
        UserError: the file ends before the tensor does, or has a dtype that is not supported.
    """
    shape, start, size = tensor.shape, tensor.start, tensor.stop - tensor.start
    if row is not None:
        size //= shape[0]
        shape, start = shape[1:], start + row * size
    with tensor.path.open("rb") as file:
        file.seek(start)
        data = bytearray(file.read(size))
    if len(data) < size:
        raise UserError(f"expected {size} bytes of {tensor.name} in {tensor.path}, got {len(data)}")
    if tensor.dtype not in _TORCH_DTYPES:
        raise UserError(f"expected a dtype among {', '.join(_TORCH_DTYPES)}, got {tensor.dtype}")
    dtype = _TORCH_DTYPES[tensor.dtype]
    return torch.frombuffer(data, dtype=dtype).view(shape) if size else torch.empty(shape, dtype=dtype)


def bytes_between(file: BinaryIO, start: int, stop: int) -> Iterator[bytes]:
    """Read the bytes of a file from ``start`` to before ``stop`` in chunks of 1 MiB.

    Raises:
        UserError: the file ends earlier.
    """
    file.seek(start)
    while start < stop:
        yield (chunk := file.read(min(_CHUNK_BYTES, stop - start)))
        if not chunk:
            raise UserError(f"expected {stop - start} bytes more in {file.name}, got the end of the file")
        start += len(chunk)
