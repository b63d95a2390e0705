"""Which weights a model or a checkpoint holds, as one SHA-256, and the files in which a checkpoint holds them."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from huggingface_hub import parse_local_safetensors_file_metadata
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from configs.errors import UserError
from configs.output import write_bytes

_CHUNK_BYTES = 1 << 20
# The coarsest clock of a file system in use (FAT).
_SETTLED_SECONDS = 2.0
_SHA256 = re.compile("[0-9a-f]{64}")


class StoredTensor(NamedTuple):
    """One tensor in a file: its header, and the bytes that it takes."""

    name: str
    dtype: str
    shape: list[int]
    path: Path
    start: int
    stop: int


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over names, shapes, dtypes and bytes of all parameters, in order of their names."""
    return fingerprint_of(sorted(model.named_parameters()))


def fingerprint_of(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """``fingerprint`` of parameters that come one at a time, with their names, in order of these."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def checkpoint_fingerprint(source: str) -> str:
    """SHA-256 over names, shapes, dtypes and bytes of all stored tensors, in order of their names.

    It does not depend on how the tensors are spread over files. Reads 1 MiB at a time.

    Args:
        source: directory or hub id.

    Raises:
        UserError: no weights there, or a file that is damaged.
    """
    digest = hashlib.sha256()
    stored = [tensor for path in checkpoint_files(source) for tensor in stored_tensors(path)]
    for tensor in sorted(stored):
        digest.update(f"{tensor.name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        with tensor.path.open("rb") as file:
            for chunk in bytes_between(file, tensor.start, tensor.stop):
                digest.update(chunk)
    return digest.hexdigest()


def remembered_fingerprint(source: str, memory: Path) -> str:
    """``checkpoint_fingerprint``, for which files of the same path, size and time of change are read only once.

    Files that changed within the last ``_SETTLED_SECONDS`` are read each time: the next change may bear the same time.

    Args:
        source: directory or hub id.
        memory: folder with a small file per checkpoint, made on the first write; where it cannot be written,
            checkpoints are read each time.

    Raises:
        UserError: no weights there, or a file that is damaged.
    """
    stats = [(str(path.resolve()), path.stat()) for path in checkpoint_files(source)]
    seen = "\n".join(f"{path} {stat.st_size} {stat.st_mtime_ns}" for path, stat in stats)
    note = Path(memory) / hashlib.sha256(seen.encode()).hexdigest()
    with suppress(OSError, UnicodeDecodeError):
        if _SHA256.fullmatch(known := note.read_text()):
            return known
    found = checkpoint_fingerprint(source)
    if time.time() - max(stat.st_mtime for _, stat in stats) > _SETTLED_SECONDS:
        with suppress(OSError):
            write_bytes(note, found.encode())
    return found


def checkpoint_files(source: str) -> list[Path]:
    """The safetensors files of a checkpoint, one or several; those of a hub id are fetched where the cache lacks them.

    Args:
        source: directory or hub id.

    Raises:
        UserError: there are none, or some of them are missing.
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


def check_file(path: Path) -> None:
    """Open a weight file without reading its tensors.

    Raises:
        UserError: it is cut short or damaged in its header.
    """
    try:
        with safe_open(path, framework="pt"):
            pass
    except (OSError, SafetensorError) as error:
        raise UserError(f"expected whole safetensors weights in {path}, got: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """What an error of a library says, in one line."""
    if isinstance(error, StrictDataclassError):  # what is wrong stands in the lines after the first
        return " ".join(str(error).split())
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def stored_tensors(path: Path) -> list[StoredTensor]:
    """The tensors of a weight file, without reading their values.

    Raises:
        UserError: the file is cut short or damaged in its header.
    """
    check_file(path)
    with path.open("rb") as file:
        data = 8 + int.from_bytes(file.read(8), "little")
    return [
        StoredTensor(name, info.dtype, info.shape, path, *(data + offset for offset in info.data_offsets))
        for name, info in parse_local_safetensors_file_metadata(path).tensors.items()
    ]


def bytes_between(file: BinaryIO, start: int, stop: int) -> Iterator[bytes]:
    """The bytes of a file from ``start`` to before ``stop``, 1 MiB at a time.

    Raises:
        UserError: the file ends earlier.
    """
    file.seek(start)
    while start < stop:
        yield (chunk := file.read(min(_CHUNK_BYTES, stop - start)))
        if not chunk:
            raise UserError(f"expected {stop - start} bytes more in {file.name}, got the end of the file")
        start += len(chunk)
